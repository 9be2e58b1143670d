"""Supernets of tiny classifiers whose stitching layers are random but of sound scale."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tiny_vision import SIDE, path_logits, possible, randomise_stitch, tiny_classifier, tiny_pair
from torch import Tensor
from transformers import PreTrainedModel

from klas_hf import Path, Stitch, StitchedSupernet

Models = Sequence[PreTrainedModel]


def tiny_supernet(anchors: Models, paths: Iterable[Any], **options: Any) -> StitchedSupernet:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the stitching layer is random")
        supernet = StitchedSupernet.from_anchors(anchors, paths, **options)
    for number, layer in enumerate(supernet.joints):
        randomise_stitch(layer.projection, seed=number)
    return supernet


def supernet_of(source: str, target: str | None = None) -> tuple[StitchedSupernet, Models]:
    """A supernet of all stitches between a small and a large classifier, and these two."""
    pair = tiny_pair(source, target)
    side = SIDE[target or source]
    stitches = possible(*pair, torch.zeros(1, 3, side, side, dtype=torch.float64))
    return tiny_supernet(pair, stitches, image_size=side), pair


def three_vits() -> Models:
    """ViTs of 2, 3 and 4 blocks, the cheapest first."""
    sizes = [(16, 2, 2), (24, 3, 3), (32, 4, 4)]
    return [
        tiny_classifier("vit", seed=seed, hidden_size=width, num_attention_heads=heads, num_hidden_layers=depth)
        for seed, (width, heads, depth) in enumerate(sizes)
    ]


def stitches_of(supernet: StitchedSupernet) -> list[Stitch]:
    return [path.stitch for path in supernet.paths if path.stitch]


def alone(place: int) -> Path:
    """The path that is an anchor."""
    return Path.parse(f"{place}[:]")


@torch.no_grad()
def by_hooks(supernet: StitchedSupernet, anchors: Models, path: Path | Stitch, pixels: Tensor) -> Tensor:
    """What a path should give, from hooks on the whole anchors."""
    layers = [joint.projection for joint in supernet.joints_of(path)]
    return path_logits(anchors, Path.of(path), [(layer.weight, layer.bias) for layer in layers], pixels)
