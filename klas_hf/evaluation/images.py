"""Image classifiers and paths of their supernets: accuracy and loss, over all classes or among some.

The paths of a supernet share their work: on each batch every anchor runs once, and a stitch then costs only its
stitching layer and the target's blocks behind it.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from klas_hf.anchors.images import ImageBatch, image_batches
from klas_hf.anchors.vision import VisionAnchor
from klas_hf.anchors.weights import evaluating
from klas_hf.evaluation.models import Measurement
from klas_hf.maths.divergences import kl_divergence
from klas_hf.models.vision_features import Features
from klas_hf.paths import Stitch
from klas_hf.processes import progress, shared_out, sum_over_processes
from klas_hf.stitching.supernet import Path
from klas_hf.stitching.supernet_images import StitchedSupernetForImageClassification
from klas_hf.training.batch_norm import batch_norms, recalibrate_batch_norm


@torch.no_grad()
def evaluate_accuracy(
    model: PreTrainedModel, batches: Iterable[object], *, classes: Sequence[int] | None = None
) -> Measurement:
    """Top-1 accuracy and cross-entropy of an image classifier.

    Args:
        model: any image classifier; it is put back in the mode it was in.
        batches: images with labels.
        classes: measure among these classes only too (`accuracy_among`): the highest logit of these counts.

    Returns:
        Metrics `accuracy` (0 to 1), `loss` (nats per image) and perhaps `accuracy_among`; the number of images.

    Raises:
        ValueError: no images.

    Example:
        >>> measured = evaluate_accuracy(large, images, classes=[0, 2])
        >>> sorted(measured.metrics), measured.details
        (['accuracy', 'accuracy_among', 'loss'], {'images': 20})
    """
    sums = _Sums(classes)
    with evaluating(model):
        for batch in progress(shared_out(image_batches(batches)), "measuring accuracy"):
            pixels, labels = batch.labelled()
            sums.add(model(pixel_values=pixels.to(model.device, model.dtype)).logits, labels)
    return sums.measured()


@torch.no_grad()
def evaluate_divergence(model: PreTrainedModel, target: PreTrainedModel, batches: Iterable[object]) -> float:
    """Mean KL(target ‖ model) of two classifiers' outputs, in nats per image.

    Raises:
        ValueError: no images.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    with evaluating(model), evaluating(target):
        for batch in progress(shared_out(image_batches(batches)), "comparing outputs"):
            log_p, log_q = (
                one(pixel_values=batch.pixel_values.to(one.device, one.dtype)).logits.float().log_softmax(-1).cpu()
                for one in (target, model)
            )
            sums += torch.tensor([float(kl_divergence(log_p, log_q).sum()), len(batch)], dtype=torch.float64)
    total, images = sum_over_processes(sums).tolist()
    if not images:
        raise ValueError("got no images to compare outputs on; expected batches")
    return total / images


