"""Measured rows on a model card: the model-index of the Hub, a table, and the curve as a picture."""

from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import fmean

from huggingface_hub import EvalResult

from klas_hf import plotting
from klas_hf.curves.tradeoff import TradeoffCurve
from klas_hf.paths import Stitch
from klas_hf.rows import ResultRow, format_table


def own_rows(rows: Sequence[ResultRow], stitches: Collection[Stitch]) -> dict[Stitch, list[ResultRow]]:
    """The rows that measured a model with these stitches: those of each stitch, a row that several rules share once.

    Raises:
        ValueError: there are none.
    """
    found: dict[Stitch, dict[int, ResultRow]] = {}
    for row in rows:
        for stitch in stitches:
            if row.is_of(stitch):
                found.setdefault(stitch, {})[row.seed] = row
    if not found:
        there = sorted({str(row.stitch) for row in rows if row.stitch is not None})
        raise ValueError(
            f"got rows of the stitches {', '.join(there) or '(none)'}; expected some of this model's own, "
            f"{', '.join(map(str, sorted(stitches)[:5]))}. Pass the rows of the run that measured it"
        )
    return {stitch: list(by_seed.values()) for stitch, by_seed in sorted(found.items())}


def metrics_of(rows: Sequence[ResultRow]) -> list[str]:
    """The figures that all rows have.

    Raises:
        ValueError: there are none.
    """
    names = [name for name in rows[0].metrics if all(name in row.metrics for row in rows)] if rows else []
    if not names:
        raise ValueError(f"got {len(rows)} rows that have no metric in common; expected rows of one run")
    return names


def eval_results(
    rows: Sequence[ResultRow], stitches: Collection[Stitch], task: str, dataset: str, split: str | None
) -> list[EvalResult]:
    """The model's own figures, means over seeds, as the Hub's model-index has them."""
    own = own_rows(rows, stitches)
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type=name,
            metric_name=name if len(stitches) == 1 else f"{name}, stitch {stitch}",
            metric_value=fmean(row.metrics[name] for row in measured),
        )
        for stitch, measured in own.items()
        for name in metrics_of(rows)
    ]


def table(rows: Sequence[ResultRow]) -> str:
    """All rows as a Markdown table, with shares of the target's cost where the target was measured."""
    whole = [row.macs for row in rows if row.rule == "target" and row.stitch is None]
    return format_table(rows, metrics_of(rows), whole[0] if whole else None)


def draw_curve(rows: Sequence[ResultRow], metric: str | None, stitches: Collection[Stitch], path: Path) -> None:
    """One line per rule between the anchors, and where on it the model is.

    Args:
        metric: which figure; None takes the first.

    Raises:
        ValueError: a row that lacks the metric, or none of the model.
    """
    metric = metric or metrics_of(rows)[0]
    anchors = [row for row in rows if row.stitch is None]
    rules = list(dict.fromkeys(row.rule for row in rows if row.stitch is not None))
    series = []
    for rule in rules:
        curve = TradeoffCurve([*anchors, *(row for row in rows if row.rule == rule and row.stitch)], metric)
        series.append(plotting.Series(rule, list(curve.macs / 1e6), list(curve.values)))
    mine = TradeoffCurve([row for measured in own_rows(rows, stitches).values() for row in measured], metric)
    series.append(plotting.Series("this model", list(mine.macs / 1e6), list(mine.values), line=False))
    figure = plotting.lines(series, "MACs (millions)", metric)
    figure.savefig(path, dpi=130)
