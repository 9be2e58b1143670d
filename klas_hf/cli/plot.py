"""`klas-hf plot`: the heatmap of a file of scores, or the trade-off curves of a file of rows, as PNG and SVG."""

from dataclasses import dataclass, field
from pathlib import Path

from klas_hf import plotting
from klas_hf.budgets import COSTS
from klas_hf.cli.output import OVERWRITE, check_output, say
from klas_hf.cli.parsing import Command, flag, positional
from klas_hf.cli.select import load_scores
from klas_hf.curves.tradeoff import curves_by_rule, plot_curves
from klas_hf.rows import read_rows
from klas_hf.scores.values import StitchScores


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """Options of `klas-hf plot`."""

    file: str = positional("scores (.safetensors) of `score`, or rows (.jsonl) of `evaluate` or a recipe")
    output: str = field(metadata={"metavar": "PICTURE", "help": "where PNG and SVG go, with or without an ending"})
    metric: str | None = field(default=None, metadata={"help": "of the rows, or score; without it, the first"})
    cost: str = field(default="macs", metadata={"help": f"over which rows are drawn: {', '.join(COSTS)}"})
    overwrite: bool = flag(OVERWRITE)


def run(options: PlotOptions) -> int:
    """Run `klas-hf plot`; its exit status."""
    stem = Path(options.output)
    stem = stem.with_suffix("") if stem.suffix in (".png", ".svg") else stem
    for suffix in (".png", ".svg"):
        check_output(stem.with_name(stem.name + suffix), options.overwrite)
    if options.cost not in COSTS:
        raise ValueError(f"got cost={options.cost!r}; expected one of {', '.join(COSTS)}")
    if Path(options.file).suffix == ".safetensors":
        _heatmap(load_scores(options.file), options.metric, stem)
    else:
        rows = read_rows(options.file)
        metric = options.metric or next(iter(rows[0].metrics))
        plot_curves(curves_by_rule(rows, metric, options.cost), path=stem)
    say(f"Made {stem}.png and {stem}.svg")
    return 0


def _heatmap(scores: StitchScores, metric: str | None, stem: Path) -> None:
    """The score asked for; else all that `StitchScores.plot` shows."""
    if metric is None:
        scores.plot(stem)
    else:
        chosen = scores.with_score(metric)
        plotting.heatmaps({chosen.score: chosen.values[:, 1:]}, "target block j", "source block i", stem)


COMMAND = Command("Draw the heatmap of scores, or quality against cost of measured models.", PlotOptions, run)
