"""All probes in one pass, against one run per block: images by gradient descent, text as the tuned lens does it."""

import copy
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measuring import Figure, in_turns
from benchmarks.models import classifier, images, llamas, sequences, vit
from benchmarks.options import Options
from klas_hf import ProbeConfig, train_probes
from klas_hf.anchors.images import image_batches
from klas_hf.anchors.language import LanguageAnchor
from klas_hf.anchors.vision import VisionAnchor
from klas_hf.probes import ImageProbeConfig


def figures(options: Options) -> Iterator[Figure]:
    yield _images(options)
    yield _text(options)


# ---- images


def _images(options: Options) -> Figure:
    anchor = VisionAnchor(classifier(vit(options)))
    batch_size = 2 if options.quick else 4
    train, held = images(options, batch_size, 4), images(options, batch_size, 1)
    config = ImageProbeConfig(epochs=3, patience=3)
    blocks = range(anchor.num_blocks)
    together, alone = in_turns(
        1,
        lambda: train_probes(anchor, train, copy.deepcopy(config), validation=held),
        lambda: [_image_probe(anchor, train, held, config, block) for block in blocks],
        warm_up=False,
    )
    return Figure(
        f"all {len(blocks)} probes of a ViT in one pass", together, "one run per block", alone, "s",
        0.8 * len(blocks), larger=True,
    )  # fmt: skip


def _image_probe(
    anchor: VisionAnchor, train: list[dict[str, Tensor]], held: list[dict[str, Tensor]], config: ImageProbeConfig,
    block: int,
) -> None:  # fmt: skip
    """The probe of one block by itself: its features, kept, then the epochs."""

    def features(data: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        return [(anchor.kind.pooled(anchor.states(batch)[block + 1]), batch.labels) for batch in image_batches(data)]

    kept, validation = features(train), features(held)
    every = torch.cat([x for x, _ in kept])
    mean, spread = every.mean(0), every.std(0)
    probe = nn.Linear(every.shape[1], anchor.classes)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    for _ in range(config.epochs):
        for x, labels in kept:
            optimizer.zero_grad()
            F.cross_entropy(probe((x - mean) / spread), labels).backward()
            optimizer.step()
        with torch.no_grad():
            for x, labels in validation:
                F.cross_entropy(probe((x - mean) / spread), labels)


# ---- text


def _text(options: Options) -> Figure:
    anchor = LanguageAnchor(llamas(options, scale=4)[0])
    data = sequences(options, options.sequences)
    config = ProbeConfig(kind="tuned", tuned_start="zero")
    blocks = range(anchor.num_blocks - 1)  # the last needs no translator
    together, alone = in_turns(
        1,
        lambda: train_probes(anchor.model, data, copy.deepcopy(config)),
        lambda: [_lens(anchor, data, config, block) for block in blocks],
        warm_up=False,
    )
    return Figure(
        f"{len(blocks)} tuned probes of a Llama in one pass", together, "one run per block, as a tuned lens", alone,
        "s", 0.8 * len(blocks), larger=True,
    )  # fmt: skip


def _lens(anchor: LanguageAnchor, data: list[dict[str, Tensor]], config: ProbeConfig, block: int) -> None:
    """The tuned lens (Belrose et al., arXiv 2303.08112) of one block: a translator, KL to the model's own answers."""
    model = anchor.model
    translator = nn.Linear(anchor.width, anchor.width, device=model.device)
    nn.init.zeros_(translator.weight)
    nn.init.zeros_(translator.bias)
    optimizer = torch.optim.AdamW(translator.parameters(), lr=config.learning_rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(data))
    answers = partial(F.log_softmax, dim=-1, dtype=torch.float32)
    for batch in data:
        with torch.no_grad():
            out = model(batch["input_ids"].to(model.device), output_hidden_states=True, use_cache=False)
        hidden = out.hidden_states[block + 1].float()
        own, lens = answers(out.logits[:, 1:]), hidden[:, 1:] + translator(hidden[:, 1:])
        loss = F.kl_div(answers(anchor.logits(lens)), own, log_target=True, reduction="none").sum(-1).mean()
        (gradient) = torch.autograd.grad(loss, list(translator.parameters()))
        for parameter, part in zip(translator.parameters(), gradient, strict=True):
            parameter.grad = part
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
