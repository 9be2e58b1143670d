"""How a command is described and its words are read: a dataclass of options, a function, and the help of both.

Options are fields of a frozen dataclass with the help in their metadata, as in the recipes (`klas_hf.options`).
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from klas_hf.options import OptionParser, filled, named_as_options, names


def positional(help: str, metavar: str | None = None) -> Any:
    """A field that is given by its place; a list takes one word or more."""
    return field(metadata={"positional": True, "help": help, "metavar": metavar})


def two(help: str, kind: type, metavar: tuple[str, str], *, required: bool = False) -> Any:
    """A field that takes two values, None where it is not given."""
    metadata = {"help": help, "type": kind, "nargs": 2, "metavar": metavar}
    return field(metadata=metadata | {"required": True}) if required else field(default=None, metadata=metadata)


def flag(help: str) -> Any:
    """A field that is False until its name is given, without a value."""
    return field(default=False, metadata={"action": "store_true", "help": help})


@dataclass(frozen=True)
class Command:
    """One command of `klas-hf`.

    Attributes:
        description: what it does, and what `--help` says first.
        options: dataclass of its options.
        run: does the work; takes the options, and the settings as a mapping where there are any; gives the exit code.
        settings: gives the dataclass of further settings, shared with the recipes: named, not explained, by `--help`;
            they may stand in a YAML file too, and only those given reach `run`.
    """

    description: str
    options: type
    run: Callable[..., int]
    settings: Callable[[], type] | None = None

    def __call__(self, name: str, words: Sequence[str]) -> int:
        """Read the words and run.

        Raises:
            SystemExit: unknown or missing options (code 2), or help was asked for (0), as argparse does.
        """
        kinds = () if self.settings is None else (self.settings(),)
        given = self._parser(name, kinds).given(words, kinds)
        given.pop("traceback", None)
        arguments = [{key: given[key] for key in names(kind) & given.keys()} for kind in kinds]
        try:
            return self.run(filled(self.options, given), *arguments)
        except (ValueError, TypeError, OSError) as error:
            if type(error) not in (ValueError, TypeError, OSError) or len(error.args) != 1:
                raise
            raise type(error)(named_as_options(str(error), self.options, *kinds)) from error

    def _parser(self, name: str, kinds: Sequence[type]) -> OptionParser:
        parser = OptionParser(prog=f"klas-hf {name}", description=self.description)
        parser.add_options(self.options, required=True)
        parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
        for kind in kinds:
            parser.add_options(kind, explained=False)
            parser.add_argument(
                "--config", metavar="FILE.yaml", default=argparse.SUPPRESS,
                help="any of the settings below; the command line wins",
            )  # fmt: skip
            parser.add_argument("--settings", action=_Explanation, kind=kind, help="explain the settings and exit")
            parser.epilog = "settings, as in the recipes: " + " ".join(sorted(names(kind)))
        return parser


class _Explanation(argparse.Action):
    """Print what every setting means, and exit."""

    def __init__(self, *args: Any, kind: type, **kwargs: Any):
        super().__init__(*args, **kwargs | {"nargs": 0, "default": argparse.SUPPRESS})
        self.kind = kind

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        explained = OptionParser(usage=argparse.SUPPRESS, add_help=False)
        explained.add_options(self.kind)
        print(f"{self.kind.__name__}: {(self.kind.__doc__ or '').strip().splitlines()[0]}")
        print(explained.format_help())
        parser.exit()
