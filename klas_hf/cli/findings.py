"""What an examination of two anchors finds: findings, each with its remedy, and what would be read from disk."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: "ok"; "warning", something to know of; "problem", which makes stitching fail or go wrong.
        subject: what was looked at.
        found: what was found.
        remedy: what to do; empty where nothing is to be done, or where `found` says it.

    Example:
        >>> finding = Finding("warning", "licence", "the anchors' cards state none", "look for it")
        >>> finding.level, finding.remedy
        ('warning', 'look for it')
    """

    level: Level
    subject: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Reading:
    """What a stitched model takes from one anchor.

    Attributes:
        anchor: Hub id or folder.
        files: the safetensors files that are opened.
        all_files: how many files the anchor has.
        tensors: number of tensors that are read.
        bytes: that they take on disk.
        parameters: numbers in them.
    """

    anchor: str
    files: tuple[str, ...]
    all_files: int
    tensors: int
    bytes: int
    parameters: int


@dataclass(frozen=True)
class Examination:
    """What was found of two anchors.

    Attributes:
        source, target: Hub ids or folders.
        stitch: the stitch that was asked about, or None.
        findings: in the order in which they were made.
        readings: of source and target, for the stitch; empty where none was asked about or it cannot be made.
        memory: dtype → bytes that the stitched model takes; None as for readings.

    Example:
        >>> findings = Finding("ok", "kind", "two language models"), Finding("warning", "tokenizer", "none")
        >>> found = Examination("small", "large", None, findings)
        >>> found.ok, found.count("warning"), found.of("kind")[0].found
        (True, 1, 'two language models')
    """

    source: str
    target: str
    stitch: tuple[int, int] | None
    findings: tuple[Finding, ...]
    readings: tuple[Reading, ...] = ()
    memory: dict[str, int] | None = None

    @property
    def ok(self) -> bool:
        """Whether there is no problem; warnings do not count."""
        return not self.count("problem")

    def count(self, level: Level) -> int:
        """How many findings are of this `level`."""
        return sum(finding.level == level for finding in self.findings)

    def of(self, subject: str) -> tuple[Finding, ...]:
        """The findings about one `subject`."""
        return tuple(finding for finding in self.findings if finding.subject == subject)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"ok": self.ok, **asdict(self)}


def ok(subject: str, found: str) -> Finding:
    return Finding("ok", subject, found)


def warning(subject: str, found: str, remedy: str = "") -> Finding:
    return Finding("warning", subject, found, remedy)


def problem(subject: str, found: str, remedy: str = "") -> Finding:
    return Finding("problem", subject, found, remedy)


def attempted(subject: str, check: Callable[[], str]) -> Finding:
    """What a check returns is fine; the ValueError or OSError that it raises is a problem, remedy and all."""
    try:
        return ok(subject, check())
    except (ValueError, OSError) as error:
        return problem(subject, str(error))
