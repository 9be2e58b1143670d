"""Tiny image classifiers, a stand-in for a supernet, and images that the training tests share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_outputs import ImageClassifierOutput

from klas_hf import Cost, Path, Stitch
from klas_hf.training import loop

CLASSES = 3


class ToyImages:
    """Images of 8 × 8 pixels, one noisy pattern per class; uint8, or float and normalised by 0.5 and 0.25."""

    def __init__(self, count: int = 42, *, floats: bool = False, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.labels = [number % CLASSES for number in range(count)]
        patterns = torch.rand(CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(99))
        pixels = (patterns[self.labels] + 0.2 * torch.randn(count, 3, 8, 8, generator=generator)).clamp(0, 1)
        self.images = (255 * pixels).round().to(torch.uint8)
        if floats:
            self.images = (self.images.float() / 255 - 0.5) / 0.25

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]

    def normalised(self) -> Tensor:
        return (self.images.float() / 255 - 0.5) / 0.25


def tiny_vit(seed: int = 0, classes: int = CLASSES, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(
        **sizes | {"image_size": 8, "patch_size": 4, "num_labels": classes, "initializer_range": 0.2} | changes
    )
    return ViTForImageClassification(config).eval()


def tiny_resnet(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[6, 8], depths=[1, 1], layer_type="basic", num_labels=CLASSES
    )  # fmt: skip
    return ResNetForImageClassification(config).eval()


class ToySupernetConfig(PreTrainedConfig):
    model_type = "toy_supernet"

    def __init__(self, has_batch_norm: bool = False, dropout: float = 0.0, **kwargs: Any):
        self.has_batch_norm, self.dropout = has_batch_norm, dropout
        super().__init__(**kwargs)


class _Anchor(nn.Module):
    """Flattened pixels through residual blocks."""

    def __init__(self, width: int, config: ToySupernetConfig):
        super().__init__()
        self.embed = nn.Linear(3 * 8 * 8, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        norm = nn.BatchNorm1d if config.has_batch_norm else nn.LayerNorm
        self.norms = nn.ModuleList(norm(width) for _ in range(2))
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(width, config.num_labels)

    def run(self, hidden: Tensor, start: int, stop: int, drop_path: float) -> Tensor:
        for number in range(start, stop):
            change = self.dropout(torch.tanh(self.blocks[number](self.norms[number](hidden))))
            if self.training and drop_path:
                change = change * (torch.rand(len(hidden), 1) >= drop_path * number)
            hidden = hidden + change
        return hidden


class ToySupernet(PreTrainedModel):
    """What training needs of a supernet: two anchors, and stitching layers from the first to the second."""

    config_class = ToySupernetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ToySupernetConfig):
        super().__init__(config)
        self.anchors = nn.ModuleList([_Anchor(8, config), _Anchor(12, config)])
        self.joints = nn.ModuleDict({"a": nn.Linear(8, 12), "b": nn.Linear(8, 12)})
        self.layer_of = {Stitch(1, 1).path: "a", Stitch(2, 1).path: "b"}
        self.paths = tuple(map(Path.of, ("0[:]", (1, 1), (2, 1), "1[:]")))
        self.path_costs = tuple(Cost(macs, 0) for macs in (100, 190, 195, 300))
        self.seen: list[tuple[Path, Tensor, float]] = []
        self.post_init()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, *, path: Path | None = None,
        drop_path: float = 0.0,
    ) -> ImageClassifierOutput:  # fmt: skip
        path = self.paths[-1] if path is None else Path.of(path)
        self.seen.append((path, pixel_values.detach().clone(), drop_path))
        first, last = self.anchors
        flat = pixel_values.flatten(1)
        if path.stitch is None:
            anchor = self.anchors[path.anchors[0]]
            return ImageClassifierOutput(logits=anchor.head(anchor.run(anchor.embed(flat), 0, 2, drop_path)))
        hidden = first.run(first.embed(flat), 0, path.stitch.source_stop, drop_path)
        hidden = self.joints[self.layer_of[path]](hidden)
        return ImageClassifierOutput(logits=last.head(last.run(hidden, path.stitch.target_start, 2, drop_path)))


def toy_supernet(seed: int = 0, **settings: Any) -> ToySupernet:
    torch.manual_seed(seed)
    return ToySupernet(ToySupernetConfig(num_labels=CLASSES, **settings)).eval()


class Interrupt(Exception):
    """Stands for Ctrl-C or a killed job."""


@contextmanager
def interrupted_after(steps: int) -> Iterator[None]:
    """Training meanwhile stops after so many optimiser steps."""
    step, taken = loop._Run._step, iter(range(steps))

    def interrupted(self: Any, batches: Any, seed: int) -> float:
        if next(taken, None) is None:
            raise Interrupt
        return step(self, batches, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "_step", interrupted)
        with pytest.raises(Interrupt):
            yield


def changed(model: nn.Module, before: nn.Module) -> set[str]:
    """Names of tensors that differ."""
    old = before.state_dict()
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, old[name])}
