"""`klas-hf doctor`: what is to be known of a pair of anchors before anything is loaded; exit code 1 for problems."""

import textwrap
from dataclasses import dataclass, field

from klas_hf.cli.findings import Examination, Finding
from klas_hf.cli.output import say, say_json
from klas_hf.cli.parsing import Command, flag, positional, two
from klas_hf.paths import Stitch

_WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Options of `klas-hf doctor`."""

    source: str = positional("the cheaper anchor: Hub id or folder")
    target: str = positional("the dearer anchor")
    stitch: list[int] | None = two("also say what this stitch reads and costs", int, ("I", "J"))
    length: int = field(default=128, metadata={"metavar": "N", "help": "tokens that MACs are counted for"})
    json: bool = flag("print JSON")


def run(options: DoctorOptions) -> int:
    """Run `klas-hf doctor`; its exit status."""
    from klas_hf.cli.examination import examine_anchors

    stitch = None if options.stitch is None else Stitch(*options.stitch)
    found = examine_anchors(options.source, options.target, stitch=stitch, tokens=options.length)
    if options.json:
        say_json(found.to_dict())
    else:
        say("\n".join([*map(_lines, found.findings), _summary(found)]))
    return 0 if found.ok else 1


def _lines(finding: Finding) -> str:
    head = f"{finding.level:<9}{finding.subject:<17}"
    text = finding.found + (f"\n→ {finding.remedy}" if finding.remedy else "")
    wrapped = [part for line in text.splitlines() for part in textwrap.wrap(line, _WIDTH - len(head))]
    return head + ("\n" + " " * len(head)).join(wrapped)


def _summary(found: Examination) -> str:
    problems, warnings = found.count("problem"), found.count("warning")
    return f"\n{problems} problem{'s' * (problems != 1)}, {warnings} warning{'s' * (warnings != 1)}"


COMMAND = Command(
    "Check a pair of anchors before anything is loaded: configurations, tokenizers, cards and file headers are read, "
    "no weights. Exit code 1 if there is a problem.",
    DoctorOptions,
    run,
)
