"""`klas-hf plot`: the heatmap of a file of scores, or the trade-off curves of a file of rows, as PNG and SVG."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from klas_hf import plotting
from klas_hf.cli.output import OVERWRITE, check_output, say
from klas_hf.cli.parsing import Command, flag, positional
from klas_hf.cli.select import load_scores
from klas_hf.curves.tradeoff import TradeoffCurve, plot_curves
from klas_hf.rows import ResultRow, RowFile
from klas_hf.scores.values import StitchScores


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """Options of `klas-hf plot`."""

    file: str = positional("scores (.safetensors) of `score`, or rows (.jsonl) of `evaluate` or a recipe")
    output: str = field(metadata={"metavar": "PICTURE", "help": "where PNG and SVG go, with or without an ending"})
    metric: str | None = field(default=None, metadata={"help": "of the rows; without it, the first row's first"})
    overwrite: bool = flag(OVERWRITE)


def run(options: PlotOptions) -> int:
    stem = Path(options.output)
    stem = stem.with_suffix("") if stem.suffix in (".png", ".svg") else stem
    for suffix in (".png", ".svg"):
        check_output(stem.with_name(stem.name + suffix), options.overwrite)
    if Path(options.file).suffix == ".safetensors":
        _heatmap(load_scores(options.file), stem)
    else:
        _curves(read_rows(options.file), options.metric, stem)
    say(f"Made {stem}.png and {stem}.svg")
    return 0


def read_rows(path: str | Path) -> list[ResultRow]:
    """The rows of any run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no file of rows, or one without any.
    """
    with open(path, encoding="utf-8") as file:
        try:
            run = json.loads(file.readline())["run"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"got {path}, whose first line has no run settings; expected scores.safetensors or rows.jsonl"
            ) from error
    rows = list(RowFile(path, run))
    if not rows:
        raise ValueError(f"got {path} without a row; expected at least one measured model")
    return rows


def _heatmap(scores: StitchScores, stem: Path) -> None:
    """Θ and Γ where probes were used, else the score that the file is ranked by."""
    if "klas" in scores.available:
        scores.plot(stem)
    else:
        plotting.heatmaps({scores.score: scores.values[:, 1:]}, "target block j", "source block i", stem)


def _curves(rows: list[ResultRow], metric: str | None, stem: Path) -> None:
    """One curve per rule, from the source to the target where both were measured."""
    metric = metric or next(iter(rows[0].metrics))
    anchors = [row for row in rows if row.stitch is None]
    rules = dict.fromkeys(row.rule for row in rows if row.stitch is not None)
    curves = [
        TradeoffCurve([*anchors, *(row for row in rows if row.rule == rule and row.stitch)], metric, label=rule)
        for rule in rules
    ]
    plot_curves(curves or [TradeoffCurve(anchors, metric, label="anchors")], path=stem)


COMMAND = Command("Draw the heatmap of scores, or quality against MACs of measured models.", PlotOptions, run)
