"""Result rows and the JSONL file that holds them: what a run measured, written as it goes, resumable."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from klas_hf.files import write_atomically
from klas_hf.paths import Stitch

_REPORTED = ("klas_hf", "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers")


@dataclass(frozen=True)
class ResultRow:
    """One measured model.

    Attributes:
        rule: how the model was chosen: a selection rule, or "source" / "target" for an anchor itself.
        stitch: `(i, j)`, or None for a model that is no stitch, such as an anchor.
        seed: the seed that the row's random choices came from.
        macs: MACs of one sequence (or image) of the run's stated length.
        parameters: number of parameters.
        metrics: name → value.
        details: anything else worth keeping, as JSON values (training losses, R² of the stitching layer, …).
        anchors: positions of source and target in a list of more than two anchors; `(k, k)` for anchor k itself.

    Example:
        >>> row = ResultRow("klas", (8, 14), seed=0, macs=2_500_000, parameters=30_000, metrics={"loss": 3.1})
        >>> row.key, row.is_of(Stitch(8, 14))
        (('klas', (8, 14), 0, (0, 1)), True)
    """

    rule: str
    stitch: tuple[int, int] | None
    seed: int
    macs: int
    parameters: int
    metrics: Mapping[str, float]
    details: Mapping[str, Any] = field(default_factory=dict)
    anchors: tuple[int, int] = (0, 1)

    @property
    def key(self) -> tuple[str, tuple[int, int] | None, int, tuple[int, int]]:
        """What makes a row one of its kind in a run."""
        return self.rule, self.stitch, self.seed, self.anchors

    def value(self, metric: str) -> float:
        """One of the metrics.

        Raises:
            ValueError: the row has no such metric; those that it has are named.
        """
        if metric not in self.metrics:
            raise ValueError(
                f"got a row without {metric!r}; it has {sorted(self.metrics)}: expected rows measured alike, or one of "
                "these names"
            )
        return self.metrics[metric]

    def is_of(self, stitch: Stitch) -> bool:
        """Whether the row measured this `stitch`, of these anchors."""
        pair = stitch.source_stop, stitch.target_start
        return self.stitch == pair and self.anchors == (stitch.source, stitch.target)


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a result depends on."""
    versions = {}
    for name in _REPORTED:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


