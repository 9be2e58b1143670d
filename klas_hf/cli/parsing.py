"""How a command is described and its words are read: a dataclass of options, a function, and the help of both.

Options are fields of a frozen dataclass with the help in their metadata, as in the recipes, and are parsed by
transformers' HfArgumentParser; `positional`, `two` and `flag` add the forms that it lacks.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, get_args

from transformers import HfArgumentParser

from klas_hf.options import read_settings


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
        settings: dataclasses of further settings, shared with the recipes: named, not explained, by `--help`; they may
            stand in a YAML file too, and only those given reach `run`.
    """

    description: str
    options: type
    run: Callable[..., int]
    settings: tuple[type, ...] = ()

    def __call__(self, name: str, words: Sequence[str]) -> int:
        """Read the words and run.

        Raises:
            SystemExit: unknown or missing options (code 2), or help was asked for (0), as argparse does.
        """
        found = vars(self._parser(name, words).parse_args(list(words)))
        options = self.options(**{one.name: found[one.name] for one in fields(self.options)})
        if not self.settings:
            return self.run(options)
        names = _names(self.settings)
        return self.run(options, {key: value for key, value in found.items() if key in names})

    def _parser(self, name: str, words: Sequence[str]) -> argparse.ArgumentParser:
        parser = _CommandParser(
            self.options, prog=f"klas-hf {name}", description=self.description, formatter_class=_Help,
            allow_abbrev=False, conflict_handler="resolve",
        )  # fmt: skip
        parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
        if self.settings:
            self._add_settings(parser, words)
        return parser

    def _add_settings(self, parser: "_CommandParser", words: Sequence[str]) -> None:
        own = {action.dest for action in parser._actions}
        for kind in self.settings:
            parser._add_dataclass_arguments(kind)
        for action in parser._actions:
            if action.dest not in own:
                action.default = action.help = argparse.SUPPRESS
        parser.add_argument("--config", metavar="FILE.yaml", help="any of the settings below; the command line wins")
        parser.add_argument(
            "--settings", action=_Explanation, nargs=0, kinds=self.settings, help="explain the settings and exit"
        )
        parser.epilog = "settings, as in the recipes: " + " ".join(sorted(_names(self.settings)))
        read_settings(parser, words, known=_names(self.settings))


class _CommandParser(HfArgumentParser):
    """HfArgumentParser with positional fields, pairs and plain flags."""

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: Field) -> None:
        metadata: dict[str, Any] = dict(field.metadata)
        if metadata.pop("positional", False):
            metadata |= {"nargs": "+"} if get_args(field.type) else {}
            parser.add_argument(field.name, **metadata)
        elif "action" in metadata or "nargs" in metadata:
            parser.add_argument(f"--{field.name}", **metadata)
        else:
            HfArgumentParser._parse_dataclass_field(parser, field)


class _Explanation(argparse.Action):
    """Print what every setting means, and exit."""

    def __init__(self, *args: Any, kinds: Sequence[type], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.kinds = kinds

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        for kind in self.kinds:
            print(f"{kind.__name__}: {(kind.__doc__ or '').strip().splitlines()[0]}")
            print(_CommandParser(kind, usage=argparse.SUPPRESS, add_help=False, formatter_class=_Help).format_help())
        parser.exit()


class _Help(argparse.HelpFormatter):
    """Each option under one name, with its default where it has one."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return ", ".join(action.option_strings) or super()._format_action_invocation(action)
        shown = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{action.option_strings[0]} {shown}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.option_strings and action.default not in (None, False, argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if has_default else action.help


def _names(kinds: Sequence[type]) -> set[str]:
    return {one.name for kind in kinds for one in fields(kind)}
