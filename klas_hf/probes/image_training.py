"""Training of image probes (KLAS Alg. 1): features once per batch, all probes in one pass, early stopping for each."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW

from klas_hf.anchors.classes import check_classes
from klas_hf.anchors.images import ImageBatch, image_batches
from klas_hf.anchors.vision import VisionAnchor, load_vision_anchor
from klas_hf.errors import TrainingDiverged
from klas_hf.maths.least_squares import summing_device
from klas_hf.probes.images import ImageProbeConfig, ImageProbeNet, pooled_features
from klas_hf.processes import process_state, progress, sum_over_processes

FEATURE_BYTES = 1 << 30
HELD_OUT = 5  # without validation data every fifth batch is held out
CONSTANT = 1e-5  # spread, relative to the mean, below which an fp32 feature says nothing but rounding


def train_image_probes(
    anchor: Any,
    data: Iterable[Any],
    config: ImageProbeConfig | None = None,
    *,
    validation: Iterable[Any] | None = None,
    feature_bytes: int = FEATURE_BYTES,
) -> ImageProbeNet:
    """One linear probe per block of an image classifier; arguments as for `train_probes`."""
    anchor = load_vision_anchor(anchor)
    for images in (data, validation):
        check_classes(images, anchor.model.config)
    config = _described(config or ImageProbeConfig(), anchor)
    if validation is None and isinstance(data, Iterator):
        raise ValueError(
            "got an iterator and no validation data; expected batches that can be read twice, for every fifth is held "
            "out. Pass a list, or validation=batches"
        )
    if validation is None:
        train = _Features(anchor, data, config, feature_bytes, lambda number: number % HELD_OUT != HELD_OUT - 1)
        held = _Features(anchor, data, config, feature_bytes, lambda number: number % HELD_OUT == HELD_OUT - 1)
    else:
        train = _Features(anchor, data, config, feature_bytes)
        held = _Features(anchor, validation, config, feature_bytes)
    # Read before anything is trained, so that data that will not do are found out at once.
    _check_validation(held)
    moments = _moments(train, anchor)
    probes = ImageProbeNet(config).to(anchor.device).float()
    best = _fit(probes, train, held, moments)
    _keep(probes, best, moments)
    return probes.eval()


class _Features:
    """Pooled features and labels of each batch, `(list of (images, width), (images,))`, the rows of this process.

    They are kept from the first pass on where they fit into the memory allowed, else extracted anew in every pass.
    Shuffled labels are so from the second pass on, when all are known: shuffled within its batch, a label would stay
    with an image of its class more often than chance has it.
    """

    def __init__(
        self,
        anchor: VisionAnchor,
        data: Iterable[Any],
        config: ImageProbeConfig,
        allowed_bytes: int,
        chosen: Callable[[int], bool] = lambda number: True,
    ):
        self.anchor, self.data, self.config, self.chosen = anchor, data, config, chosen
        self.allowed = allowed_bytes
        self._kept: list[list[Tensor]] | None = []
        self._labels: list[Tensor] | None = None

    def __iter__(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        if self._labels is not None and self._kept is not None:
            yield from zip(self._kept, map(self._share, self._labels), strict=True)
            return
        known, read = self._labels, list[Tensor]()
        for pooled, labels in self._extracted():
            read.append(labels)
            if known is not None and len(read) > len(known):
                break
            self._keep(pooled)
            learnt = known[len(read) - 1] if known is not None and self.config.shuffled_labels else labels
            yield pooled, self._share(learnt)
        if known is None:
            self._labels = self._shuffled(read) if self.config.shuffled_labels and read else read
        elif len(read) != len(known):
            raise ValueError(
                f"got {len(read)} batches of images when they were read again and {len(known)} before; expected data "
                "that can be read in every epoch, since their features do not fit into memory. Pass a list or a "
                "DataLoader, or raise feature_bytes"
            )

    def _extracted(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Features of this process's rows, and the labels of all."""
        for number, batch in enumerate(progress(image_batches(self.data), f"features of {self.anchor.name}")):
            if self.chosen(number):
                pixels, labels = batch.labelled()
                labels = self.anchor.image_labels(labels)
                self._check_labels(labels)
                share = self._share(pixels)
                # A process whose share of a batch is empty waits for the others' gradients all the same.
                yield pooled_features(self.anchor, ImageBatch(share)) if len(share) else self._nothing(), labels

    def _share(self, rows: Tensor) -> Tensor:
        state = process_state()
        return rows[state.process_index :: state.num_processes].to(self.anchor.device)

    def _nothing(self) -> list[Tensor]:
        return [torch.empty(0, width, device=self.anchor.device) for width in self.config.widths or []]

    def _check_labels(self, labels: Tensor) -> None:
        classes = self.anchor.classes
        wrong = labels[(labels < 0) | (labels >= classes)]  # of classes; shares of classes are within them
        if len(wrong):
            raise ValueError(
                f"got label {int(wrong[0])} for {self.anchor.name}, which has {classes} classes; expected labels from "
                f"0 to {classes - 1}. Map the data's labels to the anchor's"
            )

    def _shuffled(self, labels: Sequence[Tensor]) -> list[Tensor]:
        """The same for every epoch, so that they can be learnt by heart only."""
        every = torch.cat(list(labels))
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(self.config.seed))
        return list(every[order].split([len(one) for one in labels]))

    def _keep(self, pooled: list[Tensor]) -> None:
        if self._kept is None:
            return
        self.allowed -= sum(x.numel() * x.element_size() for x in pooled)
        self._kept = None if self.allowed < 0 else [*self._kept, pooled]


