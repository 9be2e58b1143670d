"""The stitching layers of a supernet: which paths may have them, which share one, and their least-squares start.

One pass over the calibration data serves the first joints of all paths, one more every joint behind: it maps what its
path really gives.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedConfig

from klas_hf.anchors.anchor import Anchor, check_anchors
from klas_hf.anchors.fitting import fit_stitches, linear, write_fit
from klas_hf.anchors.weights import evaluating
from klas_hf.costs import PathCosts, Usage, measure_path_costs
from klas_hf.maths.least_squares import LeastSquares, LinearFit
from klas_hf.models.configuration_supernet import StitchedSupernetConfig
from klas_hf.paths import Path, Stitch
from klas_hf.processes import progress, shared_out, sum_over_processes


def costs_of(config: StitchedSupernetConfig, usage: Usage | None = None) -> PathCosts:
    """Costs of every path through a supernet's anchors."""
    size = None if config.image_size is None else (config.image_size[0], config.image_size[1])
    return measure_path_costs(config.anchor_configs, image_size=size, tokens=config.tokens, usage=usage)


def check_paths(anchors: Sequence[Anchor], paths: Sequence[Path]) -> None:
    """Raise ValueError unless there are paths within the anchors, each once."""
    if not paths:
        raise ValueError("got no paths; expected at least one. Pass a selection, such as select_stitches gives")
    if repeated := [path for path in paths if paths.count(path) > 1]:
        raise ValueError(f"got path {repeated[0]} more than once; expected each one once")
    for path in paths:
        path.bounds([one.num_blocks for one in anchors])
    check_anchors(anchors, least=1)


def check_directions(costs: PathCosts, chosen: Iterable[Any]) -> None:
    """Raise ValueError where a `Stitch` leads from a dearer anchor to a cheaper one; a path may, as the search's do."""
    for one in chosen:
        if isinstance(one, Path | str):
            continue
        stitch = Stitch.of(one)
        source, target = (costs.anchors[place].total_macs for place in (stitch.source, stitch.target))
        if source > target:
            raise ValueError(
                f"got the stitch {stitch} from a source of {source:,} MACs to a target of {target:,}: reversed; "
                "expected the cheaper anchor as the source. Swap source and target, or name the path, "
                f"{str(Path.of(stitch))!r}"
            )


def features_per_row(anchors: Sequence[Anchor]) -> Callable[[Any], float]:
    """Of a batch: features of the widest state over the rows that an item has there."""

    def of(batch: Any) -> float:
        units = len(batch.unit_items) / max(1, len(batch))
        return max(
            width / max(1.0, height * across or units)
            for anchor in anchors
            for width, (height, across, _) in zip(anchor.widths, anchor.grids(batch), strict=True)
        )

    return of


def shared_layers(anchors: Sequence[Anchor], paths: Sequence[Path], shared: Sequence[int] | None) -> list[list[int]]:
    """The stitching layers of every path, by number."""
    if shared is None:
        numbers = iter(range(sum(path.joints for path in paths)))
        return [[next(numbers) for _ in range(path.joints)] for path in paths]
    if len(shared) != len(paths) or any(path.joints != 1 for path in paths):
        raise ValueError(
            f"got {len(shared)} numbers in shared for {len(paths)} paths; expected one per path of one joint"
        )
    order = {number: place for place, number in enumerate(dict.fromkeys(shared))}
    ends: dict[int, tuple[int, ...]] = {}
    for path, number in zip(paths, shared, strict=True):
        one, other = path.slices
        widths = anchors[one.anchor].widths[one.stop or 0], anchors[other.anchor].widths[other.start]
        end = (one.anchor, other.anchor, *widths)
        if ends.setdefault(number, end) != end:
            raise ValueError(
                f"got path {path} sharing a layer with paths between other anchors or widths ({ends[number]} and "
                f"{end}: source, target, widths); expected equal ones"
            )
    return [[order[number]] for number in shared]


def fit_supernet(supernet: Any, anchors: Sequence[Anchor], calibration: Iterable[Any], ridge: float | None) -> None:
    """Set all stitching layers to least-squares maps, the first of each path first."""
    joint_of = supernet.config.joint_of
    most = max((path.joints for path in supernet.numbers), default=0)
    batches = list(calibration) if most > 1 else calibration
    groups: dict[int, list[Stitch]] = {}
    for path, number in supernet.numbers.items():
        for one, other in pairwise(path.slices[:2]):
            stitch = Stitch(one.stop or 0, other.start, one.anchor, other.anchor)
            groups.setdefault(joint_of[number][0], []).append(stitch)
    found: dict[int, LinearFit] = {}
    if groups:
        found = dict(zip(groups, fit_stitches(anchors, list(groups.values()), batches, ridge), strict=True))
    for layer, fit in found.items():
        write_fit(linear(supernet.joints[layer]), fit)
    for joints in range(1, most):
        found |= _fit_behind(supernet, joints, batches, ridge)
    supernet.config.joint_fits = [
        {"r2": found[layer].r2, "ridge": found[layer].ridge, "rows": found[layer].rows} for layer in sorted(found)
    ]


@torch.no_grad()
def _fit_behind(supernet: Any, joints: int, batches: Iterable[Any], ridge: float | None) -> dict[int, LinearFit]:
    """Fit the joint of every path that stands behind so many others, in one pass."""
    sums: dict[int, LeastSquares] = {}
    paths = {path: number for path, number in supernet.numbers.items() if path.joints > joints}
    stops: dict[int, int] = {}
    for path in paths:
        bounds = supernet.bounds(path)
        for place, needed in ((bounds[0][0], bounds[0][2]), bounds[joints + 1][:2]):
            stops[place] = max(needed, stops.get(place, 0))
    with evaluating(supernet):
        for batch in progress(shared_out(supernet.read_anchors[0].read(batches)), f"calibrating joint {joints + 1}"):
            states = {place: supernet.anchor(place).states(batch, stop) for place, stop in stops.items()}
            for path, number in paths.items():
                (first, _, stop), *_ = bounds = supernet.bounds(path)
                place, start, _ = bounds[joints + 1]
                one, other = supernet.anchor(bounds[joints][0]), supernet.anchor(place)
                x = one.rows(supernet.behind(path, states[first][stop], batch.inputs, joints), batch, other)
                y = other.rows(states[place][start], batch)
                layer = supernet.config.joint_of[number][joints]
                sums.setdefault(layer, LeastSquares(x.shape[1], y.shape[1], x.device)).update(x, y)
    found = {}
    for number in paths.values():
        layer = supernet.config.joint_of[number][joints]
        out, into = linear(supernet.joints[layer]).weight.shape[:2]
        equations = sums.get(layer) or LeastSquares(into, out, supernet.device)  # other processes have read all
        equations.combine(sum_over_processes)
        found[layer] = equations.solve(ridge)
        write_fit(linear(supernet.joints[layer]), found[layer])
    return found


def note_origin(config: PreTrainedConfig, supernet: Any, path: Path) -> None:
    """Write into a stitched model's configuration where its anchors and joints come from, and its training."""
    given = supernet.config
    config.training = copy.deepcopy(given.training)
    if given.anchor_names:
        config.anchor_names, config.anchor_revisions = list(given.anchor_names), list(given.anchor_revisions)
    if given.joint_fits and path.joints:
        config.joint_fits = [given.joint_fits[n] for n in given.joint_of[supernet.numbers[path]]]
