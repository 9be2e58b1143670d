"""What the field's tasks found: a table, ours against each rival item by item, curves over any cost, model cards."""

from collections.abc import Mapping, Sequence
from pathlib import Path as Folder
from statistics import fmean
from typing import Any

import numpy as np
import yaml
from transformers import AutoModelForCausalLM

from experiments.every_size import ANCHORS, OURS
from experiments.field import FieldStudy, joined
from klas_hf import plotting
from klas_hf.files import write_atomically
from klas_hf.hub import model_card
from klas_hf.hub.results import headline_metrics
from klas_hf.maths.bootstrap import paired_bootstrap
from klas_hf.maths.mcnemar import mcnemar
from klas_hf.rows import ResultRow, RowFile, by_model
from klas_hf.tables import format_mean, markdown_table

Rows = list[ResultRow]
COSTS = {
    "macs": ("MACs (millions)", 1e-6), "parameters": ("parameters (millions)", 1e-6), "bytes": ("weights (MB)", 1e-6),
    "first_token": ("to the first token (ms)", 1e3), "per_token": ("per token (ms)", 1e3),
}  # fmt: skip


def report(study: FieldStudy, missing: Mapping[str, str], published: Folder | None, cost: str) -> str:
    """The study as Markdown, in `report.md` too; `models.jsonl`, a curve per figure, and a card for each of ours."""
    rows = joined(study.rows.rows)
    names = headline_metrics(name for row in rows for name in row.metrics)
    _write_models(study, rows)
    parts = ["# On the tasks of the field", _about(study), main_table(study, rows, names), "## Every figure"]
    parts += [every_figure(rows), "## Ours less each rival, on the same items", paired(study, names)]
    if published is not None:
        parts += ["## Published, not measured here", published_table(published)]
    if missing:
        told = "\n".join(f"- **{name}**: {why}" for name, why in missing.items())
        parts.append(f"## Not measured\n\n{told}")
    text = "\n\n".join(parts) + "\n"
    write_atomically(study.output / "report.md", lambda part: part.write_text(text, encoding="utf-8"))
    for name in names:
        plot(rows, name, cost, study.output / f"curve-{name.partition(':')[0]}")
    write_cards(study, rows)
    return text


def main_table(study: FieldStudy, rows: Sequence[ResultRow], names: Sequence[str]) -> str:
    """A line per model, the mean over seeds with its standard error, cheapest first."""
    speed = {"bytes": ("MB", 1e-6), "first_token": ("first token, ms", 1e3), "per_token": ("per token, ms", 1e3)}
    timed = {name: one for name, one in speed.items() if all(f"speed: {name}" in row.metrics for row in rows)}
    heads = ["rule", "path", "of MACs", "M parameters", *(head for head, _ in timed.values())]
    lines = [[*heads, *(name.replace(": ", ", ") for name in names)]]
    for rule in dict.fromkeys(row.rule for row in rows):
        for group in by_model(row for row in rows if row.rule == rule):
            first = group[0]
            told = f"{rule}{'' if first.training or rule != ANCHORS else ', as they are'}"
            cells = [told, str(first.path), f"{first.macs / study.study.dearest:.0%}", f"{first.parameters / 1e6:.2f}"]
            for name, (_, unit) in timed.items():
                cells.append(f"{unit * fmean(row.metrics[f'speed: {name}'] for row in group):,.2f}")
            lines.append(cells + [_cell(group, name) for name in names])
    head, *body = lines
    return markdown_table([head, *sorted(body, key=lambda cells: float(cells[3]))])


def every_figure(rows: Sequence[ResultRow]) -> str:
    """A line per model and figure, means over seeds."""
    lines = [["figure", "rule", "path", "healed", "mean"]]
    for name in dict.fromkeys(name for row in rows for name in row.metrics if not name.startswith("speed: ")):
        for rule in dict.fromkeys(row.rule for row in rows):
            for group in by_model(row for row in rows if row.rule == rule and name in row.metrics):
                healed = "yes" if group[0].training else "no"
                lines.append([name, rule, str(group[0].path), healed, _cell(group, name)])
    return markdown_table(lines)


def paired(study: FieldStudy, names: Sequence[str]) -> str:
    """By bucket and rival, how much better ours is on each task, above 0 being better, with a 95 % interval.

    Paired bootstrap over items, those of several seeds drawn together; with one seed and answers that are right or
    wrong also McNemar's exact p. Perplexities are compared in nats per token.
    """
    lines = [["budget", "against", *(name.replace(": ", ", ") for name in names)]]
    for bucket, share in enumerate(study.study.edges[1:] / study.study.dearest):
        for rule in [ANCHORS, *study.study.settings.rivals]:
            cells = [_difference(study, bucket, rule, name) for name in names]
            if any(cells):
                against = "the large anchor, tuned" if rule == ANCHORS else rule
                lines.append([f"{share:.0%}", against, *(cell or "–" for cell in cells)])
    return markdown_table(lines)


def _difference(study: FieldStudy, bucket: int, rule: str, name: str) -> str | None:
    """Of ours less a rival on one figure; None where one of them was not measured, or their items do not pair."""
    task, _, metric = name.partition(": ")
    pairs: list[tuple[list[float], list[float]]] = []
    better = True
    for seed in study.study.settings.seeds:
        found = [_row(study, bucket, one, task, seed) for one in (OURS, rule)]
        if any(row is None for row in found):
            continue
        ours, other = (row.details["items"] for row in found if row is not None)
        better = found[0].details["higher_is_better"].get(metric, True) if found[0] is not None else True
        if ours["documents"] == other["documents"] and metric in ours["values"]:
            pairs.append((ours["values"][metric], other["values"][metric]))
    return difference(pairs, better=better) if pairs and len(pairs[0][0]) > 1 else None


