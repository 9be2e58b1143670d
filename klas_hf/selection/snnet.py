"""SN-Net's stitches (Pan et al., CVPR 2023): a window that slides over the blocks, whatever the blocks compute.

SN-Net counts blocks from 0: its pair (a, b) feeds the output of source block a to target block b, which is the stitch
(i, j) = (a + 1, b). Anchors of one stage and equal depth (DeiT) are joined at every pair of a window ("unpaired
stitching"). Anchors of several stages, or of unequal depths, are joined stage by stage and forwards only: the source
has as many places as the target, filled by nearest interpolation, and each place feeds the next ones of its window.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from klas_hf.paths import Stitch
from klas_hf.selection.choice import StitchSelection, merge_selections
from klas_hf.stitch_costs import StitchCosts

Stages = Literal["all_but_last", "middle"]
_STITCHED_STAGES = {"all_but_last": slice(None, -1), "middle": slice(1, -1)}


def snnet_stitches(
    costs: StitchCosts | Sequence[StitchCosts], *, window: int = 2, stages: Stages = "all_but_last"
) -> StitchSelection:
    """The stitches of SN-Net for one pair of anchors, or the union over several pairs (nearest anchors, by rights).

    Args:
        costs: costs of all candidates, with the stages of the blocks.
        window: number of neighbouring blocks that are joined with each other; 2 in the paper.
        stages: which stages of several are stitched: "all_but_last", or the "middle" ones (the paper's ResNets).
            A single stage always is.

    Returns:
        Rule "snnet". Stitches that cost less than the source or more than the target are kept: `outside` counts them.

    Raises:
        ValueError: a wrong option, a source dearer than the target, stages that differ, no stitch at all, or one that
            is impossible because its blocks have other spatial grids.

    Example:
        >>> [str(stitch) for stitch in snnet_stitches(costs, window=2)]  # anchors of 3 and 4 blocks
        ['(2, 3)', '(1, 2)', '(1, 1)']
    """
    if stages not in _STITCHED_STAGES:
        raise ValueError(f"got stages={stages!r}; expected one of {sorted(_STITCHED_STAGES)}")
    if window < 1:
        raise ValueError(f"got window={window}; expected at least 1")
    if not isinstance(costs, StitchCosts):
        return merge_selections([snnet_stitches(one, window=window, stages=stages) for one in costs])
    costs.check_direction()
    pairs = _pairs(costs, window, stages)
    if not pairs:
        raise ValueError(f"got no stitch with window={window} and stages={stages!r}; expected more stages or blocks")
    if wrong := [pair for pair in pairs if not costs.possible[pair[0] - 1, pair[1]]]:
        raise ValueError(
            f"got the stitches {wrong}, whose blocks have other spatial grids; expected anchors whose stages agree. "
            "Leave stages out, or choose stitches by their scores"
        )
    return _selection(costs, pairs)


def snnet_groups(
    stitches: Iterable[Stitch], costs: StitchCosts | Sequence[StitchCosts], *, window: int = 2
) -> tuple[int, ...]:
    """Which stitches share a stitching layer in SN-Net: those of one window, between anchors that are paired freely.

    Args:
        stitches: as `snnet_stitches` gives them.
        costs, window: as they were given to it.

    Returns:
        A number per stitch, for `StitchedSupernet.from_anchors(shared=…)`. A stitch of two windows is of the first.

    Raises:
        ValueError: a stitch between anchors whose costs are not given.

    Example:
        >>> equal = measure_stitch_costs(large.config, large.config)  # both of 4 blocks
        >>> stitches = snnet_stitches(equal)
        >>> len(stitches), max(snnet_groups(stitches, equal)) + 1  # stitches, stitching layers
        (10, 3)
    """
    by_pair = {(one.source, one.target): one for one in ([costs] if isinstance(costs, StitchCosts) else costs)}
    numbers: dict[tuple[int, ...], int] = {}
    found = []
    for stitch in stitches:
        pair = stitch.source, stitch.target
        place: tuple[int, ...] = (stitch.source_stop, stitch.target_start)
        if pair not in by_pair:
            raise ValueError(f"got {stitch} and the costs of the anchors {sorted(by_pair)}; expected its anchors' too")
        if _is_paired_freely(by_pair[pair]):
            place = (max(0, max(stitch.source_stop - 1, stitch.target_start) - window + 1),)
        found.append(numbers.setdefault((*pair, *place), len(numbers)))
    return tuple(found)


def _is_paired_freely(costs: StitchCosts) -> bool:
    """Anchors of one stage and equal depth."""
    m, n = costs.macs.shape
    return m == n and len(np.unique(_stage_of(costs.target_stages, n))) == 1


def _pairs(costs: StitchCosts, window: int, stages: Stages) -> list[tuple[int, int]]:
    """Every (i, j), sorted."""
    m, n = costs.macs.shape
    source, target = _stage_of(costs.source_stages, m), _stage_of(costs.target_stages, n)
    names = np.unique(target)
    if not np.array_equal(names, np.unique(source)):
        raise ValueError(
            f"got the stages {np.unique(source).tolist()} of the source and {names.tolist()} of the target; expected "
            "the same stages in both"
        )
    if _is_paired_freely(costs):
        return [(a + 1, b) for a in range(m) for b in range(n) if abs(a - b) < window]
    stitched = names if len(names) == 1 else names[_STITCHED_STAGES[stages]]
    pairs = set()
    for name in stitched:
        pairs |= _forward_pairs(np.flatnonzero(source == name), np.flatnonzero(target == name), window)
    return sorted(pairs)


def _forward_pairs(source: NDArray, target: NDArray, window: int) -> set[tuple[int, int]]:
    """Pairs of one stage, given the numbers of its blocks from 0: place a of the target feeds b, a < b < a + window."""
    depth = len(target)
    return {
        (int(source[a * len(source) // depth]) + 1, int(target[b]))
        for a in range(depth)
        for b in range(a + 1, min(a + window, depth))
    }


def _stage_of(stages: NDArray | None, blocks: int) -> NDArray:
    return np.zeros(blocks, dtype=np.int64) if stages is None else stages


def _selection(costs: StitchCosts, pairs: list[tuple[int, int]]) -> StitchSelection:
    macs = {pair: int(costs.macs[pair[0] - 1, pair[1]]) for pair in pairs}
    order = sorted(pairs, key=macs.__getitem__)
    outside = sum(not costs.source_total <= cost <= costs.target_total for cost in macs.values())
    return StitchSelection(
        "snnet",
        tuple(Stitch(*pair, costs.source, costs.target) for pair in order),
        tuple(macs[pair] for pair in order),
        (float("nan"),) * len(order),
        (-1,) * len(order),
        len(order) - outside,
        outside,
    )