def _moments(train: _Features, anchor: VisionAnchor) -> list[tuple[Tensor, Tensor]]:
    """Mean and standard deviation of every block's pooled features, from one pass."""
    widths = train.config.widths or []
    sums = [torch.zeros(3, width, dtype=torch.float64, device=summing_device(anchor.device)) for width in widths]
    for pooled, _ in train:
        for total, one in zip(sums, pooled, strict=True):
            x = one.to(total.device).double()
            total += torch.stack([torch.full_like(total[0], len(x)), x.sum(0), x.square().sum(0)])
    moments = []
    for total in sums:
        count, first, second = sum_over_processes(total)
        if not count[0]:
            raise ValueError(
                "got no labelled images to train probes on; expected some. Check that an iterator was not used up "
                "before"
            )
        mean = first / count
        spread = (second / count - mean.square()).clamp_min(0).sqrt()
        varies = spread > CONSTANT * mean.abs()
        usable = torch.where(varies | spread.isnan(), spread, torch.inf)
        moments.append((mean.float().to(anchor.device), usable.float().to(anchor.device)))
    return moments


def _fit(
    probes: ImageProbeNet, train: _Features, held: _Features, moments: Sequence[tuple[Tensor, Tensor]]
) -> list[dict[str, Any]]:
    """Train all probes; for each block its best weights, validation loss, accuracy and epoch.

    A probe that is done runs on beside the others, but nothing of it is kept: it ends as it would alone.
    """
    config = probes.config
    optimizer = AdamW(probes.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    best: list[dict[str, Any]] = [{"loss": float("inf"), "epoch": 0} for _ in probes.probes]
    for epoch in range(1, config.epochs + 1):
        for pooled, labels in train:
            _step(probes, pooled, labels, moments, optimizer)
        for block, (loss, accuracy) in enumerate(_validate(probes, held, moments)):
            is_done = epoch > best[block]["epoch"] + config.patience
            if loss < best[block]["loss"] and not is_done:
                state = {name: tensor.detach().clone() for name, tensor in probes.probes[block].state_dict().items()}
                best[block] = {"loss": loss, "accuracy": accuracy, "epoch": epoch, "state": state}
        if all(epoch - one["epoch"] >= config.patience for one in best):
            break
    return best


def _step(
    probes: ImageProbeNet,
    pooled: list[Tensor],
    labels: Tensor,
    moments: Sequence[tuple[Tensor, Tensor]],
    optimizer: AdamW,
) -> None:
    count = sum_over_processes(torch.tensor(float(len(labels))))
    losses = [
        F.cross_entropy(probe((x - mean) / spread), labels, reduction="sum") / count.to(x.device)
        for probe, x, (mean, spread) in zip(probes.probes, pooled, moments, strict=True)
    ]
    total = torch.stack(losses).sum()
    if not total.isfinite():
        raise TrainingDiverged(
            f"got a loss of {float(total.detach())} for the probes of {probes.config.anchor_name}; expected finite "
            "activations. Check the anchor's weights, or lower learning_rate"
        )
    optimizer.zero_grad()
    total.backward()
    for parameter in probes.parameters():
        parameter.grad = sum_over_processes(parameter.grad)
    optimizer.step()


@torch.no_grad()
def _validate(
    probes: ImageProbeNet, held: _Features, moments: Sequence[tuple[Tensor, Tensor]]
) -> list[tuple[float, float]]:
    """Loss in nats per image and accuracy of every probe."""
    sums = torch.zeros(len(probes.probes), 3, dtype=torch.float64)
    for pooled, labels in held:
        for block, (probe, x, (mean, spread)) in enumerate(zip(probes.probes, pooled, moments, strict=True)):
            logits = probe((x - mean) / spread)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            correct = (logits.argmax(-1) == (labels.argmax(-1) if labels.is_floating_point() else labels)).sum()
            sums[block] += torch.tensor([float(loss), float(correct), len(labels)])
    sums = sum_over_processes(sums)
    if not sums.isfinite().all():
        raise TrainingDiverged(
            f"got validation losses of {sums[:, 0].tolist()} for the probes of {probes.config.anchor_name}; expected "
            "finite activations. Check the validation images, or lower learning_rate"
        )
    return [(loss / count, correct / count) for loss, correct, count in sums.tolist()]


def _check_validation(held: _Features) -> None:
    images = sum_over_processes(torch.tensor(float(sum(len(labels) for _, labels in held))))
    if not images:
        raise ValueError(
            "got no images to validate probes on; expected at least five batches, of which every fifth is held out, or "
            "validation=batches. Pass smaller batches or validation data"
        )


@torch.no_grad()
def _keep(probes: ImageProbeNet, best: Sequence[dict[str, Any]], moments: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Put the best weights in place, acting on features as they are, not standardised."""
    for probe, one, (mean, spread) in zip(probes.probes, best, moments, strict=True):
        probe.weight.copy_(one["state"]["weight"] / spread)
        probe.bias.copy_(one["state"]["bias"] - probe.weight @ mean)
    config = probes.config
    config.accuracy = [one["accuracy"] for one in best]
    config.validation_loss = [one["loss"] for one in best]
    config.best_epoch = [one["epoch"] for one in best]


def _described(config: ImageProbeConfig, anchor: VisionAnchor) -> ImageProbeConfig:
    """A copy of the settings with the anchor's identity filled in."""
    given = {name: value for name, value in config.to_dict().items() if name not in ("id2label", "label2id")}
    return ImageProbeConfig(
        **given
        | {
            "anchor_name": anchor.name,
            "anchor_revision": anchor.revision,
            "anchor_fingerprint": anchor.fingerprint,
            "widths": [shape.channels for shape in anchor.shapes()[1:]],
            "num_labels": anchor.classes,
        }
    )
