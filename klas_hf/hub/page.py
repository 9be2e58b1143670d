"""One page that shows a whole output folder: curves, tables, heatmaps, where each number is from, how to repeat it.

A single HTML file without script that asks nothing of any network: it can be sent, kept and read on a phone.
"""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from safetensors import safe_open

from klas_hf.budgets import COSTS
from klas_hf.curves.tradeoff import higher_is_better
from klas_hf.files import understood
from klas_hf.hub.page_drawings import svg_heatmap, svg_lines
from klas_hf.hub.results import headline_metrics
from klas_hf.plotting import Series
from klas_hf.rows import ResultRow, by_model, read_rows, read_run
from klas_hf.scores.values import StitchScores
from klas_hf.tables import format_mean

FILES = ("models.jsonl", "rows.jsonl")  # the first that is there is shown
MOST_PICTURES, PICTURE_BYTES = 40, 2_000_000


def results_page(folder: str | Path) -> str:
    """The page of an output folder of a recipe or of `klas-hf evaluate`.

    Args:
        folder: with `models.jsonl` or `rows.jsonl`; beside them perhaps scores (`.safetensors`), pictures (`.png`),
            `report.md`, and `command.txt`, the command that made them.

    Returns:
        HTML.

    Raises:
        FileNotFoundError: no rows there; folders below that have some are named.
        ValueError: what is there are no rows.

    Example:
        >>> file = RowFile(folder / "rows.jsonl", {"data": "my_text"})
        >>> for row in rows:
        ...     file.append(row)
        >>> page = results_page(folder)
        >>> page.startswith("<!doctype html>"), "https://" in page
        (True, False)
    """
    place = Path(folder)
    file = next((place / name for name in FILES if (place / name).is_file()), None)
    if file is None:
        below = sorted(str(one.parent) for one in place.glob("*/rows.jsonl"))
        hint = f"; there are some in {', '.join(below)}" if below else ""
        raise FileNotFoundError(f"got {folder} without {' or '.join(FILES)}; expected a recipe's output folder{hint}")
    rows = read_rows(file)
    run, versions = read_run(file)
    cost = run.get("cost", "macs")
    models = _models(rows)
    sections = {
        "Quality against cost": _curves(models, cost),
        "Models": _table(models, cost),
        "Heatmaps": _heatmaps(place),
        "Where each number is from": _origins(models, file),
        "How to repeat it": _repeat(place, run, versions),
        "The report as it was written": _written(place),
        "Pictures": _pictures(place),
    }
    kept = {title: body for title, body in sections.items() if body}
    links = "".join(f'<a href="#s{number}">{escape(title)}</a>' for number, title in enumerate(kept))
    body = "".join(
        f'<section id="s{number}"><h2>{escape(title)}</h2>{text}</section>'
        for number, (title, text) in enumerate(kept.items())
    )
    title = escape(place.resolve().name)
    about = (
        f"{len(models)} models, {len(rows)} rows of {escape(file.name)}; klas_hf {escape(versions.get('klas_hf', '?'))}"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><header><h1>{title}</h1><p>{about}</p><nav>{links}</nav></header><main>{body}</main></body></html>\n"
    )


@dataclass(frozen=True)
class _Model:
    """One model: its seeds' rows, and where these stand in the file, counted from 1."""

    rule: str
    rows: Sequence[ResultRow]
    lines: Sequence[int]

    @property
    def first(self) -> ResultRow:
        return self.rows[0]

    @property
    def healing(self) -> str:
        """How long it was trained; "" where it was not."""
        training = self.first.training
        if training is None:
            return ""
        steps = training.get("max_steps") or training.get("steps")
        return f"{steps} steps" if steps else "healed"

    @property
    def name(self) -> str:
        return f"{self.rule}, {self.healing or 'not healed'}"

    def cost(self, name: str) -> float:
        return fmean(row.cost(name) for row in self.rows)

    def value(self, metric: str) -> float | None:
        known = [row.metrics[metric] for row in self.rows if metric in row.metrics]
        return fmean(known) if known else None


