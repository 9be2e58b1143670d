"""How costs grow: seconds, and memory beside the models, against tokens, blocks, anchors, vocabulary and processes.

Thin Llamas of random weights, scored by default settings (against anchors: searched, with what may be spent held); each
point is a process of its own. Both axes are logarithmic, so that what grows in proportion runs beside the dashed line.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.measuring import growth_of, in_child
from benchmarks.models import llamas, sequences
from benchmarks.options import Options
from klas_hf import FunctionalScoring, SearchConfig, score_stitches, search_paths

TORCHRUN = ("-m", "torch.distributed.run", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0")
LABELS = {"seconds": "seconds", "peak": "MiB beside the models"}


def axes(options: Options) -> dict[str, list[int]]:
    """What grows, and how."""
    if options.quick:
        return {"tokens": [64, 128], "processes": [1, 2]}
    return {
        "tokens": [1024, 2048, 4096, 8192, 16384], "blocks": [4, 8, 12, 16], "anchors": [1, 2, 3, 4],
        "vocabulary": [8192, 16384, 32768, 65536, 131072], "processes": [1, 2],
    }  # fmt: skip


def plot(options: Options, output: Path) -> None:
    """Measure every point, write growth.jsonl, and draw growth.png and growth.svg from it."""
    rows = []
    for what, points in axes(options).items():
        for x in points:
            launcher = (*TORCHRUN, "--nproc_per_node", str(x)) if what == "processes" else ()
            found = in_child(options, "growth:point", what, x, launcher=launcher)
            rows.append({"what": what, "x": x} | found)
            print(json.dumps(rows[-1]), flush=True)
    (output / "growth.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    draw(rows, output / "growth")


def point(options: Options, what: str, x: int) -> Mapping[str, float]:
    """One point; all that does not grow stays as it is."""
    changed: dict[str, Any] = {"vocabulary": 2048, "blocks": 6, "scale": 16} | (
        {what: x} if what in ("vocabulary", "blocks") else {}
    )
    told = replace(options, **changed)
    tokens = x if what == "tokens" else 128 if options.quick else 2048
    count = tokens // told.tokens
    data, fitting = sequences(told, count), sequences(told, count, seed=1)
    scoring = FunctionalScoring(calibration=fitting, scored_items=None)
    small, large = llamas(told, 16)
    score_stitches(small, large, data[:1], functional=replace(scoring, calibration=fitting[:1]))  # to warm up
    if what == "anchors":
        models = [one for _ in range((x + 1) // 2) for one in llamas(told, 16)][:x]
        config = SearchConfig(scoring=replace(scoring, temperature=1.0), forwards=20_000)
        return growth_of(lambda: search_paths(models, data, config, tokens=told.tokens))
    return growth_of(lambda: score_stitches(small, large, data, tokens=told.tokens, functional=scoring))


def draw(rows: list[dict[str, Any]], stem: Path) -> None:
    """Seconds above, memory below, one column for each thing that grows."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["what"] for row in rows))
    figure = Figure(figsize=(2.9 * len(names), 5.2), layout="constrained")
    for line, (key, label) in enumerate(LABELS.items()):
        for column, name in enumerate(names):
            of_name = [row for row in rows if row["what"] == name]
            x, y = [row["x"] for row in of_name], [row[key] for row in of_name]
            panel = figure.add_subplot(len(LABELS), len(names), line * len(names) + column + 1)
            panel.plot(x, y, marker="o", markersize=5, linewidth=1.3)
            panel.plot(x, [y[0] * one / x[0] for one in x], color="gray", linestyle="--", linewidth=0.8)
            panel.set(xscale="log", yscale="log", ylim=(0.5 * min(y), 2 * max(y)))
            panel.set_xticks(x, [f"{one:,}" for one in x], rotation=30, fontsize=7)
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            if line:
                panel.set_xlabel(name)
            if not column:
                panel.set_ylabel(label)
    for suffix in (".png", ".svg"):
        figure.savefig(stem.with_suffix(suffix), dpi=130)
