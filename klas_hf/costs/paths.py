"""Costs of an anchor's parts, from which those of any path and of every stitch follow."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from klas_hf.budgets import Cost
from klas_hf.costs.measured import PathTimes, joints_between
from klas_hf.paths import Path, Stitch
from klas_hf.stitch_costs import StitchCosts


@dataclass(frozen=True)
class AnchorCosts:
    """MACs and parameters of one anchor, taken apart: embedding, n blocks, head.

    Attributes:
        embed_macs, head_macs: MACs before the first block and after the last.
        block_macs: of each block.
        embed_parameters, block_parameters, head_parameters: parameters of the same parts.
        widths: n + 1 widths, at the input of each block and after the last.
        positions: n + 1 numbers of positions there, class tokens included. A joint runs at those of what it maps to.
        block_kv_bytes: bytes that a cached token takes in each block; nothing for images.
        block_linears: weights of each block's linear layers, which quantisers change.
        tied_parameters: how many of the head's are the embedding's, where a path begins and ends with this anchor.
        merges: whether a joint behind a block, to another block of the anchor, can be merged into the block.
        residual: whether blocks add to the states, so that those behind others that are left out read what they know.
        maps: of a dense anchor, the states that its head takes as maps, from 0 at the embedding.
        map_norms: whether maps that lie in a slice of this anchor have a layer norm each.
    """

    embed_macs: int
    block_macs: Sequence[int]
    head_macs: int
    embed_parameters: int
    block_parameters: Sequence[int]
    head_parameters: int
    widths: Sequence[int]
    positions: Sequence[int]
    block_kv_bytes: Sequence[int] = ()
    block_linears: Sequence[int] = ()
    tied_parameters: int = 0
    merges: bool = False
    residual: bool = True
    maps: Sequence[int] = ()
    map_norms: bool = False

    @property
    def total_macs(self) -> int:
        """MACs of the whole anchor."""
        return self.embed_macs + sum(self.block_macs) + self.head_macs


def stitch_costs(first: AnchorCosts, last: AnchorCosts, **about: Any) -> StitchCosts:
    """Costs of every stitch between two anchors, whose layer (with a bias) runs at every position that it maps to.

    Args:
        about: the fields of `StitchCosts` that do not follow from the anchors' parts.
    """
    widths, to = np.outer(first.widths[1:], last.widths[:-1]), np.array(last.widths[:-1])
    blocks = len(first.block_macs), len(last.block_macs)
    beside = np.array(  # per stitch, MACs and parameters
        [
            [map_costs([first, last], [(0, 0, i), (1, j, blocks[1])]) for j in range(blocks[1])]
            for i in range(1, blocks[0] + 1)
        ],
        dtype=np.int64,
    )
    return StitchCosts(
        source_blocks=np.array(first.block_macs, dtype=np.int64),
        target_blocks=np.array(last.block_macs, dtype=np.int64),
        stitch=widths * np.array(last.positions[:-1]) + beside[..., 0],
        source_total=first.total_macs,
        target_total=last.total_macs,
        ends=first.embed_macs + last.head_macs,
        source_parameters=np.array(first.block_parameters, dtype=np.int64),
        target_parameters=np.array(last.block_parameters, dtype=np.int64),
        stitch_parameters=widths + to + beside[..., 1],
        ends_parameters=first.embed_parameters + last.head_parameters,
        **about,
    )


def map_costs(anchors: Sequence[AnchorCosts], bounds: Sequence[tuple[int, int, int]]) -> tuple[int, int]:
    """MACs and parameters of the layers between a path and a dense head: norms of its maps, and lateral joints.

    A map is the path's last state on the grid that the head wants it on; one that lies in another anchor's slice than
    the head's comes to the head's width through a 1×1 convolution.
    """
    macs, parameters, head = 0, 0, anchors[bounds[-1][0]]
    on_grid = {
        anchors[place].positions[state]: (place, state)
        for place, start, stop in bounds
        for state in range(start, stop + 1)
    }
    for wanted in head.maps:
        if head.positions[wanted] not in on_grid:
            continue  # no such path can be made
        place, state = on_grid[head.positions[wanted]]
        width = anchors[place].widths[state]
        parameters += 2 * width * anchors[place].map_norms
        if place != bounds[-1][0]:
            macs += width * head.widths[wanted] * head.positions[wanted]
            parameters += (width + 1) * head.widths[wanted]
    return macs, parameters


@dataclass(frozen=True)
class PathCosts:
    """Costs of every path through some anchors, without building one.

    Attributes:
        anchors: what the parts of each cost.
        tokens: length of the sequence that the MACs are for; 0 for images.
        image_height, image_width: pixels of the image that they are for; 0 for sequences.
        times: what the anchors' parts take on a device, where that was measured.

    Example:
        >>> costs = measure_path_costs([source, target], tokens=16)
        >>> model = StitchedModel.from_path([source, target], "1[:1] 0[1:2] 1[3:]", calibration=batches)
        >>> costs.of("1[:1] 0[1:2] 1[3:]") == measure_costs(model, tokens=16)
        True
    """

    anchors: Sequence[AnchorCosts]
    tokens: int = 0
    image_height: int = 0
    image_width: int = 0
    times: PathTimes | None = None

    def mergeable(self, path: Path | Stitch | str | Sequence[int]) -> bool:
        """Whether a path is seamless and its anchor merges joints into blocks (`joint="merged"`): they cost nothing."""
        return self.seamless(path) and self.anchors[Path.of(path).slices[0].anchor].merges

    def seamless(self, path: Path | Stitch | str | Sequence[int]) -> bool:
        """Whether all joints of a path lie within residual anchors and states of one shape, and can be left out."""
        bounds = Path.of(path).bounds([len(one.block_macs) for one in self.anchors])
        return len(bounds) > 1 and all(
            place == other and self.anchors[place].residual and self._shape(place, stop) == self._shape(place, start)
            for (place, _, stop), (other, start, _) in pairwise(bounds)
        )

    def _shape(self, place: int, block: int) -> tuple[int, int]:
        """Width and positions of the states before a block of an anchor."""
        return self.anchors[place].widths[block], self.anchors[place].positions[block]

    def of(self, path: Path | Stitch | str | Sequence[int], *, identity: bool = False) -> Cost:
        """What the model of a path costs, its stitching layers (with biases) included.

        Args:
            identity: whether it has none (`joint="identity"` or "merged"), so that joints cost nothing.

        Raises:
            ValueError: the path is out of range.
        """
        bounds = Path.of(path).bounds([len(one.block_macs) for one in self.anchors])
        first, last = self.anchors[bounds[0][0]], self.anchors[bounds[-1][0]]
        macs, parameters, kv_bytes = (
            first.embed_macs + last.head_macs, first.embed_parameters + last.head_parameters, 0
        )  # fmt: skip
        if bounds[0][0] == bounds[-1][0]:
            parameters -= last.tied_parameters
        width = None
        for place, start, stop in bounds:
            anchor = self.anchors[place]
            if width is not None and not identity:
                macs += anchor.positions[start] * width * anchor.widths[start]
                parameters += (width + 1) * anchor.widths[start]
            macs += sum(anchor.block_macs[start:stop])
            parameters += sum(anchor.block_parameters[start:stop])
            kv_bytes += sum(anchor.block_kv_bytes[start:stop])
            width = anchor.widths[stop]
        beside = map_costs(self.anchors, bounds)
        macs, parameters = macs + beside[0], parameters + beside[1]
        cost = Cost(macs, parameters, kv_bytes, self.tokens, self.image_height, self.image_width)
        if self.times is None:
            return cost
        prompt = self.times.usage.prompt
        positions = [one.positions if self.image_height else [prompt] * len(one.widths) for one in self.anchors]
        joints = [] if identity else joints_between(bounds, [one.widths for one in self.anchors], positions)
        linears = sum(sum(self.anchors[place].block_linears[start:stop]) for place, start, stop in bounds)
        return self.times.add(cost, bounds, joints, linears)
