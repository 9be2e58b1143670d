"""States of vision anchors: features alone, or of dense anchors with the maps that a head reads beside the last state.

A state of a dense anchor carries the last hidden states on each grid that the path has passed, with the anchor whose
blocks they left.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BackboneOutput

from klas_hf.models.vision_features import Features, VisionKind


class MappedFeatures(NamedTuple):
    """The state of a dense anchor.

    Attributes:
        hidden, height, width: as of `Features`.
        maps: grid → the anchor whose slice the last state on it lies in, and that state, `hidden` alone.
    """

    hidden: Tensor
    height: int
    width: int
    maps: Mapping[tuple[int, int], tuple[Any, Tensor]]


def stacked(states: Sequence[Any]) -> Any:
    """Several states of one batch as one of a larger batch; a grid on which they are of several shapes is left out."""
    first = states[0]._replace(hidden=torch.cat([one.hidden for one in states]))
    if not isinstance(first, MappedFeatures):
        return first
    common = set.intersection(*(set(one.maps) for one in states))
    maps = {
        grid: (first.maps[grid][0], torch.cat([one.maps[grid][1] for one in states]))
        for grid in common
        if len({one.maps[grid][1].shape for one in states}) == 1
    }
    return first._replace(maps=maps)


def split(state: Any, count: int) -> list[Any]:
    """The states that were stacked."""
    parts = [state._replace(hidden=hidden) for hidden in state.hidden.chunk(count)]
    if not isinstance(state, MappedFeatures):
        return parts
    chunks = {grid: (owner, hidden.chunk(count)) for grid, (owner, hidden) in state.maps.items()}
    return [
        one._replace(maps={grid: (owner, hidden[number]) for grid, (owner, hidden) in chunks.items()})
        for number, one in enumerate(parts)
    ]


@contextmanager
def giving(backbone: nn.Module, maps: tuple[Tensor, ...]) -> Iterator[None]:
    """Make a backbone give these maps, whatever it is called with."""
    backbone.forward = lambda *args, **kwargs: BackboneOutput(feature_maps=maps)
    try:
        yield
    finally:
        del backbone.forward


def feature_rows(features: Features, kind: VisionKind, dropped: int = 0) -> Tensor:
    """One row per position and image, `(batch · positions, channels)`, as a stitching layer sees them."""
    if kind.layout == "map":
        return features.hidden.movedim(1, -1).flatten(0, 2)
    return features.hidden[:, dropped:].flatten(0, 1)


def map_rows(one: Tensor) -> Tensor:
    """`(batch, channels, height, width)` as `(batch · height · width, channels)`."""
    return one.movedim(1, -1).flatten(0, 2)
