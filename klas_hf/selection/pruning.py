"""The rivals that prune one anchor: rules that choose which of its blocks to leave out, and what joins the rest.

    rule                 leaves out                                                 joins by
    tail_paths           the last blocks (Lu et al., arXiv 2411.15558)              nothing
    uniform_paths        evenly spaced blocks                                       nothing
    shortgpt_paths       the blocks of least influence (arXiv 2403.03853)           nothing
    gromov_paths         the run of least angular distance (arXiv 2403.17887)       nothing
    replaceme_paths      the run of least cosine distance (arXiv 2505.02819)        a linear map
    linear_patch_paths   the same, but never the last block (arXiv 2505.24680)      a Hadamard patch

All of them keep the first block, with which a path begins, and blocks that change width or grid, which nothing but
themselves can stand for. Means are over the positions that count in fits: the papers' code takes BOS and padding in.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path as File
from typing import Any, Literal

from torch import Tensor

from klas_hf.anchors.language import anchor_config
from klas_hf.anchors.loading import load_anchors
from klas_hf.costs import PathCosts, measure_path_costs
from klas_hf.paths import Path, Slice
from klas_hf.selection.block_distances import Run, angular_distance, cosine_distance, run_distances
from klas_hf.selection.choice import PathSelection


def tail_paths(
    anchor: Any, *, shares: Sequence[float] | None = None, final: int = 0, tokens: int = 128, place: int = 0
) -> PathSelection:
    """Leave out the last blocks: "reverse-order" pruning (Lu et al., arXiv 2411.15558).

    Args:
        anchor: Hub id, folder, model or `Anchor`; its weights are not read.
        shares: of the anchor's MACs, each of which the dearest path within it is chosen for; None: a path for every
            number of blocks that can be left out.
        final: how many blocks at the end stay: none in that paper, 1 in the simple rule of Gromov et al.
            (arXiv 2403.17887).
        tokens: sequence length that a language model's costs are counted for.
        place: position that the paths name the anchor by.

    Returns:
        Rule "tail", or "tail_but_1" for `final=1`; cheapest first, without values.

    Raises:
        ValueError: a negative `final`, a share that no path reaches, or an anchor of which nothing can be left out.

    Example:
        >>> pruned = tail_paths(target, shares=[0.6, 0.8])  # an anchor of 4 blocks
        >>> [str(path) for path in pruned], pruned.joint
        (['0[:2] 0[4:]', '0[:3] 0[4:]'], 'identity')
        >>> model = StitchedModel.from_path([target], pruned[0], joint=pruned.joint)
        >>> [str(path) for path in tail_paths(target, final=1)]
        ['0[:1] 0[3:]', '0[:2] 0[3:]']
    """
    if final < 0:
        raise ValueError(f"got final={final}; expected 0 or more")
    costs = _costs(anchor, tokens)
    stop = len(costs.anchors[0].block_macs) - final
    runs = [run for run in _runs(costs) if run[1] == stop]
    found = {_without(range(*run), costs): float("nan") for run in runs}
    return _selected("tail" if not final else f"tail_but_{final}", "identity", found, costs, shares, place)


def uniform_paths(
    anchor: Any, *, shares: Sequence[float] | None = None, tokens: int = 128, place: int = 0
) -> PathSelection:
    """Leave out blocks that are evenly spaced between the first and the last, which stay.

    Args:
        anchor, shares, tokens, place: as for `tail_paths`.

    Returns:
        Rule "uniform", cheapest first, without values.

    Raises:
        ValueError: as for `tail_paths`.

    Example:
        >>> [str(path) for path in uniform_paths(target)]  # an anchor of 4 blocks
        ['0[:1] 0[3:]', '0[:2] 0[3:]']
    """
    costs = _costs(anchor, tokens)
    free = [block for block in _removable(costs) if block + 1 < len(costs.anchors[0].block_macs)]
    found = {}
    for count in range(1, len(free) + 1):  # the middles of `count` equal parts
        chosen = [free[(2 * number + 1) * len(free) // (2 * count)] for number in range(count)]
        found[_without(chosen, costs)] = float("nan")
    return _selected("uniform", "identity", found, costs, shares, place)


def shortgpt_paths(
    anchor: Any, data: Iterable[Any], *, shares: Sequence[float] | None = None, tokens: int = 128, place: int = 0
) -> PathSelection:
    """Leave out the blocks of least influence, 1 − cos of what enters and what leaves them (ShortGPT).

    Source: Men et al., arXiv 2403.03853. Influences are measured once, on the whole anchor.

    Args:
        anchor, shares, tokens, place: as for `tail_paths`; the anchor's weights are read.
        data: batches of token ids or images.

    Returns:
        Rule "shortgpt", cheapest first; `values` are the sums of the influences of the blocks left out.

    Raises:
        ValueError: as for `tail_paths`; no data.

    Example:
        >>> pruned = shortgpt_paths(target, batches)
        >>> [path.depth([4]) for path in pruned], pruned.joint
        ([1, 2, 3], 'identity')
    """
    costs, (loaded,) = _costs(anchor, tokens), load_anchors([anchor])
    runs = [(block, block + 1) for block in _removable(costs)]
    influence = run_distances(loaded, data, runs, cosine_distance)
    order = sorted(runs, key=lambda run: influence[run])
    found = {}
    for count in range(1, len(order) + 1):
        gone = order[:count]
        found[_without([block for block, _ in gone], costs)] = sum(influence[run] for run in gone)
    return _selected("shortgpt", "identity", found, costs, shares, place)


def gromov_paths(
    anchor: Any, data: Iterable[Any], *, shares: Sequence[float] | None = None, tokens: int = 128, place: int = 0
) -> PathSelection:
    """Leave out the run of blocks, of each length, over which the last token turns least.

    Source: Gromov et al., "The unreasonable ineffectiveness of the deeper layers", arXiv 2403.17887: the angular
    distance arccos(cos) / π between the states before and after the run. Of images, it is that of the pooled features.

    Args:
        anchor, data, shares, tokens, place: as for `shortgpt_paths`.

    Returns:
        Rule "gromov", cheapest first; `values` are mean angular distances, 0 to 1.

    Raises:
        ValueError: as for `shortgpt_paths`.

    Example:
        >>> pruned = gromov_paths(target, batches)
        >>> {path.joints for path in pruned}, all(0 <= value <= 1 for value in pruned.values)
        ({1}, True)
    """
    return _run_paths("gromov", "identity", anchor, data, shares, tokens, place, angular_distance, last=True)


def replaceme_paths(
    anchor: Any,
    data: Iterable[Any],
    *,
    objective: Literal["least_squares", "cosine"] = "least_squares",
    shares: Sequence[float] | None = None,
    tokens: int = 128,
    place: int = 0,
) -> PathSelection:
    """Replace the run of blocks, of each length, whose ends are nearest in direction, by a linear map.

    Source: ReplaceMe (Shopkhoev et al., arXiv 2505.02819). Least squares are merged into the MLP before the cut, as
    there, where the anchor's blocks allow it; elsewhere, and by the cosine, the map is a joint of the whole state.

    Args:
        anchor, data, shares, tokens, place: as for `shortgpt_paths`.
        objective: what the map is fitted by, least squares or the cosine.

    Returns:
        Rule "replaceme_least_squares" or "replaceme_cosine", cheapest first, the MACs of a joint included; `values`
        are mean cosine distances between the ends.

    Raises:
        ValueError: as for `shortgpt_paths`; an unknown objective.

    Example:
        >>> pruned = replaceme_paths(target, batches, objective="cosine")
        >>> model = StitchedModel.from_path([target], pruned[0], joint=pruned.joint, calibration=batches)
        >>> pruned.rule, pruned.joint, pruned.macs[0] == measure_costs(model).macs
        ('replaceme_cosine', 'cosine', True)
    """
    if objective not in ("least_squares", "cosine"):
        raise ValueError(f"got objective={objective!r}; expected 'least_squares' or 'cosine'")
    merges = objective == "least_squares" and _costs(anchor, tokens).anchors[0].merges
    joint = "merged" if merges else objective
    return _run_paths(f"replaceme_{objective}", joint, anchor, data, shares, tokens, place, cosine_distance)


def linear_patch_paths(
    anchor: Any, data: Iterable[Any], *, shares: Sequence[float] | None = None, tokens: int = 128, place: int = 0
) -> PathSelection:
    """Replace the run of blocks, of each length, whose ends are nearest in direction, by LinearPatch's map.

    Source: Chen et al., arXiv 2505.24680, and its code, in which the last block always stays. The patch is
    `klas_hf.maths.patches.ChannelPatch`.

    Args:
        anchor, data, shares, tokens, place: as for `shortgpt_paths`.

    Returns:
        Rule "linear_patch", cheapest first, the joint's MACs included; `values` are mean cosine distances.

    Raises:
        ValueError: as for `shortgpt_paths`.

    Example:
        >>> pruned = linear_patch_paths(target, batches)
        >>> model = StitchedModel.from_path([target], pruned[0], joint=pruned.joint, calibration=batches)
        >>> [path.slices[-1].start < 4 for path in pruned]
        [True, True]
    """
    return _run_paths("linear_patch", "linear_patch", anchor, data, shares, tokens, place, cosine_distance, final=1)


def _run_paths(
    rule: str, joint: str, anchor: Any, data: Iterable[Any], shares: Sequence[float] | None, tokens: int, place: int,
    measure: Callable[[Tensor], Tensor], *, last: bool = False, final: int = 0,
) -> PathSelection:  # fmt: skip
    """The nearest run of each length that leaves `final` blocks at the end."""
    costs, (loaded,) = _costs(anchor, tokens), load_anchors([anchor])
    runs = [run for run in _runs(costs) if run[1] <= loaded.num_blocks - final]
    distances = run_distances(loaded, data, runs, measure, last=last)
    best: dict[int, Run] = {}
    for start, stop in runs:
        rival = best.setdefault(stop - start, (start, stop))
        if distances[start, stop] < distances[rival]:
            best[stop - start] = start, stop
    found = {_without(range(*run), costs): distances[run] for run in best.values()}
    return _selected(rule, joint, found, costs, shares, place)


def _costs(anchor: Any, tokens: int) -> PathCosts:
    config = anchor_config(anchor) if isinstance(anchor, str | File) else anchor.config
    return measure_path_costs([config], tokens=tokens)


def _runs(costs: PathCosts) -> list[Run]:
    """Blocks that can be left out together: states before and after them are of one width and grid."""
    parts = costs.anchors[0]
    ends = list(zip(parts.widths, parts.positions, strict=True))
    return [(i, j) for i, j in combinations(range(len(ends)), 2) if i and ends[i] == ends[j]]


def _removable(costs: PathCosts) -> list[int]:
    """Blocks that can be left out alone."""
    return [start for start, stop in _runs(costs) if stop == start + 1]


def _without(gone: Iterable[int], costs: PathCosts) -> Path:
    """The path through all other blocks."""
    depth, left_out = len(costs.anchors[0].block_macs), set(gone)
    slices: list[Slice] = []
    start = 0
    for block in [*sorted(left_out), depth]:
        if start < block:
            slices.append(Slice(0, start, block))
        start = block + 1
    last = Slice(0, slices.pop().start) if slices[-1].stop == depth else Slice(0, depth)
    return Path((*slices, last))


def _selected(
    rule: str, joint: str, found: Mapping[Path, float], costs: PathCosts, shares: Sequence[float] | None, place: int
) -> PathSelection:
    """The paths that cost less than the anchor, cheapest first; with shares, the dearest within each."""
    whole = costs.anchors[0].total_macs
    macs = {path: costs.of(path, identity=joint in ("identity", "merged")).macs for path in found}
    order = sorted((path for path in found if macs[path] < whole), key=lambda path: macs[path])
    if not order:
        raise ValueError(
            f"got an anchor of {len(costs.anchors[0].block_macs)} blocks, of which {rule} can leave out none; expected "
            "blocks after the first that lead from one width and grid to the same"
        )
    if shares is not None:
        within = [[path for path in order if macs[path] <= share * whole] for share in shares]
        if not all(within):
            raise ValueError(
                f"got shares={list(shares)}; expected at least {macs[order[0]] / whole:.3f} of the anchor's MACs, the "
                f"least that {rule} reaches"
            )
        order = sorted({paths[-1] for paths in within}, key=lambda path: macs[path])
    paths = tuple(Path(tuple(Slice(place, one.start, one.stop) for one in path.slices)) for path in order)
    chosen, values = tuple(macs[path] for path in order), tuple(found[path] for path in order)
    return PathSelection(paths, chosen, values, rule, joint)
