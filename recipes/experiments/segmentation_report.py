"""The report of a segmentation comparison: mean IoU of every rule and bucket (KLAS Tab. 5), classes, pictures."""

from collections.abc import Sequence

import numpy as np

from experiments.segmentation_comparison import SHOWN, SegmentationComparison
from klas_hf import plotting
from klas_hf.paths import Path
from klas_hf.processes import process_state
from klas_hf.rows import ResultRow


def report(comparison: SegmentationComparison) -> str:
    """Markdown of everything that was found; written to the output folder with its figures by the main process."""
    text = "\n\n".join([_anchors(comparison), _rules(comparison), _classes(comparison)])
    if process_state().is_main_process:
        _draw(comparison)
        _show(comparison)
        (comparison.output / "report.md").write_text(text + "\n", encoding="utf-8")
    return text


def _anchors(comparison: SegmentationComparison) -> str:
    lines = ["| anchor | M MACs | M parameters | mean IoU as given | mean IoU trained on |", "|---" * 5 + "|"]
    pairs = zip(comparison.anchor_rows(), comparison.measured("anchor"), strict=True)
    for name, (given, trained) in zip(comparison.names, pairs, strict=True):
        lines.append(
            f"| {name} | {given.macs / 1e6:,.1f} | {given.parameters / 1e6:.3f} | {given.metrics['mean_iou']:.4f} "
            f"| {trained.metrics['mean_iou']:.4f} |"
        )
    return "## Anchors\n\n" + "\n".join(lines)


def _rules(comparison: SegmentationComparison) -> str:
    """A row per rule, a column per bucket; and what the straight line between the trained anchors has there."""
    buckets = comparison.settings.buckets
    heads = " | ".join(f"bucket {number + 1}" for number in range(buckets))
    lines = [f"| rule | {heads} | mean over the line |", "|---" * (buckets + 2) + "|"]
    for rule in comparison.settings.rules:
        rows = {comparison.bucket(Path.parse(str(row.path))): row for row in comparison.measured(rule)}
        cells = [_cell(rows.get(number)) for number in range(buckets)]
        gains = [row.metrics["mean_iou"] - line(comparison, row.macs) for row in rows.values()]
        lines.append(f"| {rule} | {' | '.join(cells)} | {np.mean(gains) if gains else float('nan'):+.4f} |")
    return f"## Mean IoU (M MACs, path), head frozen, {comparison.training.max_steps} steps\n\n" + "\n".join(lines)


def _cell(row: ResultRow | None) -> str:
    return "–" if row is None else f"{row.metrics['mean_iou']:.4f} ({row.macs / 1e6:,.0f}, `{row.path}`)"


def line(comparison: SegmentationComparison, macs: float) -> float:
    """Mean IoU that the straight line between the anchors, trained like the rest, has at a cost."""
    ends = comparison.measured("anchor")
    return float(np.interp(macs, [row.macs for row in ends], [row.metrics["mean_iou"] for row in ends]))


def _classes(comparison: SegmentationComparison) -> str:
    """IoU of every class, of the anchors and of each rule's dearest path."""
    rows = [("anchor", row) for row in comparison.measured("anchor")]
    rows += [(rule, comparison.measured(rule)[-1]) for rule in comparison.settings.rules if comparison.selection(rule)]
    heads = " | ".join(f"{rule} `{row.path}`" for rule, row in rows)
    lines = [f"| class | {heads} |", "|---" * (len(rows) + 1) + "|"]
    for name in rows[0][1].details["iou"]:
        values = [row.details["iou"][name] for _, row in rows]
        shown = " | ".join("–" if value is None else f"{value:.3f}" for value in values)
        lines.append(f"| {name} | {shown} |")
    return "## IoU of every class, of anchors and each rule's dearest path\n\n" + "\n".join(lines)


def _draw(comparison: SegmentationComparison) -> None:
    """Mean IoU over MACs."""
    series = []
    for rule in ["anchor", *comparison.settings.rules]:
        rows = sorted(comparison.measured(rule), key=lambda row: row.macs)
        label = "line between the trained anchors" if rule == "anchor" else rule
        series.append(
            plotting.Series(label, [row.macs / 1e6 for row in rows], [row.metrics["mean_iou"] for row in rows])
        )
    title = f"{comparison.names[0]} … {comparison.names[1]}, head frozen"
    plotting.lines(series, "million MACs", "mean IoU", title, path=comparison.output / "curve")


def _show(comparison: SegmentationComparison) -> None:
    """Predictions beside labels."""
    images = [comparison.task.test[number] for number in range(min(SHOWN, len(comparison.task.test)))]
    columns: dict[str, Sequence[np.ndarray]] = {
        "image": [pixels.movedim(0, -1).numpy() for pixels, _ in images],
        "label": [mask.numpy() for _, mask in images],
    }
    ends = comparison.measured("anchor")
    middle = [rows[len(rows) // 2] for rule in comparison.settings.rules if (rows := comparison.measured(rule))]
    for row in [ends[0], *middle, ends[1]]:
        columns[f"{row.rule} {row.path}\n{row.metrics['mean_iou']:.3f}"] = list(comparison.shown(str(row.path)))
    plotting.pictures(columns, comparison.task.test.names, comparison.output / "predictions")
