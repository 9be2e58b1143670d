"""The start of a path's stitching layers, one after the other: least squares (KLAS Sec. 5; SN-Net), or a rival's map.

Each maps what the path before it really gives, to what the next slice's anchor has there.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from klas_hf.anchors.fitting import write_fit
from klas_hf.maths.least_squares import LeastSquares, LinearFit, warn_of_few_rows
from klas_hf.maths.patches import ChannelPatch, CosineMap
from klas_hf.models import StitchedModel
from klas_hf.paths import Path
from klas_hf.processes import progress, shared_out, sum_over_processes

Joint = Literal["least_squares", "merged", "identity", "linear_patch", "cosine"]
_MAPS: dict[str, type[ChannelPatch] | type[CosineMap]] = {"linear_patch": ChannelPatch, "cosine": CosineMap}


def check_joint(joint: str, path: Path, widths: Sequence[tuple[int, int]], calibrated: bool) -> None:
    """Raise ValueError unless the joints of a path, of these widths before and behind, can be of this kind."""
    kinds = ("least_squares", "merged", "identity", *_MAPS)
    if joint not in kinds:
        raise ValueError(f"got joint={joint!r}; expected one of {kinds}")
    for (before, behind), (one, other) in zip(widths, pairwise(path.slices), strict=True):
        if joint != "least_squares" and before != behind:
            raise ValueError(
                f"got joint={joint!r} for {one} → {other} of path {path}, from {before} to {behind} features; expected "
                "as many on both sides. Use joint='least_squares'"
            )
        if joint in ("identity", "merged") and one.anchor != other.anchor:
            raise ValueError(
                f"got joint={joint!r} for {one} → {other} of path {path}, between two anchors, whose features have "
                "nothing to do with each other; expected slices of one anchor. Use joint='least_squares'"
            )
    if joint in ("merged", *_MAPS) and path.joints and not calibrated:
        raise ValueError(f"got joint={joint!r} and no calibration; expected calibration=batches, which it is found on")


def check_writers(path: Path, writers: Mapping[int, tuple[str, str | None]], expected: str) -> None:
    """Raise ValueError unless every joint of a path can be merged into the block before it.

    Args:
        path: the path.
        writers: by anchor, its model type, and which layer of a block is the last to add to the states as it is.
        expected: whose blocks have one, for the message.
    """
    for one in path.slices[:-1]:
        kind, writer = writers[one.anchor]
        if writer is None:
            raise ValueError(
                f"got joint='merged' for an anchor of type {kind!r}, whose blocks add nothing to the states as a "
                f"linear layer gives it; expected {expected}. Use joint='least_squares'"
            )


@torch.no_grad()
def fit_joints(
    model: StitchedModel,
    pairs: Callable[[int], Callable[[Any], tuple[Tensor, Tensor]]],
    calibration: Iterable[Any],
    ridge: float | None = None,
    joint: Joint = "least_squares",
) -> None:
    """Set the stitching layers of a model to maps of a kind, and note in its configuration how they fit.

    Args:
        pairs: number of a joint → what makes of a batch the rows, `(rows, width)`, that enter it, and those that are to
            leave it; asked for once per joint.
        calibration: batches; read once for every joint, so more than one joint keeps them in memory.
        ridge: penalty of least squares; None chooses (see `LeastSquares.solve`).
        joint: what the layers start from; all but least squares have no bias.

    Raises:
        ValueError: nothing to fit to, activations that are not finite, or a width that has no Hadamard matrix.
    """
    layers = model.stitching_layers()
    batches = list(calibration) if len(layers) > 1 else calibration
    fits: list[LinearFit] = []
    for number, layer in enumerate(layers):
        read = shared_out(batches) if joint != "cosine" else iter(batches)
        fits.append(_fitted(layer, pairs(number), read, ridge, joint))
        write_fit(layer, fits[-1])
    kind = {} if joint == "least_squares" else {"joint": joint}
    model.config.joint_fits = [{"r2": fit.r2, "ridge": fit.ridge, "rows": fit.rows} | kind for fit in fits]
    if joint == "least_squares":
        seen = [(fit.rows, layer.weight.shape[1]) for fit, layer in zip(fits, layers, strict=True)]
        warn_of_few_rows(*min(seen, key=lambda pair: pair[0] / pair[1]))


@torch.no_grad()
def merge_joints(
    model: StitchedModel,
    writers: Sequence[nn.Module],
    parts: Callable[[int], Callable[[Any], tuple[Tensor, Tensor, Tensor]]],
    calibration: Iterable[Any],
    ridge: float | None = None,
) -> None:
    """Merge least squares into the layers that write last before each cut, so that nothing is left at the joints.

    Of a state s = r + m, with m what the layer writes, T m + r is brought near to the state wanted, and T goes into
    the layer's weight (ReplaceMe, arXiv 2505.02819, Eq. 6); with a bias where the layer has one. What is fitted is
    T − 1, so that a ridge, and rows that say nothing of a direction, leave the layer as it is.

    Args:
        writers: of every joint, the linear layer before it; on a device.
        parts: number of a joint → what makes of a batch the rows, `(rows, width)`, of the states before the cut, of
            what the layer wrote of them, and of the states wanted; asked for once per joint.
        calibration, ridge: as for `fit_joints`.

    Raises:
        ValueError: a writer that is offloaded; as `fit_joints`.
    """
    if any(writer.weight.is_meta for writer in writers):
        raise ValueError("got joint='merged' and slices that are offloaded; expected all on devices. Merge first")
    batches = list(calibration) if len(writers) > 1 else calibration
    fits: list[LinearFit] = []
    for number, writer in enumerate(writers):
        rows_of, width = parts(number), len(writer.weight)
        equations = LeastSquares(width, width, writer.weight.device, bias=writer.bias is not None)
        for batch in progress(shared_out(batches), "calibrating a joint to be merged"):
            state, written, wanted = rows_of(batch)
            equations.update(written, wanted.to(state.device).double() - state.double())
        equations.combine(sum_over_processes)
        fit = equations.solve(ridge)
        weight = fit.weight.to(writer.weight.device)
        weight += torch.eye(width).to(weight)
        if writer.bias is not None:
            writer.bias.copy_(weight @ writer.bias.double() + fit.bias.to(weight))
        writer.weight.copy_(weight @ writer.weight.double())
        fits.append(fit)
    model.config.joint_fits = [{"r2": one.r2, "ridge": one.ridge, "rows": one.rows, "joint": "merged"} for one in fits]
    warn_of_few_rows(*min(((one.rows, len(one.weight)) for one in fits), key=lambda pair: pair[0] / pair[1]))


def _fitted(
    layer: nn.Module, pair: Callable[[Any], tuple[Tensor, Tensor]], batches: Iterator[Any], ridge: float | None,
    joint: Joint,
) -> LinearFit:  # fmt: skip
    """The map of one layer."""
    out, into = layer.weight.shape[:2]
    equations: LeastSquares | None = None
    found = _MAPS[joint](into) if joint in _MAPS else None
    for batch in progress(batches, "calibrating the stitching layer"):
        x, y = pair(batch)
        equations = equations or LeastSquares(into, out, x.device)
        equations.update(x, y.to(x.device))
        if found is not None:
            positions = len(x) // max(1, len(batch.unit_items))  # of a unit: those of an image are many
            found.update(x, y, batch.unit_items.repeat_interleave(positions))
    equations = equations or LeastSquares(into, out, torch.device("cpu"))  # other processes have read all there is
    if joint != "cosine":  # of which each process has read everything
        equations.combine(sum_over_processes)
    if found is None:
        return equations.solve(ridge)
    weight = found.solve(sum_over_processes).to(equations.equations().gram)
    return equations.equations().fit_of(weight, weight.new_zeros(out))
