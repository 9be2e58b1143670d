"""All that klas_hf is to cost, as one table of ratios measured in one run.

    python -m benchmarks                                        # the table, into outputs/benchmarks
    python -m benchmarks --only assembly running                # some groups; the table keeps the others' last figures
    python -m benchmarks --growth                               # time and memory against sizes, plotted
    python -m benchmarks --only scoring running --scale 1 --blocks 16 --vocabulary 128256 --dtype bfloat16 --device cuda

Each figure stands beside its bound in DESIGN.md or a peer, measured in the same run. Other work on the machine slows
both, but not always alike: for figures to be kept, let nothing else run.
"""

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from transformers import HfArgumentParser

from benchmarks.measuring import HEADING, Figure
from benchmarks.options import Options
from klas_hf.rows import library_versions
from klas_hf.tables import markdown_table

GROUPS = ("divergences", "assembly", "merging", "running", "scoring", "probing", "training", "counting")


def main() -> None:
    parser = HfArgumentParser(Options, prog="python -m benchmarks", description=__doc__.split("\n")[0])
    options = parser.parse_args_into_dataclasses()[0].settled()
    if unknown := sorted(set(options.only or ()) - set(GROUPS)):
        parser.error(f"got --only {' '.join(unknown)}; expected some of {', '.join(GROUPS)}")
    options.prepare()
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    if options.growth:
        import_module("benchmarks.growth").plot(options, output)
        return
    rows = output / "rows.jsonl"
    for group in options.only or GROUPS:
        made: Callable[[Options], Iterator[Figure]] = import_module(f"benchmarks.{group}").figures
        begun = time.perf_counter()
        for figure in made(options):
            print(markdown_table([HEADING, figure.cells]).splitlines()[-1], file=sys.stderr, flush=True)
            with rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_row(group, figure, options), ensure_ascii=False) + "\n")
        print(f"{group}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    table = ("Tiny sizes, to see that all runs: no result.\n\n" if options.quick else "") + table_of(rows)
    (output / "table.md").write_text(table, encoding="utf-8")
    print(table)


def _row(group: str, figure: Figure, options: Options) -> dict[str, object]:
    machine = f"{platform.machine()}, {options.threads} thread(s)"
    told = {name: value for name, value in asdict(options).items() if name not in ("only", "output", "growth")}
    made = {"group": group, "ratio": figure.ratio, "machine": machine, "options": told, "versions": library_versions()}
    return asdict(figure) | made


def table_of(rows: Path) -> str:
    """The last measurement of everything in a file of rows, as Markdown; ratios beyond their aims are bold."""
    last: dict[tuple[str, str], Figure] = {}
    for line in rows.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        figure = Figure(**{name: row[name] for name in Figure.__dataclass_fields__})
        last[figure.what, figure.against] = figure
    return markdown_table([HEADING, *(figure.cells for figure in last.values())]) + "\n"


if __name__ == "__main__":
    main()
