"""Measured rows on a model card: the model-index of the Hub, a table, and the curve as a picture."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path as File
from statistics import fmean
from typing import Any

from huggingface_hub import EvalResult

from klas_hf.curves.tradeoff import curves_by_rule, measured_models, plot_curves
from klas_hf.paths import Path
from klas_hf.rows import AnyPath, ResultRow, by_model
from klas_hf.tables import format_table

SPEED = "speed"  # the task whose figures are costs
PREFERRED = (
    "acc_norm", "acc", "exact_match (flexible-extract)", "prompt_level_strict_acc", "perplexity", "bits_per_byte",
)  # fmt: skip


def own_rows(
    rows: Sequence[ResultRow], paths: Collection[AnyPath], trained: bool | None = None
) -> dict[str, list[ResultRow]]:
    """The rows that measured a model of these paths: those of each path, a row that several rules share once.

    Args:
        trained: whether the model was: an anchor that was healed has the path of the anchor as it was. Rows that say
            otherwise are left out where others say so. None takes all.

    Raises:
        ValueError: there are none.
    """
    names = [str(Path.of(path)) for path in paths]
    found = {name: [row for row in rows if row.path == name] for name in names}
    if not any(found.values()):
        there = sorted({str(row.path) for row in rows if row.joints})
        raise ValueError(
            f"got rows of the paths {', '.join(there) or '(none)'}; expected some of this model's own, "
            f"{', '.join(names[:5])}. Pass the rows of the run that measured it"
        )
    for name, of_path in found.items():
        found[name] = [row for row in of_path if trained in (None, row.training is not None)] or of_path
    return {name: [row for group in by_model(of_path) for row in group] for name, of_path in found.items() if of_path}


def metrics_of(rows: Sequence[ResultRow]) -> list[str]:
    """The figures that all rows have.

    Raises:
        ValueError: there are none.
    """
    names = [name for name in rows[0].metrics if all(name in row.metrics for row in rows)] if rows else []
    if not names:
        raise ValueError(f"got {len(rows)} rows that have no metric in common; expected rows of one run")
    return names


def headline_metrics(names: Iterable[str]) -> list[str]:
    """The metrics to show of many: of each task (`task: metric`) the one that is published most; of others all.

    What a `speed` task measures are costs, and are left out.

    Example:
        >>> headline_metrics(["piqa: acc", "piqa: acc_norm", "speed: bytes", "loss"])
        ['piqa: acc_norm', 'loss']
    """
    tasks: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        task, colon, metric = name.partition(": ")
        tasks.setdefault(task if colon else name, []).append(metric)
    found = []
    for task, metrics in tasks.items():
        best = next((name for name in PREFERRED if name in metrics), metrics[0])
        if task != SPEED:
            found.append(f"{task}: {best}" if best else task)
    return found


def sources_of(rows: Sequence[ResultRow]) -> dict[str, Mapping[str, str]]:
    """Metric → what it was measured on, where rows say so in their details: `sources` with Hub id, split and task."""
    return {name: source for row in rows for name, source in row.details.get("sources", {}).items()}


def eval_results(
    rows: Sequence[ResultRow], paths: Collection[AnyPath], task: str, dataset: str | None, split: str | None,
    trained: bool | None = None,
) -> list[EvalResult]:  # fmt: skip
    """The model's own figures, means over seeds, as the Hub's model-index has them.

    Args:
        trained: as for `own_rows`.
        dataset, split: of the figures whose source the rows do not say; None leaves these out.
    """
    own, sources = own_rows(rows, paths, trained), sources_of(rows)
    return [
        EvalResult(
            task_type=task,
            metric_name=name if len(paths) == 1 else f"{name}, path {path}",
            metric_value=fmean(row.metrics[name] for row in measured),
            **_place(name, sources.get(name), dataset, split),
        )
        for path, measured in own.items()
        for name in metrics_of(rows)
        if name in sources or dataset is not None
    ]


def _place(metric: str, source: Mapping[str, str] | None, dataset: str | None, split: str | None) -> dict[str, Any]:
    """Where a figure is from, in the words of the model-index."""
    if source is None:
        return {"dataset_type": dataset, "dataset_name": dataset, "dataset_split": split, "metric_type": metric}
    return {
        "dataset_type": source["dataset"],
        "dataset_name": source["task"],
        "dataset_config": source.get("configuration"),
        "dataset_split": source.get("split"),
        "metric_type": source["metric"],
    }


def table(rows: Sequence[ResultRow], cost: str) -> str:
    """All rows as a Markdown table, with shares of the target's MACs where the target was measured, and the cost."""
    whole = [row.macs for row in rows if row.rule == "target" and not row.joints]
    return format_table(rows, metrics_of(rows), whole[0] if whole else None, cost)


def draw_curve(
    rows: Sequence[ResultRow], metric: str | None, paths: Collection[AnyPath], file: File, cost: str,
    trained: bool | None = None,
) -> None:  # fmt: skip
    """One line per rule between the anchors, and where on it the model is.

    Args:
        trained: as for `own_rows`.
        metric: which figure; None takes the first.
        cost: over which one, of `COSTS`.

    Raises:
        ValueError: a row that lacks the metric or the cost, or none of the model.
    """
    metric = metric or metrics_of(rows)[0]
    mine = measured_models((row for measured in own_rows(rows, paths, trained).values() for row in measured), metric)
    plot_curves(curves_by_rule(rows, metric, cost), points={"this model": mine}).savefig(file, dpi=130)
