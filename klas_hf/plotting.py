"""Figures from plain numbers: heatmaps of scores, trade-off curves and other lines, as PNG and SVG.

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
    """One line of a plot.

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


def heatmaps(
    panels: Mapping[str, NDArray],
    xlabel: str,
    ylabel: str,
    path: str | Path | None = None,
    *,
    names: tuple[Sequence[str], Sequence[str]] | None = None,
    marks: Sequence[tuple[int, int]] | None = None,
) -> "Figure":
    """Heatmaps side by side; dark is low.

    Args:
        panels: title → `(m, n)` values; nans stay blank.
        path: where to write, with or without an ending: PNG and SVG are both written.
        names: of the rows and of the columns; None counts them from 1.
        marks: cells (row, column), from 0, that carry a cross; None marks the lowest cell of each panel.
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
        for row, column in [np.unravel_index(np.nanargmin(values), values.shape)] if marks is None else marks:
            axes.plot(column + 1, row + 1, "x", color="red", markersize=9, markeredgewidth=2)
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        for axis, labels in zip((axes.yaxis, axes.xaxis), names or (None, None), strict=True):
            if labels is None:
                axis.get_major_locator().set_params(integer=True)
            else:
                axis.set_ticks(range(1, len(labels) + 1), labels)
        figure.colorbar(image, ax=axes)
    return _write(figure, path)


def lines(
    series: Sequence[Series],
    xlabel: str,
    ylabel: str,
    title: str,
    path: str | Path | None = None,
    *,
    integer_x: bool = False,
    log_x: bool = False,
    x_names: Sequence[str] | None = None,
) -> "Figure":
    """One line or point set per series.

    Args:
        integer_x: ticks at whole numbers only.
        log_x: a logarithmic axis.
        x_names: what stands at 0, 1, … in place of the numbers.
    """
    beside = len(series) > 5  # anywhere else the legend would cover points
    figure = _figure(width=8.4 if beside else 6.4, height=4.2)
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
    if log_x:
        from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep="\N{THIN SPACE}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    if integer_x:
        axes.locator_params(axis="x", integer=True)
    if x_names is not None:
        axes.set_xticks(range(len(x_names)), x_names)
    axes.grid(alpha=0.3)
    (figure.legend(loc="outside right upper") if beside else axes.legend())
    return _write(figure, path)


def probe_accuracy(accuracies: Mapping[str, Sequence[float]], path: str | Path | None = None) -> "Figure":
    """Accuracy of the probe after each block, one line per anchor (KLAS Fig. 3): name → accuracies from block 1 on."""
    series = [Series(name, range(1, len(values) + 1), values) for name, values in accuracies.items()]
    title = "what each block already knows of the class"
    return lines(series, "block", "probe accuracy", title, path, integer_x=True)


def pictures(
    columns: Mapping[str, Sequence[NDArray]], names: Sequence[str], path: str | Path | None = None
) -> "Figure":
    """Images and masks of classes side by side, a row per image, with a legend of the classes.

    Args:
        columns: title → images `(height, width, 3)`, uint8, or masks `(height, width)` of class numbers; numbers that
            have no name stay white.
        names: of the classes; those that are in no mask are not in the legend.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    rows = max(map(len, columns.values()))
    height, width = next(iter(columns.values()))[0].shape[:2]
    figure = _figure(width=2.2 * len(columns), height=2.2 * rows * height / width + 1.0)
    masks = [one for shown in columns.values() for one in shown if one.ndim == 2]
    seen = sorted({int(number) for mask in masks for number in np.unique(mask) if number < len(names)})
    palette = colormaps["tab20" if len(seen) <= 20 else "turbo"].resampled(max(20, len(seen)))
    colours = np.ones((len(names) + 1, 3))
    colours[seen] = palette(range(len(seen)))[:, :3]
    for across, (title, shown) in enumerate(columns.items()):
        for down, one in enumerate(shown):
            axes = figure.add_subplot(rows, len(columns), down * len(columns) + across + 1)
            axes.imshow(one if one.ndim == 3 else colours[np.minimum(one, len(names))])
            axes.set_axis_off()
            if not down:
                axes.set_title(title, fontsize=7)
    patches = [Patch(color=tuple(colours[number]), label=names[number]) for number in seen]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(seen), 11), fontsize=7)
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
