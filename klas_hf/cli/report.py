"""`klas-hf report`: one HTML file that shows an output folder, to be sent, kept and read anywhere."""

from dataclasses import dataclass, field
from pathlib import Path

from klas_hf.cli.output import OVERWRITE, check_output, say
from klas_hf.cli.parsing import Command, flag, positional
from klas_hf.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of `klas-hf report`."""

    folder: str = positional("output folder of a recipe, or one with the rows of `evaluate`", metavar="OUTPUT")
    page: str | None = field(default=None, metadata={"metavar": "FILE", "help": "without it, OUTPUT/report.html"})
    overwrite: bool = flag(OVERWRITE)


def run(options: ReportOptions) -> int:
    """Run `klas-hf report`; its exit status."""
    from klas_hf.hub.page import results_page

    path = Path(options.page) if options.page else Path(options.folder) / "report.html"
    text = results_page(options.folder)
    check_output(path, options.overwrite)
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))
    say(f"Made {path} ({len(text.encode()) / 1e3:,.0f} kB)")
    return 0


COMMAND = Command(
    "Make one HTML page of an output folder: curves, tables, heatmaps, where each number is from, how to repeat it.",
    ReportOptions,
    run,
)