class RowFile:
    """A JSONL file of rows of one run; opening it again resumes it.

    The first line holds the run's settings (with anchors, revisions and library versions); each further line a
    row. A line that an interruption cut short is dropped.

    Args:
        path: the file; parents are made with the first row.
        run: the settings that all rows share, as JSON values. A later run must have the same.

    Raises:
        ValueError: the file holds another run's rows, or is no row file.

    Example:
        >>> file = RowFile(folder / "results.jsonl", {"data": "my_text", "tokens": 128})
        >>> for row in rows:
        ...     file.append(row)
        >>> again = RowFile(folder / "results.jsonl", {"data": "my_text", "tokens": 128})
        >>> again.rows == rows, again.find("target", None, seed=0).metrics
        (True, {'loss': 3.0})
    """

    def __init__(self, path: str | Path, run: Mapping[str, Any]):
        self.path = Path(path)
        self.run = json.loads(json.dumps(dict(run)))
        self.rows: list[ResultRow] = []
        if self.path.exists():
            self._read()

    def __iter__(self) -> Iterator[ResultRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def find(
        self, rule: str, stitch: Stitch | None, seed: int, anchors: tuple[int, int] | None = None
    ) -> ResultRow | None:
        """The row of this key, or None when it is still to be measured.

        Args:
            rule, stitch, seed: as in the row.
            anchors: where there is no stitch, the row's anchors; None: (0, 1). A stitch names its own.

        Raises:
            ValueError: anchors beside a stitch.
        """
        if stitch is None:
            pair, place = None, anchors or (0, 1)
        elif anchors is None:
            pair, place = (stitch.source_stop, stitch.target_start), (stitch.source, stitch.target)
        else:
            raise ValueError(
                f"got anchors={anchors} and the stitch {stitch}; expected no anchors: a stitch has its own"
            )
        return next((row for row in self.rows if row.key == (rule, pair, seed, place)), None)

    def append(self, row: ResultRow, *, to_disk: bool = True) -> None:
        """Write a `row`; it is on disk when this returns, unless another process writes it (`to_disk=False`)."""
        line = _line(asdict(row))
        self.rows.append(row)
        if not to_disk:
            return
        if not self.path.exists() or not self.path.stat().st_size:
            header = _line({"run": self.run, "versions": library_versions()})
            write_atomically(self.path, lambda part: part.write_text(header, encoding="utf-8"))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> None:
        whole, cut = _whole_lines(self.path)
        if not whole and not cut:
            return
        # The header is written whole, so a file that begins with anything else is someone else's: it is left alone.
        if not whole or not isinstance(whole[0], dict) or not isinstance(header := whole[0].get("run"), dict):
            raise ValueError(
                f"got {self.path}, whose first line has no run settings; expected a file of this program. "
                "Name another output folder"
            )
        if header != self.run:
            changed = sorted(k for k in header.keys() | self.run.keys() if header.get(k) != self.run.get(k))
            there, now = ({k: run.get(k) for k in changed} for run in (header, self.run))
            raise ValueError(
                f"{self.path} holds the rows of another run, which differs in {', '.join(changed)} "
                f"(there: {there}; now: {now}). "
                "Name another output folder, or repeat the settings of that run to resume it"
            )
        self.rows = [_row(line) for line in whole[1:]]
        if cut:
            with self.path.open("r+b") as file:
                file.truncate(file.seek(0, os.SEEK_END) - cut)


def _row(line: dict[str, Any]) -> ResultRow:
    stitch = line.pop("stitch")
    first, second = line.pop("anchors", (0, 1))  # files of older versions know of two anchors only
    return ResultRow(stitch=None if stitch is None else (stitch[0], stitch[1]), anchors=(first, second), **line)


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _whole_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The JSON lines of a file, and the length in bytes of an unfinished last line."""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    try:
        return [json.loads(line) for line in content[:end].splitlines()], len(content) - end
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"got {path}, which is not JSONL: {error}. Name another output folder") from error


def format_table(rows: Iterable[ResultRow], metrics: Sequence[str], total_macs: int | None = None) -> str:
    """Rows as a Markdown table, cheapest first; the mean and its standard error where seeds repeat a row.

    The anchors of each row are shown where there are more than the two.

    Args:
        rows: measured models.
        metrics: which figures to show.
        total_macs: MACs that count as 100 %; None leaves that column out.

    Returns:
        The table; parameters and MACs are in millions.

    Raises:
        ValueError: a row lacks a metric.

    Example:
        >>> seeds = [ResultRow("klas", (8, 14), seed, 2_500_000, 30_000, {"loss": 3.0 + seed}) for seed in (0, 1)]
        >>> print(format_table(seeds, ["loss"], total_macs=5_000_000))
        | rule | stitch  | M parameters | M MACs | of target | loss            |
        |------|---------|--------------|--------|-----------|-----------------|
        | klas | (8, 14) | 0.03         | 2.5    | 50%       | 3.5000 ± 0.5000 |
    """
    groups: dict[tuple[int, str, Any, tuple[int, int]], list[ResultRow]] = {}
    for row in rows:
        groups.setdefault((row.macs, row.rule, row.stitch, row.anchors), []).append(row)
    several = any(anchors != (0, 1) for *_, anchors in groups)
    share = ["of target"] if total_macs else []
    lines = [["rule", *(["anchors"] if several else []), "stitch", "M parameters", "M MACs", *share, *metrics]]
    for (macs, rule, stitch, anchors), group in sorted(groups.items(), key=lambda item: item[0][:2]):
        cells = [
            rule,
            *([_anchors(anchors)] if several else []),
            "–" if stitch is None else str(tuple(stitch)),
            f"{group[0].parameters / 1e6:.2f}",
            f"{macs / 1e6:,.1f}",
        ]
        cells += [f"{macs / total_macs:.0%}"] if total_macs else []
        lines.append(cells + [_mean_and_error([row.value(name) for row in group]) for name in metrics])
    return markdown_table(lines)


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table whose columns line up; the first line is the heading."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rule_line = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([padded[0], rule_line, *padded[1:]])


def _anchors(anchors: tuple[int, int]) -> str:
    first, second = anchors
    return str(first) if first == second else f"{first}→{second}"


def _mean_and_error(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{fmean(values):.4f} ± {stdev(values) / len(values) ** 0.5:.4f}"