def _models(rows: Sequence[ResultRow]) -> list[_Model]:
    """By cost, cheapest first; a rule's rows of one model under several seeds are one."""
    places = {id(row): number + 2 for number, row in enumerate(rows)}  # the header is line 1
    found = []
    for rule in dict.fromkeys(row.rule for row in rows):
        for group in by_model(row for row in rows if row.rule == rule):
            found.append(_Model(rule, group, [places[id(row)] for row in group]))
    return sorted(found, key=lambda model: (model.first.macs, model.rule))


def _curves(models: Sequence[_Model], cost: str) -> str:
    """A figure for each metric and length of healing; where only anchors were not healed, they stand in all of them."""
    groups: dict[str, list[_Model]] = {}
    for model in models:
        groups.setdefault(model.healing, []).append(model)
    untouched = groups.get("", [])
    if len(groups) > 1 and not any(model.first.joints for model in untouched):
        del groups[""]
        groups = {healing: [*untouched, *group] for healing, group in groups.items()}
    figures = [
        _figure(metric, (healing or "not healed") if len(groups) > 1 else "", group, cost)
        for metric in headline_metrics(name for model in models for row in model.rows for name in row.metrics)
        for healing, group in groups.items()
    ]
    return f'<div class="figures">{"".join(figures)}</div>' if any(figures) else ""


def _figure(metric: str, healing: str, models: Sequence[_Model], cost: str) -> str:
    """One metric against a cost, a line per rule that joins blocks."""
    axis, unit = COSTS[cost]
    healed = any(model.healing for model in models)
    series = []
    for rule in dict.fromkeys(model.rule for model in models):
        for is_healed in (True, False):
            mine = [model for model in models if model.rule == rule and bool(model.healing) == is_healed]
            known = [(model.cost(cost) / unit, model.value(metric)) for model in mine]
            points = sorted((x, y) for x, y in known if y is not None and isfinite(y))
            if points:
                label = f"{rule}, not healed" if healed and not is_healed else rule
                joined = any(model.first.joints for model in mine)
                series.append(Series(label, [x for x, _ in points], [y for _, y in points], line=joined))
    if not series:
        return ""
    better = "higher" if higher_is_better(metric) else "lower"
    caption = f"{escape(metric)}{', ' if healing else ''}{healing} <small>({better} is better)</small>"
    return f"<figure><figcaption>{caption}</figcaption>{svg_lines(series, axis, metric)}</figure>"


def _table(models: Sequence[_Model], cost: str) -> str:
    metrics = headline_metrics(name for model in models for row in model.rows for name in row.metrics)
    dearest = max(model.first.macs for model in models) or 1
    shown = [] if cost in ("macs", "parameters") else [cost]
    heads = ["model", "path", "of the dearest's MACs", "M parameters", *(COSTS[name][0] for name in shown), *metrics]
    lines = []
    for number, model in enumerate(models):
        first = model.first
        cells = [
            f'<a href="#m{number}">{escape(model.name)}</a>', f"<code>{escape(str(first.path or '–'))}</code>",
            f"{first.macs / dearest:.0%}", f"{first.parameters / 1e6:,.2f}",
            *(f"{model.cost(name) / COSTS[name][1]:,.4g}" for name in shown),
        ]  # fmt: skip
        for metric in metrics:
            known = [row.metrics[metric] for row in model.rows if metric in row.metrics]
            cells.append(f'<a href="#m{number}">{format_mean(known)}</a>' if known else "–")
        lines.append(cells)
    note = '<p class="note">Means, with standard errors where seeds repeat a model. Each number leads to its rows.</p>'
    return _html_table(heads, lines) + note