@torch.no_grad()
def predict_probabilities(
    model: PreTrainedModel, batches: Iterable[object], *, classes: Sequence[int] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Class probabilities `(images, classes)` and labels `(images,)`, for cascades; every process runs all images.

    Args:
        classes: of these labels only, renormalised; labels are then positions in it.

    Raises:
        ValueError: no images, or a label that is not among `classes`.
    """
    columns = slice(None) if classes is None else torch.tensor(list(classes))
    found, labels = [], []
    with evaluating(model):
        for batch in progress(image_batches(batches), "predicting"):
            pixels, of_batch = batch.labelled()
            logits = model(pixel_values=pixels.to(model.device, model.dtype)).logits.float().cpu()[:, columns]
            found.append(logits.softmax(-1).double())
            labels.append(of_batch)
    if not found:
        raise ValueError("got no images to predict; expected batches with labels")
    truth = torch.cat(labels)
    if classes is not None:
        truth = _positions(truth, classes)
    return torch.cat(found).numpy(), truth.numpy()


def _positions(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Where each label stands in `classes`."""
    is_it = labels[:, None] == torch.tensor(list(classes))
    missing = labels[~is_it.any(1)]
    if len(missing):
        raise ValueError(
            f"got label {int(missing[0])}, which is not among the {len(classes)} classes to predict; expected images "
            "of these only"
        )
    return is_it.int().argmax(1)


@torch.no_grad()
def measure_image_paths(
    supernet: StitchedSupernetForImageClassification,
    paths: Sequence[Path],
    batches: Iterable[object],
    classes: Sequence[int] | None,
) -> list[Measurement]:
    """Accuracy and loss of some paths, in one pass."""
    sums = [_Sums(classes) for _ in paths]
    anchors = [VisionAnchor(model) for model in supernet.anchors]
    with evaluating(supernet):
        for batch in progress(shared_out(image_batches(batches)), f"measuring {len(paths)} paths"):
            _, labels = batch.labelled()
            for one, logits in zip(sums, _all_logits(supernet, anchors, paths, batch), strict=True):
                one.add(logits, labels)
    return [one.measured() for one in sums]


def _all_logits(
    supernet: StitchedSupernetForImageClassification,
    anchors: Sequence[VisionAnchor],
    paths: Sequence[Path],
    batch: ImageBatch,
) -> Iterator[Tensor]:
    """Logits of each path; each anchor's front runs once for all paths that begin with it."""
    needed: dict[int, int] = {}
    for path in paths:
        place, stop = (path.source, path.source_stop) if isinstance(path, Stitch) else (path, anchors[path].num_blocks)
        needed[place] = max(stop, needed.get(place, 0))
    fronts = {place: anchors[place].features(batch.pixel_values, stop) for place, stop in needed.items()}
    for path in paths:
        if isinstance(path, Stitch):
            target = anchors[path.target]
            target.kind.check_size(batch.pixel_values, target.config)
            yield _rear(target, supernet.layer_of(path)(fronts[path.source][path.source_stop]), path)
        else:
            yield anchors[path].logits(fronts[path][-1])


def _rear(anchor: VisionAnchor, features: Features, stitch: Stitch) -> Tensor:
    for block in anchor.blocks[stitch.target_start :]:
        features = anchor.kind.run_block(anchor.model, block, features)
    return anchor.logits(features)


@contextmanager
def recalibrated(
    supernet: StitchedSupernetForImageClassification, path: Path, batches: Iterable[object]
) -> Iterator[None]:
    """A path's own BatchNorm statistics, for a while."""
    layers = batch_norms(supernet)
    before = [{name: buffer.clone() for name, buffer in layer.named_buffers()} for layer in layers]
    recalibrate_batch_norm(
        supernet, ({"pixel_values": batch.pixel_values} for batch in image_batches(batches)), path=path
    )
    try:
        yield
    finally:
        for layer, buffers in zip(layers, before, strict=True):
            for name, buffer in layer.named_buffers():
                buffer.copy_(buffers[name])


@dataclass
class _Sums:
    """Correct answers, loss and images of one model."""

    classes: Sequence[int] | None
    values: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))

    def add(self, logits: Tensor, labels: Tensor) -> None:
        logits, labels = logits.float(), labels.to(logits.device)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        correct = (logits.argmax(-1) == labels).sum()
        among = correct
        if self.classes is not None:
            chosen = torch.tensor(list(self.classes), device=logits.device)
            among = (chosen[logits[:, chosen].argmax(-1)] == labels).sum()
        self.values += torch.stack([correct, among, loss, torch.tensor(len(labels), device=loss.device)]).double().cpu()

    def measured(self) -> Measurement:
        correct, among, loss, images = sum_over_processes(self.values).tolist()
        if not images:
            raise ValueError("got no images to measure on; expected batches with labels")
        metrics = {"accuracy": correct / images, "loss": loss / images}
        metrics |= {} if self.classes is None else {"accuracy_among": among / images}
        return Measurement(metrics, {"images": int(images)})