def difference(pairs: Sequence[tuple[Sequence[float], Sequence[float]]], *, better: bool) -> str:
    """The mean difference of two models' items, with its interval and perhaps McNemar's p.

    Args:
        pairs: of each seed the items of one model and of the other, the same items in the same order for all seeds.
        better: whether more of them is better; a loss counts negatively.
    """
    if all(list(a) == list(b) for a, b in pairs):
        return "the same"
    a, b = (np.concatenate(one) * (1 if better else -1) for one in zip(*pairs, strict=True))
    clusters = np.tile(np.arange(len(pairs[0][0])), len(pairs))
    result = paired_bootstrap(a, b, clusters=clusters, samples=2000)
    told = f"{result.difference:+.4f} ({result.low:+.4f} … {result.high:+.4f})"
    if better and len(pairs) == 1 and np.isin([a, b], (0, 1)).all():
        told += f", p = {mcnemar(a, b).p_value:.3f}"
    return told


def _row(study: FieldStudy, bucket: int, rule: str, task: str, seed: int) -> ResultRow | None:
    """The row of what a rule took in a bucket; of the anchors, of the large one as fine-tuned as the others."""
    for entry in study.entries:
        is_large = rule == ANCHORS and str(entry.choice.path) == "1[:]" and entry.steps == study.steps
        if entry.rule == rule and entry.seed == seed and (is_large or entry.bucket == bucket):
            found = (row for row in study.measure(entry) if row.setting["task"] == task)
            return next((row for row in found if "items" in row.details), None)
    return None


def plot(rows: Sequence[ResultRow], name: str, cost: str, path: Folder) -> None:
    """One figure against one cost, a line per rule; anchors are marked."""
    label, unit = COSTS[cost]
    series = []
    for rule in dict.fromkeys(row.rule for row in rows):
        groups = by_model(row for row in rows if row.rule == rule and name in row.metrics)
        points = sorted((unit * cost_of(one[0], cost), fmean(row.metrics[name] for row in one)) for one in groups)
        if points:
            x, y = ([point[place] for point in points] for place in (0, 1))
            series.append(plotting.Series(rule, x, y, line=rule != ANCHORS and len(points) > 1))
    plotting.lines(series, label, name, name, path)


def cost_of(row: ResultRow, cost: str) -> float:
    """One of `COSTS` of a joined row."""
    if cost in ("macs", "parameters"):
        return float(getattr(row, cost))
    return row.value(f"speed: {cost}")


def published_table(file: Folder) -> str:
    """Figures of others, each with where it stands; nothing in it was measured by this run.

    Raises:
        ValueError: an entry without its source.
    """
    entries: list[dict[str, Any]] = yaml.safe_load(file.read_text(encoding="utf-8"))
    for one in entries:
        if absent := sorted({"model", "method", "kept", "figures", "source"} - one.keys()):
            raise ValueError(f"got {file} with the entry {one}, without {absent}; expected every figure's source")
    names = list(dict.fromkeys(name for one in entries for name in one["figures"]))
    lines = [["model", "method (published)", "kept", *names, "source"]]
    for one in entries:
        figures = [str(one["figures"].get(name, "–")) for name in names]
        lines.append([one["model"], one["method"], str(one["kept"]), *figures, one["source"]])
    return markdown_table(lines)


def write_cards(study: FieldStudy, rows: Rows) -> None:
    """A README.md in the folder of each of our models, whose model-index holds its figures."""
    for entry in study.entries:
        folder = study.output / "models" / entry.name
        if entry.rule == OURS and folder.exists():
            same = (OURS, entry.seed, str(entry.choice.path))
            own = [row for row in rows if (row.rule, row.seed, row.path) == same]
            model = AutoModelForCausalLM.from_pretrained(folder)
            card = model_card(model, f"user/{entry.name}", rows=own)
            card.save(folder / "README.md")


def _write_models(study: FieldStudy, rows: Rows) -> None:
    """`models.jsonl`: one row per model, for `klas-hf plot`, `klas-hf card` and `TradeoffCurve`."""
    file = study.output / "models.jsonl"
    file.unlink(missing_ok=True)
    models = RowFile(file, {"joined": "rows.jsonl", **study.rows.run})
    for row in rows:
        models.append(row)


def _cell(rows: Sequence[ResultRow], name: str) -> str:
    values = [row.metrics[name] for row in rows if name in row.metrics]
    return format_mean(values) if values else "–"


def _about(study: FieldStudy) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in study.rows.run.items() if name == "lm_eval")
    shots = [f"{task.name} {task.about['shots']}-shot" for task in study.tasks if task.about.get("shots") is not None]
    few = sorted({task.about["limit"] for task in study.tasks if task.about.get("limit")})
    seeds = len(study.study.settings.seeds)
    parts = [f"Measured with {versions}; {seeds} seed(s) of healing, {study.steps} steps."]
    if shots:
        parts.append(f"{', '.join(shots)}; the others with as many examples as their own settings say, mostly none.")
    if few:
        parts.append(f"**Only the first {few[0]} documents of each task: to try things out, not a result.**")
    return " ".join(parts)
