"""Curves and heatmaps as SVG inside a page: no script, no picture file; the page's style gives the colours."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from klas_hf.plotting import Series

WIDTH, HEIGHT = 480, 330
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 54
COLOURS = 8  # classes c0, c1, … of the page's style
Array = NDArray[np.float64]


def svg_lines(series: Sequence[Series], xlabel: str, ylabel: str) -> str:
    """Series as lines with points, each point with its values as a tooltip, and a legend below.

    Args:
        series: at least one, of finite numbers.
        xlabel, ylabel: of the axes.
    """
    xs, ys = ([value for one in series for value in getattr(one, axis)] for axis in ("x", "y"))
    x_axis, y_axis = (_axis(min(values), max(values)) for values in (xs, ys))
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [_head(HEIGHT, xlabel, ylabel)]
    for place, x in ((_x(one, x_axis), one) for one in x_axis):
        parts.append(f'<line class="grid" x1="{place}" x2="{place}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(_text("tick", place, bottom + 20, "middle", f"{x:g}"))
    for place, y in ((_y(one, y_axis), one) for one in y_axis):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{place}" y2="{place}"/>')
        parts.append(_text("tick", LEFT - 8, place + 5, "end", f"{y:g}"))
    parts.append(_text("label", (LEFT + right) / 2, HEIGHT - 10, "middle", xlabel))
    parts += [_series(one, number, x_axis, y_axis) for number, one in enumerate(series)]
    legend = "".join(f"<li>{_key(number)}{escape(one.label)}</li>" for number, one in enumerate(series))
    return "".join(parts) + f'</svg><ul class="legend">{legend}</ul>'


def _series(one: Series, number: int, x_axis: Sequence[float], y_axis: Sequence[float]) -> str:
    points = [(_x(x, x_axis), _y(y, y_axis)) for x, y in zip(one.x, one.y, strict=True)]
    told = [f"{escape(one.label)}: {y:.5g} at {x:,.5g}" for x, y in zip(one.x, one.y, strict=True)]
    line = " ".join(f"{x},{y}" for x, y in points)
    drawn = f'<polyline class="line" points="{line}"/>' if one.line and len(points) > 1 else ""
    marks = "".join(_mark(x, y, number, title) for (x, y), title in zip(points, told, strict=True))
    return f'<g class="c{number % COLOURS}">{drawn}{marks}</g>'


def _key(number: int) -> str:
    return f'<svg viewBox="-7 -7 14 14" class="c{number % COLOURS}">{_mark(0, 0, number, "")}</svg>'


def _mark(x: float, y: float, number: int, title: str) -> str:
    """A point, of another shape where the colours begin again."""
    told = f"<title>{title}</title>" if title else ""
    if number < COLOURS:
        return f'<circle class="mark" cx="{x}" cy="{y}" r="5">{told}</circle>'
    turned = f' transform="rotate(45 {x} {y})"' if number >= 2 * COLOURS else ""
    return f'<rect class="mark" x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9"{turned}>{told}</rect>'


def svg_heatmap(values: Array, xlabel: str, ylabel: str) -> str:
    """A matrix as cells, strongest where it is lowest, counted from 1, the first row below.

    Args:
        values: `(rows, columns)`, shown on a logarithmic scale where all are above 0; blank where not finite.
    """
    rows, columns = values.shape
    side = min(36.0, (WIDTH - LEFT - RIGHT) / columns)
    height = TOP + rows * side + BOTTOM
    shown = np.log(values) if np.all(values[np.isfinite(values)] > 0) else values
    low, high = (float(one) for one in (np.nanmin(shown[np.isfinite(shown)]), np.nanmax(shown[np.isfinite(shown)])))
    parts = [_head(height, xlabel, ylabel)]
    for row, column in np.argwhere(np.isfinite(shown)):
        share = 1 - (float(shown[row, column]) - low) / ((high - low) or 1.0)
        x, y = LEFT + column * side, TOP + (rows - 1 - row) * side
        title = f"{row + 1}, {column + 1}: {values[row, column]:.4g}"
        parts.append(
            f'<rect class="cell" x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}" '
            f'style="fill-opacity:{0.06 + 0.94 * share:.3f}"><title>{title}</title></rect>'
        )
    base, lowest = TOP + rows * side, math.exp(low) if shown is not values else low
    for column in range(0, columns, max(1, math.ceil(columns / 10))):
        parts.append(_text("tick", LEFT + (column + 0.5) * side, base + 20, "middle", str(column + 1)))
    for row in range(0, rows, max(1, math.ceil(rows / 10))):
        parts.append(_text("tick", LEFT - 8, TOP + (rows - 0.5 - row) * side + 5, "end", str(row + 1)))
    parts.append(_text("label", LEFT + columns * side / 2, base + 44, "middle", xlabel))
    note = f'<p class="note">Upwards: {escape(ylabel)}. The strongest is the lowest, {lowest:.4g}.</p>'
    return "".join(parts) + f"</svg>{note}"


def _head(height: float, xlabel: str, ylabel: str) -> str:
    label = f"{escape(ylabel)} against {escape(xlabel)}"
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{label}">'


def _text(style: str, x: float, y: float, anchor: str, text: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _axis(low: float, high: float) -> list[float]:
    """Round numbers that enclose a range, about five of them."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(one * power for one in (1, 2, 2.5, 5, 10) if one * power >= span / 4)
    first, last = math.floor(low / step), math.ceil(high / step)
    last += last == first
    return [round(number * step, 12) for number in range(first, last + 1)]


def _x(value: float, axis: Sequence[float]) -> float:
    return round(LEFT + (value - axis[0]) / (axis[-1] - axis[0]) * (WIDTH - LEFT - RIGHT), 1)


def _y(value: float, axis: Sequence[float]) -> float:
    return round(HEIGHT - BOTTOM - (value - axis[0]) / (axis[-1] - axis[0]) * (HEIGHT - TOP - BOTTOM), 1)
