"""Result rows and the JSONL file that holds them: what a run measured, written as it goes, resumable."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path as File
from typing import Any

from klas_hf.budgets import COSTS
from klas_hf.files import Claim, claim, write_atomically
from klas_hf.paths import Path, Stitch

AnyPath = Path | Stitch | str | tuple[int, ...]

_REPORTED = ("klas_hf", "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers")


@dataclass(frozen=True)
class ResultRow:
    """One measured model.

    A row says all that its figures depend on beside what its whole file has in common (`RowFile.run`, and the
    versions of the libraries): another path, seed, training, setting or other weights make another row.

    Attributes:
        rule: how the model was chosen: a selection rule, or "source" / "target" for an anchor itself.
        path: the path through the anchors, such as "0[:8] 1[14:]", or "1[:]" for an anchor; given as a `Path`, a
            `Stitch` or a pair `(i, j)`, it is written as text. None: what no path names.
        seed: the seed that the row's random choices came from.
        macs: MACs of one sequence (or image) of the run's stated length.
        parameters: number of parameters.
        metrics: name → value.
        details: anything else worth keeping, as JSON values (training losses, R² of the stitching layer, …).
        training: how the model was fine-tuned (settings, data, teacher), as JSON values; None: it was not.
        made_from: what identifies the weights that it was made of: fingerprints, or Hub ids with commits.
        setting: what else the figures depend on, as JSON values: the length that costs are for, classes, ….

    Raises:
        TypeError, ValueError: a path that is none.

    Example:
        >>> row = ResultRow("klas", (8, 14), seed=0, macs=2_500_000, parameters=30_000, metrics={"loss": 3.1})
        >>> row.path, row.stitch == Stitch(8, 14), row.is_of(Stitch(8, 14)), row.joints
        ('0[:8] 1[14:]', True, True, 1)
    """

    rule: str
    path: AnyPath | None
    seed: int
    macs: int
    parameters: int
    metrics: Mapping[str, float]
    details: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] | None = None
    made_from: Sequence[str] = ()
    setting: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", None if self.path is None else str(Path.of(self.path)))
        object.__setattr__(self, "made_from", tuple(self.made_from))
        for name, kind, expected in (
            ("rule", str, "a name"),
            ("seed", int, "a whole number"),
            ("macs", int, "a whole number"),
            ("parameters", int, "a whole number"),
            ("metrics", Mapping, "a number by each name"),
            ("details", Mapping, "values by name"),
            ("training", Mapping | None, "settings by name, or None"),
            ("setting", Mapping, "values by name"),
        ):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"got {name}={getattr(self, name)!r}; expected {expected}")
        if not all(isinstance(one, int | float) for one in self.metrics.values()):
            raise TypeError(f"got metrics={self.metrics!r}; expected a number by each name")
        for name in ("training", "setting"):  # as a file gives them back
            object.__setattr__(self, name, json.loads(json.dumps(getattr(self, name))))

    @property
    def measurement(self) -> str:
        """All that the figures depend on, whatever rule chose the model: rows that agree in it are one measurement."""
        return _line([self.path, self.seed, self.training, self.made_from, self.setting], sort_keys=True)

    @property
    def model(self) -> tuple[str, int, str]:
        """The model whose repetitions under other seeds are averaged: path (or rule), cost and training."""
        training = self.training and {name: value for name, value in self.training.items() if name != "seed"}
        return str(self.path or self.rule), self.macs, _line([training, self.setting], sort_keys=True)

    @property
    def joints(self) -> int:
        """Number of stitching layers: 0 for an anchor, and for what no path names."""
        return 0 if self.path is None else Path.of(self.path).joints

    @property
    def stitch(self) -> Stitch | None:
        """The stitch that the path is, if it is one."""
        return None if self.path is None else Path.of(self.path).stitch

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

    def cost(self, name: str) -> float:
        """One of the costs.

        Args:
            name: "macs", "parameters", or one that stands among the details, such as "latency".

        Raises:
            ValueError: the row has no such cost; those that it has are named.

        Example:
            >>> row = ResultRow("klas", (8, 14), 0, 2_500_000, 30_000, {"loss": 3.1}, {"latency": 0.02})
            >>> row.cost("macs"), row.cost("latency")
            (2500000, 0.02)
        """
        known = {"macs": self.macs, "parameters": self.parameters} | {
            one: value for one, value in self.details.items() if one in COSTS and isinstance(value, int | float)
        }
        if name not in known:
            raise ValueError(
                f"got cost={name!r} and a row that has {sorted(known)}; expected one of these. Seconds, and bytes of "
                "weights and activations, are in rows that were measured with usage=Usage(…), or --timed"
            )
        return known[name]

    def is_of(self, path: AnyPath) -> bool:
        """Whether the row measured this path through these anchors."""
        return self.path == str(Path.of(path))


def by_model(rows: Iterable[ResultRow]) -> list[list[ResultRow]]:
    """Rows in groups of one model each, in the order they come: its seeds, a row that several rules share once.

    Rows that agree in all but the weights they were made from, and in the seed too, are of different models.
    """
    groups: dict[tuple[Any, int], dict[str, ResultRow]] = {}
    alike: dict[tuple[Any, int], list[str]] = {}
    for row in rows:
        of_seed = alike.setdefault((row.model, row.seed), [])
        if row.measurement not in of_seed:
            of_seed.append(row.measurement)
        groups.setdefault((row.model, of_seed.index(row.measurement)), {})[row.measurement] = row
    return [list(group.values()) for group in groups.values()]


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

    The first line holds the run's settings and the library versions; each further line a row. Opening and reading
    never change the file: a line that an interruption cut short is left out, and cut off by the process that next
    writes a row. To read the rows of any run, use `read_rows`.

    Args:
        path: the file; parents are made with the first row.
        run: the settings that all rows share, as JSON values. A later run must have the same, and the same versions.

    Raises:
        ValueError: the file holds another run's rows, or is no row file.

    Example:
        >>> file = RowFile(folder / "results.jsonl", {"data": "my_text", "tokens": 128})
        >>> for row in rows:
        ...     file.append(row)
        >>> again = RowFile(folder / "results.jsonl", {"data": "my_text", "tokens": 128})
        >>> again.rows == rows, again.find(rows[-1]).metrics
        (True, {'loss': 3.0})
    """

    def __init__(self, path: str | File, run: Mapping[str, Any]):
        self.path = File(path)
        self.run = json.loads(json.dumps(dict(run)))
        self.rows: list[ResultRow] = []
        self._claim: Claim | None = None  # from the first row that is written
        self._whole = False  # whether this process has seen to it that the file ends with a whole line
        if self.path.exists():
            header, self.rows = _read(self.path)
            self._check(header)

    def __iter__(self) -> Iterator[ResultRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def find(self, like: ResultRow, *, any_rule: bool = False) -> ResultRow | None:
        """The row of a measurement, or None when it is still to be made.

        Args:
            like: a row that says what the figures are to depend on; its own figures, costs and details do not count.
            any_rule: take a row of another rule where there is none of this one.
        """
        found = [row for row in self.rows if row.measurement == like.measurement]
        of_rule = [row for row in found if row.rule == like.rule]
        return next(iter(of_rule or (found if any_rule else [])), None)

    def append(self, row: ResultRow, *, to_disk: bool = True) -> None:
        """Write a `row`; it is on disk when this returns, unless another process writes it (`to_disk=False`).

        Raises:
            BlockingIOError: another run writes to the file.
        """
        line = _line(asdict(row))
        if to_disk:
            self._claim = self._claim or claim(self.path)
        self.rows.append(row)
        if not to_disk:
            return
        if not self.path.exists() or not self.path.stat().st_size:
            header = _line({"run": self.run, "versions": library_versions()})
            write_atomically(self.path, lambda part: part.write_text(header, encoding="utf-8"))
        elif not self._whole:
            with self.path.open("r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
        self._whole = True
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def _check(self, header: Mapping[str, Any]) -> None:
        if not header:
            return
        there, now = header["run"] | header["versions"], self.run | library_versions()
        if changed := sorted(name for name in there.keys() | now.keys() if there.get(name, ...) != now.get(name, ...)):
            old, new = ({name: one.get(name) for name in changed} for one in (there, now))
            raise ValueError(
                f"{self.path} holds the rows of another run, which differs in {', '.join(changed)} "
                f"(there: {old}; now: {new}). "
                "Name another output folder, or repeat the settings and versions of that run to resume it"
            )


def read_rows(path: str | File) -> list[ResultRow]:
    """The rows of a file, whatever run wrote it; the file is only read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no file of rows, or one without any.
    """
    _, rows = _read(File(path))
    if not rows:
        raise ValueError(f"got {path} without a row; expected at least one measured model")
    return rows


def read_run(path: str | File) -> tuple[dict[str, Any], dict[str, str]]:
    """What the rows of a file have in common: the run's settings, and the versions of the libraries.

    Raises:
        FileNotFoundError, ValueError: as `read_rows`; an empty file has neither.
    """
    header, _ = _read(File(path))
    return header.get("run", {}), header.get("versions", {})


def _read(path: File) -> tuple[dict[str, Any], list[ResultRow]]:
    """Header and rows of a file, without a last line that was cut short; an empty file has neither."""
    content = path.read_bytes()
    if not content:
        return {}, []
    try:
        lines = [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"got {path}, which is not JSONL: {error}. Name another file of rows") from error
    # The header is written whole, so a file that begins with anything else is someone else's.
    header = lines[0] if lines and isinstance(lines[0], dict) else {}
    if not isinstance(header.get("run"), dict) or not isinstance(header.get("versions"), dict):
        raise ValueError(
            f"got {path}, whose first line has no run settings; expected rows.jsonl of this program. "
            "Name another file of rows"
        )
    try:
        return header, [ResultRow(**line) for line in lines[1:]]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"got {path}, with a line that is no row: {error}; expected a file of this version of klas_hf. Measure "
            "again into another file"
        ) from error


def _line(value: Any, *, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=sort_keys) + "\n"


def untuned_beside_tuned(rows: Iterable[ResultRow]) -> list[ResultRow]:
    """The rows of anchors that were not fine-tuned, where other models were: a comparison that is not fair."""
    rows = list(rows)
    tuned = any(row.training is not None for row in rows)
    return [row for row in rows if tuned and row.training is None and not row.joints]
