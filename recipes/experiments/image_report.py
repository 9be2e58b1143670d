"""The report of an image comparison: tables, figures, and who won (KLAS Fig. 7, Tab. 2, 4, 7 to 10)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isnan
from statistics import fmean

from experiments.curve_comparison import cost_at_equal_quality, format_sweep, gain_at_equal_cost, sweep, viable_stitches
from experiments.image_comparison import ImageComparison
from klas_hf.curves.regret import bucket_picks
from klas_hf.curves.tradeoff import TradeoffCurve, correlation_report, plot_curves
from klas_hf.processes import process_state
from klas_hf.rows import ResultRow
from klas_hf.selection.choice import overlap, recovery
from klas_hf.tables import format_mean, format_table, mean_and_error


def report(comparison: ImageComparison) -> str:
    """Markdown of everything that was found; written to the output folder with its figures by the main process."""
    metrics = ["accuracy"] if comparison.task.classes is None else ["accuracy", "accuracy_among"]
    parts = [_anchors(comparison), _selections(comparison)]
    for metric in metrics:
        parts += _rules(comparison, metric)
    if "every" in comparison.settings.rules:
        parts += _scores(comparison, metrics[0])
    text = "\n\n".join(parts)
    # The figures need these whatever the rules; where they are still to be made, every process takes part.
    _ = comparison.scores, comparison.probes
    if process_state().is_main_process:
        comparison.plot()
        _draw(comparison, metrics)
        (comparison.output / "report.md").write_text(text + "\n", encoding="utf-8")
    return text


def area(rows: Sequence[ResultRow], metric: str, interval: tuple[float, float]) -> tuple[float, float]:
    """Mean quality over an interval of MACs, of all stitches and of the Pareto front alone."""
    curve = TradeoffCurve(rows, metric)
    front = curve.pareto()
    low = max(interval[0], float(front.macs[0]))
    high = max(low, min(interval[1], float(front.macs[-1])))
    within = front.auc((low, high)) * (high - low) / (interval[1] - interval[0]) if high > low else 0.0
    # Beyond its best model a front stays level: nobody pays more for less.
    level = float(front.values[-1]) * (interval[1] - high) / (interval[1] - interval[0])
    return curve.auc(interval), within + level


def curve_rows(comparison: ImageComparison, rule: str, seed: int) -> list[ResultRow]:
    """What a rule's curve is drawn from: its paths, and the two outer anchors.

    An anchor that none of the rule's stitches joins was not fine-tuned with it, and counts as it was given.
    """
    rows, ends = comparison.measured(rule, seed), comparison.anchor_rows()
    there = {row.path for row in rows}
    return [*rows, *(row for row in (ends[0], ends[-1]) if row.path not in there)]


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[float, float]:
    """Mean difference over common seeds, and its standard error (nan for one seed)."""
    return mean_and_error([ours[seed] - theirs[seed] for seed in ours if seed in theirs])


def _interval(comparison: ImageComparison) -> tuple[float, float]:
    return float(comparison.macs[0]), float(comparison.macs[-1])


def _anchors(comparison: ImageComparison) -> str:
    rows = comparison.anchor_rows()
    metrics = list(rows[0].metrics)
    lines = [f"| anchor | M MACs | M parameters | {' | '.join(metrics)} |", "|---" * (3 + len(metrics)) + "|"]
    for name, row in zip(comparison.names, rows, strict=True):
        values = " | ".join(f"{row.metrics[one]:.4f}" for one in metrics)
        lines.append(f"| {name} | {row.macs / 1e6:,.2f} | {row.parameters / 1e6:.3f} | {values} |")
    table = "\n".join(lines)
    return f"## Anchors\n\n{table}\n\n{comparison.pairs}"


def _selections(comparison: ImageComparison) -> str:
    seed = comparison.settings.seeds[0]
    chosen = {rule: comparison.selection(rule, seed) for rule in comparison.settings.rules}
    lines = ["| rule | stitches | candidates | in common with SN-Net |", "|---|---|---|---|"]
    for rule, selection in chosen.items():
        common = overlap(selection, chosen["snnet"]).common if "snnet" in chosen else "–"
        lines.append(f"| {rule} | {len(selection)} | {selection.candidates} | {common} |")
    return "## Selections\n\n" + "\n".join(lines)


def _rules(comparison: ImageComparison, metric: str) -> list[str]:
    """The table of rules with their areas over the anchors' common costs, and who won."""
    interval, seeds = _interval(comparison), comparison.settings.seeds
    rules = [rule for rule in comparison.settings.rules if rule != "every"]
    rows = {rule: {seed: curve_rows(comparison, rule, seed) for seed in seeds} for rule in rules}
    areas = {rule: {seed: area(rows[rule][seed], metric, interval) for seed in seeds} for rule in rules}
    if not rules:
        return []
    lines = [
        "| rule | AUC, all stitches | AUC, Pareto front | best gain over SN-Net at equal cost | at | MACs ratio |",
        "|---|---|---|---|---|---|",
    ]
    for rule in rules:
        cells = [format_mean([areas[rule][seed][column] for seed in seeds]) for column in (0, 1)]
        gain = ["–", "–", "–"]
        if rule != "snnet" and "snnet" in rules:
            gain = _gains(rows[rule], rows["snnet"], metric)
        lines.append(f"| {rule} | {' | '.join(cells + gain)} |")
    heading = f"## Rules: {metric} after fine-tuning, mean ± standard error over {len(seeds)} seeds"
    text = f"{heading}\n\n" + "\n".join(lines)
    return [text, _winner({rule: {seed: areas[rule][seed][0] for seed in seeds} for rule in rules})]


