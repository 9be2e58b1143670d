"""The least-squares start of a path's stitching layers (KLAS Sec. 5; SN-Net), one after the other.

Each maps what the path before it really gives, to what the next slice's anchor has there.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from klas_hf.anchors.fitting import write_fit
from klas_hf.maths.least_squares import LeastSquares, LinearFit, warn_of_few_rows
from klas_hf.models import StitchedModel
from klas_hf.processes import progress, shared_out, sum_over_processes


@torch.no_grad()
def fit_joints(
    model: StitchedModel,
    entering: Callable[[int, Any], Tensor],
    wanted: Callable[[int], Callable[[Any], Tensor]],
    calibration: Iterable[Any],
    ridge: float | None = None,
) -> None:
    """Set the stitching layers of a model to least-squares maps, and note in its configuration how they fit.

    Args:
        entering: number of a joint, and a batch → `(rows, width)` that enter it, where the batch counts.
        wanted: number of a joint → what makes of a batch the rows that are to leave it; asked for once per joint.
        calibration: batches; read once for every joint, so more than one joint keeps them in memory.
        ridge: penalty of the fits; None chooses (see `LeastSquares.solve`).

    Raises:
        ValueError: nothing to fit to, or activations that are not finite.
    """
    layers = model.stitching_layers()
    batches = list(calibration) if len(layers) > 1 else calibration
    fits: list[LinearFit] = []
    for number, layer in enumerate(layers):
        target = wanted(number)
        out, into = layer.weight.shape[:2]
        equations: LeastSquares | None = None
        for batch in progress(shared_out(batches), "calibrating the stitching layer"):
            x, y = entering(number, batch), target(batch)
            equations = equations or LeastSquares(into, out, x.device)
            equations.update(x, y.to(x.device))
        equations = equations or LeastSquares(into, out, torch.device("cpu"))  # other processes have read all there is
        equations.combine(sum_over_processes)
        fits.append(equations.solve(ridge))
        write_fit(layer, fits[-1])
    model.config.joint_fits = [{"r2": fit.r2, "ridge": fit.ridge, "rows": fit.rows} for fit in fits]
    seen = [(fit.rows, layer.weight.shape[1]) for fit, layer in zip(fits, layers, strict=True)]
    warn_of_few_rows(*min(seen, key=lambda pair: pair[0] / pair[1]))