def _heatmaps(place: Path) -> str:
    figures = []
    for file in filter(_holds_scores, sorted(place.glob("*.safetensors")) + sorted(place.glob("*/scores.safetensors"))):
        scores = StitchScores.load(file)
        drawn = svg_heatmap(scores.values[:, 1:], "target block j", "source block i")  # j = 0 has no score
        name = f"{escape(scores.score)} <small>({escape(str(file.relative_to(place)))}, lower is better)</small>"
        figures.append(f"<figure><figcaption>{name}</figcaption>{drawn}</figure>")
    return f'<div class="figures">{"".join(figures)}</div>' if figures else ""


def _holds_scores(file: Path) -> bool:
    """Not a model or paths, which `klas-hf make` leaves beside its rows."""
    with understood(file, "a whole safetensors file"), safe_open(file, "np") as opened:
        return "klas_hf" in (opened.metadata() or {})


def _origins(models: Sequence[_Model], file: Path) -> str:
    parts = []
    for number, model in enumerate(models):
        title = f"{escape(model.name)} <code>{escape(str(model.first.path or '–'))}</code>"
        rows = "".join(_origin(row, line, file) for row, line in zip(model.rows, model.lines, strict=True))
        parts.append(f'<details id="m{number}"><summary>{title}</summary>{rows}</details>')
    return "".join(parts)


def _origin(row: ResultRow, line: int, file: Path) -> str:
    """One row: where it stands, all its figures with the data that they are of, and what they depend on."""
    sources = row.details.get("sources", {})
    figures = [
        [escape(name), f"{value:.6g}", escape(_source(sources.get(name))), escape(_version(row, name))]
        for name, value in row.metrics.items()
    ]
    facts = {"seed": row.seed, "setting": row.setting, "healed with": row.training, "made from": row.made_from}
    facts |= {"MACs": f"{row.macs:,}", "parameters": f"{row.parameters:,}"}
    known = "".join(f"<dt>{escape(name)}</dt><dd>{_value(value)}</dd>" for name, value in facts.items() if value)
    return (
        f"<h3>{escape(file.name)}, line {line}</h3>"
        f"{_html_table(['figure', 'value', 'data', 'task'], figures)}<dl>{known}</dl>"
    )


def _source(source: Mapping[str, Any] | None) -> str:
    if not source:
        return "–"
    return ", ".join(str(source[name]) for name in ("dataset", "configuration", "split") if source.get(name))


def _version(row: ResultRow, metric: str) -> str:
    """The harness's version of a figure's task, and how many examples stood in the prompt."""
    task = row.details.get("tasks", {}).get(metric.partition(": ")[0], {})
    kept = [f"{name} {task[name]}" for name in ("version", "shots", "limit", "lm_eval") if name in task]
    return ", ".join(kept) or "–"


def _repeat(place: Path, run: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    command = place / "command.txt"
    parts = [f"<pre>{escape(command.read_text(encoding='utf-8').strip())}</pre>"] if command.is_file() else []
    parts.append("<p>With these versions, and the settings that all rows share:</p>")
    facts = {**versions, **run}
    parts.append("<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{_value(v)}</dd>" for k, v in facts.items()) + "</dl>")
    return "".join(parts)


def _written(place: Path) -> str:
    file = place / "report.md"
    if not file.is_file():
        return ""
    return f"<details><summary>report.md</summary><pre>{escape(file.read_text(encoding='utf-8'))}</pre></details>"


def _pictures(place: Path) -> str:
    found = [file for file in sorted(place.glob("*.png")) if file.stat().st_size <= PICTURE_BYTES][:MOST_PICTURES]
    shown = "".join(
        f'<figure><figcaption>{escape(file.name)}</figcaption><img alt="{escape(file.stem)}" '
        f'src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"></figure>'
        for file in found
    )
    return f"<details><summary>{len(found)} pictures</summary>{shown}</details>" if found else ""