def _gains(
    ours: Mapping[int, Sequence[ResultRow]], theirs: Mapping[int, Sequence[ResultRow]], metric: str
) -> list[str]:
    """KLAS's two headline figures, on means over seeds: gain at equal cost, and costs at equal quality."""
    curve, baseline = (TradeoffCurve([row for seed in one.values() for row in seed], metric) for one in (ours, theirs))
    gain = gain_at_equal_cost(curve, baseline)
    values = [one.pareto().values for one in (curve, baseline)]
    overlaps = max(one.min() for one in values) <= min(one.max() for one in values)
    ratio = f"{cost_at_equal_quality(curve, baseline).ratio:.2f}" if overlaps else "no equal quality"
    return [f"{gain.largest:+.4f} (mean {gain.mean:+.4f})", f"{gain.macs / 1e6:,.1f} M", ratio]


def _winner(areas: Mapping[str, Mapping[int, float]]) -> str:
    means = {rule: fmean(of_seed.values()) for rule, of_seed in areas.items()}
    best = max(means, key=lambda rule: means[rule])
    parts = [f"**{best} has the largest area, {means[best]:.4f}.**"]
    for rule in sorted(means, key=lambda rule: -means[rule]):
        if rule != best:
            difference, error = paired(areas[best], areas[rule])
            # One seed has no standard error: nan is neither shown nor compared.
            spread = "" if isnan(error) else f" ± {error:.4f}"
            certain = ", within two standard errors" if difference <= 2 * error else ""
            parts.append(f"It is {difference:.4f}{spread} ahead of {rule}{certain}.")
    if "klas" in means and best != "klas":
        parts.append("KLAS did not win here.")
    return " ".join(parts)


def _scores(comparison: ImageComparison, metric: str) -> list[str]:
    """What each score foretells of all stitches, trained in one supernet: Tab. 9 and 10, picks, Tab. 7 and 8."""
    rows = [row for seed in comparison.settings.seeds for row in comparison.measured("every", seed)]
    parts = []
    for scores in comparison.scores:
        source, target = (comparison.names[place] for place in (scores.costs.source, scores.costs.target))
        lines = ["| score | Pearson | Spearman | picked | oracle | chance |", "|---|---|---|---|---|---|"]
        for name in scores.available:
            one = scores.with_score(name)
            found = correlation_report(one, rows, metric)
            picks = bucket_picks(one, rows, metric)
            lines.append(
                f"| {name} | {found.pearson:.2f} | {found.spearman:.2f} | {picks.picked:.4f} | {picks.oracle:.4f} "
                f"| {picks.chance:.4f} |"
            )
        parts.append(
            f"## {source} → {target}: {found.stitches} stitches in one supernet\n\nCorrelation with the drop in "
            f"{metric}; mean {metric} of the stitch picked in each of {picks.buckets} cost buckets.\n\n"
            + "\n".join(lines)
        )
    parts.append(_recovery(comparison, rows, metric))
    if comparison.settings.most_stitches is None:
        ends = [row for row in rows if not row.joints]
        swept = sweep(comparison.scores, rows, metric, anchors=ends, interval=_interval(comparison))
        parts.append("## τ and buckets, on the same supernet\n\n" + format_sweep(swept, metric))
    return parts


def _recovery(comparison: ImageComparison, rows: Sequence[ResultRow], metric: str) -> str:
    """Share of the viable stitches that each rule chose (Tab. 1)."""
    viable = viable_stitches(rows, metric)
    heading = f"## Recovery of viable stitches\n\n{len(viable)} stitches lie on or above the line between their anchors"
    if not viable:
        return f"{heading}."
    seed = comparison.settings.seeds[0]
    shares = [
        f"{rule} {recovery(comparison.selection(rule, seed), viable):.0%}"
        for rule in comparison.settings.rules
        if rule != "every"
    ]
    return f"{heading}{', of which the rules chose: ' if shares else ''}{', '.join(shares)}."


def _draw(comparison: ImageComparison, metrics: Sequence[str]) -> None:
    """Curves of all rules, means over seeds; with cascades of the two outer anchors in the last metric's figure."""
    seeds, title = comparison.settings.seeds, f"{comparison.names[0]} … {comparison.names[-1]}"
    for metric in metrics:
        curves = [
            TradeoffCurve([row for seed in seeds for row in curve_rows(comparison, rule, seed)], metric, label=rule)
            for rule in comparison.settings.rules
        ]
        if metric == metrics[-1]:
            cascade = [_renamed(row, metric) for row in comparison.cascade_rows()]
            curves.append(TradeoffCurve(cascade, metric, label="cascade (no fine-tuning)"))
        name = "curve" if metric == metrics[0] else f"curve-{metric}"
        plot_curves(curves, title=title, path=comparison.output / name)
    table = format_table(list(comparison.rows), [*metrics, "loss"], comparison.macs[-1])
    (comparison.output / "stitches.md").write_text(table + "\n", encoding="utf-8")


def _renamed(row: ResultRow, metric: str) -> ResultRow:
    return replace(row, metrics={metric: row.metrics["accuracy"]})
