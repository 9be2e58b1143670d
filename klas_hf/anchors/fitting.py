"""Least-squares maps between the states of anchors: what stitching layers start from (KLAS Sec. 5; SN-Net).

One pass over the calibration data gives the normal equations of every stitch; stitches that share a layer add theirs
up, so that the layer is the least-squares map of all of them together.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from klas_hf.anchors.anchor import Anchor
from klas_hf.anchors.streaming import Gathered, stream
from klas_hf.anchors.weights import offloading
from klas_hf.maths.least_squares import LinearFit
from klas_hf.maths.similarities import PairMoments
from klas_hf.paths import Stitch
from klas_hf.processes import sum_over_processes


class StitchMoments(Gathered):
    """Second moments of the states that stitches lead from and to.

    Args:
        anchors: as the stitches count them.
        stitches: between any of them.
    """

    def __init__(self, anchors: Sequence[Anchor], stitches: Iterable[Stitch]):
        self.anchors = anchors
        pairs: dict[tuple[int, int], set[tuple[int, int]]] = {}
        for stitch in stitches:
            pairs.setdefault((stitch.source, stitch.target), set()).add((stitch.source_stop, stitch.target_start))
        self.moments = {
            (one, other): PairMoments(
                sorted(ends), anchors[one].widths, anchors[other].widths, anchors[one].device
            )
            for (one, other), ends in sorted(pairs.items())
        }  # fmt: skip
        self.stops: dict[int, int] = {}
        for (one, other), ends in pairs.items():
            self.stops[one] = max(self.stops.get(one, 0), *(stop for stop, _ in ends))
            self.stops[other] = max(self.stops.get(other, 0), *(start for _, start in ends))

    def update(self, states: Sequence[list[Any]], batch: Any) -> None:
        for (one, other), sums in self.moments.items():
            first, last = self.anchors[one], self.anchors[other]
            source = [first.rows(state, batch, last).to(first.device) for state in states[one]]
            sums.update(source, [last.rows(state, batch).to(first.device) for state in states[other]])

    def combine(self) -> None:
        for sums in self.moments.values():
            sums.combine(sum_over_processes)

    def fit(self, stitches: Sequence[Stitch], ridge: float | None) -> LinearFit:
        """The one map that serves some stitches between two anchors best."""
        sums = self.moments[stitches[0].source, stitches[0].target]
        return sums.merged([(one.source_stop, one.target_start) for one in stitches], ridge)


def fit_stitches(
    anchors: Sequence[Anchor],
    groups: Sequence[Sequence[Stitch]],
    calibration: Iterable[Any],
    ridge: float | None = None,
    description: str = "calibrating the stitching layers",
    dtype: torch.dtype | None = None,
) -> list[LinearFit]:
    """The least-squares map of every group of stitches, from one pass over the data.

    Args:
        anchors: as the stitches count them; none runs further than is needed.
        groups: each shares one layer.
        calibration: batches; padding and BOS of text are left out.
        ridge: penalty; None chooses (see `LeastSquares.solve`).
        dtype: of the maps; None leaves them in float64, in which many fill the memory.

    Raises:
        ValueError: no data, or activations that are not finite.
    """
    moments = StitchMoments(anchors, [stitch for group in groups for stitch in group])
    if not stream(anchors, anchors[0].read(calibration), [moments], description, moments.stops):
        raise ValueError("got no data to calibrate on; expected batches. Check that an iterator was not used up before")
    fits: dict[int, LinearFit] = {}
    for place in sorted(range(len(groups)), key=lambda place: groups[place][0]):  # those of a source block together
        fit = moments.fit(groups[place], ridge)
        fits[place] = replace(fit, weight=fit.weight.to(dtype), bias=fit.bias.to(dtype))
    return [fits[place] for place in range(len(groups))]


@torch.no_grad()
def write_fit(layer: nn.Module, fit: LinearFit) -> None:
    """Put a fit into a linear layer or 1×1 convolution, wherever its parameters are."""
    _write(layer, "weight", fit.weight.reshape(layer.weight.shape))
    if layer.bias is not None:
        _write(layer, "bias", fit.bias)


def linear(joint: nn.Module) -> nn.Module:
    """The linear layer or convolution within a stitching layer."""
    return joint if isinstance(joint, nn.Linear) else joint.projection


def fitted_joint(first: Anchor, stop: int, last: Anchor, start: int, fit: LinearFit) -> nn.Module:
    """A stitching layer of this fit between two anchors, on the second's device and in its dtype."""
    with torch.device("meta"):  # no random weights are drawn
        joint = first.joint(stop, last, start)
    joint.to_empty(device=last.device).to(last.model.dtype)
    write_fit(linear(joint), fit)
    return joint


def _write(module: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter in its own dtype, also where accelerate has offloaded it to memory or disk."""
    parameter = module.get_parameter(name)
    if not parameter.is_meta:
        parameter.copy_(value)
        return
    hook: Any = offloading(module)
    weights = hook.weights_map
    weights.dataset.state_dict[f"{weights.prefix}{name}"] = value.to(device="cpu", dtype=parameter.dtype)