def _html_table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name).replace('_', '_<wbr>')}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for cells in lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _value(value: Any) -> str:
    """A JSON value; a mapping as its own list."""
    if isinstance(value, Mapping):
        return "<br>".join(f"{escape(str(name))}: {escape(json.dumps(one))}" for name, one in value.items())
    return escape(value if isinstance(value, str) else json.dumps(value))


_STYLE = """
:root{color-scheme:light dark;--back:#fff;--fore:#1b1f24;--soft:#5a636e;--edge:#d7dce1;--panel:#f5f7f9;--link:#0b5cad;
--c0:#0072b2;--c1:#d55e00;--c2:#008661;--c3:#b0489a;--c4:#8a6d00;--c5:#4b57c9;--c6:#a33;--c7:#5c6b73;--cell:#12355b}
@media (prefers-color-scheme:dark){:root{--back:#14181d;--fore:#e6e9ed;--soft:#9aa5b1;--edge:#333b45;--panel:#1c222a;
--link:#7db8f5;--c0:#5ab4f0;--c1:#ff9a52;--c2:#3fcf9f;--c3:#e08bcf;--c4:#dcbf4a;--c5:#9aa5ff;--c6:#ff8a80;--c7:#a9b7c0;
--cell:#8ec7ff}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:0 16px 48px;background:var(--back);color:var(--fore);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.6rem;margin:24px 0 0;overflow-wrap:anywhere}h2{font-size:1.25rem;margin:36px 0 12px}
h3{font-size:1rem;margin:20px 0 8px}header p,.note{color:var(--soft);margin:4px 0 0}
nav{display:flex;flex-wrap:wrap;gap:6px 16px;margin-top:12px}a{color:var(--link);text-decoration:none}
a:hover{text-decoration:underline}td a{color:inherit}td:first-child a{color:var(--link)}
.figures{display:grid;gap:16px;grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr))}
figure{margin:0;padding:12px 14px;border:1px solid var(--edge);border-radius:10px;background:var(--panel);min-width:0}
figcaption{font-weight:600;margin-bottom:6px;overflow-wrap:anywhere}small{font-weight:400;color:var(--soft)}
svg{display:block;width:100%;height:auto}img{display:block;max-width:100%;height:auto;background:#fff}
.grid{stroke:var(--edge)}.tick{fill:var(--soft);font-size:15px}.label{fill:var(--fore);font-size:16px}
.line{fill:none;stroke:currentColor;stroke-width:2.5}.mark{fill:currentColor;stroke:var(--panel);stroke-width:1.5}
.cell{fill:var(--cell)}.legend svg{display:inline-block;width:14px;height:14px;margin-right:6px;vertical-align:-2px}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 16px;margin:8px 0 0;padding:0;
font-size:.9rem}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}.c4{color:var(--c4)}.c5{color:var(--c5)}
.c6{color:var(--c6)}.c7{color:var(--c7)}
.wide{overflow-x:auto;border:1px solid var(--edge);border-radius:10px}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:7px 12px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--edge)}
th{background:var(--panel);color:var(--soft);font-weight:600;white-space:normal;vertical-align:bottom;
min-width:6em}
th:first-child,td:first-child{position:sticky;left:0;background:var(--back)}th:first-child{background:var(--panel)}
tr:last-child td{border-bottom:0}
th:nth-child(-n+2),td:nth-child(-n+2){text-align:left}
details th,details td{text-align:left}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.88em}
pre{overflow-x:auto;padding:12px 14px;border:1px solid var(--edge);border-radius:10px;background:var(--panel)}
details{border:1px solid var(--edge);border-radius:10px;padding:8px 14px;margin:8px 0}summary{cursor:pointer}
details:target{border-color:var(--link)}details figure{margin-top:12px}
dl{display:grid;grid-template-columns:minmax(90px,max-content) 1fr;gap:4px 16px;font-size:.9rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
@media (max-width:560px){th,td{padding:6px 9px}dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:8px}}
"""
