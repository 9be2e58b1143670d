"""Figures from plain numbers: heatmaps of scores and trade-off curves, as PNG and SVG.

Nothing here knows of models. matplotlib is the extra `plot`, loaded when a figure is drawn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Series:
    """One line of a trade-off plot.

    Attributes:
        label: name in the legend.
        x, y: coordinates of the points.
        error: half-length of each error bar, or None.
        line: whether the points are joined.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None
    line: bool = True


def heatmaps(panels: Mapping[str, NDArray], xlabel: str, ylabel: str, path: str | Path | None = None) -> "Figure":
    """Heatmaps side by side, rows and columns counted from 1; dark is low; the lowest cell carries a cross.

    Args:
        panels: title → `(m, n)` values; nans stay blank.
        path: where to write, with or without an ending: PNG and SVG are both written.
    """
    figure = _figure(width=1.0 + 4.6 * len(panels), height=3.6)
    for axes, (title, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        m, n = values.shape
        positive = np.where(values > 0, values, np.nan)
        image = axes.imshow(
            positive,
            norm=_norm(positive),
            cmap="viridis",
            origin="lower",
            aspect="auto",
            extent=(0.5, n + 0.5, 0.5, m + 0.5),
        )
        row, column = np.unravel_index(np.nanargmin(values), values.shape)
        axes.plot(column + 1, row + 1, "x", color="red", markersize=9, markeredgewidth=2)
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axes)
    return _write(figure, path)


def tradeoff(
    series: Sequence[Series], xlabel: str, ylabel: str, title: str = "", path: str | Path | None = None
) -> "Figure":
    """Quality against cost, one line or point set per series."""
    figure = _figure(width=6.4, height=4.2)
    axes = figure.subplots()
    for index, one in enumerate(series):
        axes.errorbar(
            one.x,
            one.y,
            yerr=one.error,
            label=one.label,
            marker="os^Dvp"[index % 6],
            linestyle="-" if one.line else "none",
            markersize=5,
            linewidth=1.3,
            capsize=3,
        )
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend()
    return _write(figure, path)


def _norm(values: NDArray) -> str:
    """A logarithmic colour scale where values span more than a factor of ten; it has too few ticks for less."""
    return "log" if np.nanmax(values) > 10 * np.nanmin(values) else "linear"


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "klas_hf[plot]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def _write(figure: "Figure", path: str | Path | None) -> "Figure":
    if path is not None:
        stem = Path(path).with_suffix("") if Path(path).suffix in (".png", ".svg") else Path(path)
        stem.parent.mkdir(parents=True, exist_ok=True)
        for suffix in (".png", ".svg"):
            figure.savefig(stem.with_name(stem.name + suffix), dpi=130)
    return figure
