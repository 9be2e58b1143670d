"""Rows and other cells as Markdown tables, with means and standard errors over seeds."""

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

from klas_hf.budgets import COSTS
from klas_hf.rows import ResultRow, by_model, untuned_beside_tuned


def format_table(
    rows: Iterable[ResultRow], metrics: Sequence[str], total_macs: int | None = None, cost: str = "macs"
) -> str:
    """Rows as a Markdown table, cheapest first; the mean and its standard error where seeds repeat a row.

    Where some models were fine-tuned, those that were not are marked: the two are not to be compared.

    Args:
        rows: measured models.
        metrics: which figures to show.
        total_macs: MACs that count as 100 %; None leaves that column out.
        cost: of `COSTS`: another than MACs and parameters gets a column.

    Returns:
        The table; parameters and MACs are in millions.

    Raises:
        ValueError: a row lacks a metric, or the cost.

    Example:
        >>> seeds = [ResultRow("klas", (8, 14), seed, 2_500_000, 30_000, {"loss": 3.0 + seed}) for seed in (0, 1)]
        >>> print(format_table(seeds, ["loss"], total_macs=5_000_000))
        | rule | path         | M parameters | M MACs | of target | loss            |
        |------|--------------|--------------|--------|-----------|-----------------|
        | klas | 0[:8] 1[14:] | 0.03         | 2.5    | 50%       | 3.5000 ± 0.5000 |
    """
    rows = list(rows)
    share = ["of target"] if total_macs else []
    shown = [] if cost in ("macs", "parameters") else [cost]
    lines = [["rule", "path", "M parameters", "M MACs", *share, *(COSTS[name][0] for name in shown), *metrics]]
    unfair = bool(untuned_beside_tuned(rows))
    by_rule = {row.rule: [other for other in rows if other.rule == row.rule] for row in rows}
    groups = [group for of_rule in by_rule.values() for group in by_model(of_rule)]
    for group in sorted(groups, key=lambda group: (group[0].macs, group[0].rule)):
        rule, macs = group[0].rule, group[0].macs
        cells = [
            f"{rule} (not tuned)" if unfair and group[0].training is None else rule,
            str(group[0].path or "–"),
            f"{group[0].parameters / 1e6:.2f}",
            f"{macs / 1e6:,.1f}",
        ]
        cells += [f"{macs / total_macs:.0%}"] if total_macs else []
        cells += [f"{fmean(row.cost(name) for row in group) / COSTS[name][1]:,.4g}" for name in shown]
        lines.append(cells + [format_mean([row.value(name) for row in group]) for name in metrics])
    return markdown_table(lines)


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table whose columns line up; the first line is the heading."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rule_line = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([padded[0], rule_line, *padded[1:]])


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error; nan is the error of one value."""
    return fmean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan


def format_mean(values: Sequence[float]) -> str:
    """The mean, with its standard error where there is one: 3.5000 ± 0.5000."""
    mean, error = mean_and_error(values)
    return f"{mean:.4f}" if math.isnan(error) else f"{mean:.4f} ± {error:.4f}"
