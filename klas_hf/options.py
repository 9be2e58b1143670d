"""Options of a recipe or a command: dataclasses, filled from a YAML file (`--config`) and then the command line.

jsonargparse reads each word by the type of its field. A value in the file is read as the same word on the command line
would be, so that `no`, `8e-2`, or one value for a list, mean the same in both.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser

_NULL = ("null", "~", "")


def parse_options(*kinds: type, argv: Sequence[str] | None = None, description: str | None = None) -> tuple[Any, ...]:
    """Fill dataclasses from `--config file.yaml`, if given, and the other options, which win over it.

    Args:
        kinds: dataclasses; their fields are the options, with the help in the field's metadata.
        argv: the options; None takes the command line's.
        description: what `--help` says first.

    Raises:
        SystemExit: a bad, unknown or missing option, on the command line or in the file, with a message on stderr.
    """
    parser = OptionParser(description=description, usage="%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]")
    for kind in kinds:
        parser.add_options(kind)
    parser.add_argument("--config", metavar="FILE.yaml", default=argparse.SUPPRESS, help="any of these options")
    given = parser.given(sys.argv[1:] if argv is None else argv, kinds)
    try:
        return tuple(filled(kind, given) for kind in kinds)
    except (ValueError, TypeError) as error:
        parser.error(str(error))


def filled(kind: type, given: Mapping[str, Any]) -> Any:
    """A dataclass of the options given; a dataclass among its fields is made where one of that one's options is given.

    Raises:
        ValueError: a field without a default is not given, or what the dataclass itself raises.
    """
    values, hints = dict[str, Any](), _hints(kind)
    for one in fields(kind):
        part = _dataclass(hints[one.name])
        if one.name in given:
            is_pair = isinstance(given[one.name], list) and get_origin(_without_none(hints[one.name])[0]) is tuple
            values[one.name] = tuple(given[one.name]) if is_pair else given[one.name]
        elif part and (inner := {name: given[name] for name in names(part) & given.keys()}):
            default = one.default if one.default_factory is MISSING else one.default_factory()
            values[one.name] = filled(part, inner) if default in (None, MISSING) else replace(default, **inner)
        elif one.default is MISSING and one.default_factory is MISSING:
            raise ValueError(f"got no --{one.name}; expected {one.metadata.get('help', 'a value')}")
    return kind(**values)


def names(*kinds: type) -> set[str]:
    """Options that dataclasses have; a dataclass among the fields has its own in place of the field."""
    found: set[str] = set()
    for kind in kinds:
        for name, hint in _hints(kind).items():
            part = _dataclass(hint)
            found |= names(part) if part else {name}
    return found


def named_as_options(message: str, *kinds: type) -> str:
    """A message in which what Python calls `labels=` is called `--labels`, as the user of the options does."""
    known = "|".join(names(*kinds))
    return re.sub(rf"\b({known})=", r"--\1 ", message)


@contextmanager
def input_read(*options: Any) -> Iterator[None]:
    """End the program with one line on stderr where what the options name cannot be read or does not fit.

    Args:
        options: dataclasses that `parse_options` has filled.

    Raises:
        SystemExit: code 2, instead of an error of bad input.
    """
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        message = " ".join(named_as_options(str(error), *map(type, options)).split())
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        raise SystemExit(2) from error


class OptionHelp(argparse.HelpFormatter):
    """Each option under one name, with what it takes."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return ", ".join(action.option_strings) or super()._format_action_invocation(action)
        shown = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{action.option_strings[0]} {shown}"


class OptionParser(ArgumentParser):
    """jsonargparse's parser, with the fields of dataclasses as options; those that are not given stay out."""

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=OptionHelp, allow_abbrev=False, **kwargs)
        self.known: dict[str, bool] = {}  # option → whether None is one of its values

    def add_options(self, kind: type, *, required: bool = False, explained: bool = True) -> None:
        """Add the fields of a dataclass, and of dataclasses among them, that are not there yet.

        Args:
            kind: `metadata` of its fields holds the help and perhaps `metavar`, `nargs`, `type`, `action`, or
                `positional`, for a field that is given by its place.
            required: fields without a default must be among the words; False: they may come from a file.
            explained: whether `--help` shows them.
        """
        hints = _hints(kind)
        for one in fields(kind):
            part = _dataclass(hints[one.name])
            if part:
                self.add_options(part, explained=explained)
            elif one.name not in self.known:
                self.known[one.name] = _without_none(hints[one.name])[1]
                default = one.default if one.default_factory is MISSING else one.default_factory()
                self._add(one.name, hints[one.name], default, dict(one.metadata), required, explained)

    def _add(
        self, name: str, hint: Any, default: Any, metadata: dict[str, Any], required: bool, explained: bool
    ) -> None:
        positional = metadata.pop("positional", False)
        form = ({} if "action" in metadata else _form(hint)) | metadata
        if not explained:
            form["help"] = argparse.SUPPRESS
        elif default not in (None, False, MISSING):
            shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else default
            form["help"] = f"{form.get('help', '')} (default: {shown})"
        if positional:
            self.add_argument(name, **form)
            return
        flags = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        if required and default is MISSING:
            form["required"] = True
        self.add_argument(*flags, default=argparse.SUPPRESS, **form)

    def given(self, words: Sequence[str], kinds: Sequence[type] = ()) -> dict[str, Any]:
        """Values of the file that `--config` names, if any, and of the words, which win.

        Args:
            kinds: dataclasses whose options may stand in the file.

        Raises:
            SystemExit: bad or unknown words, or a file that cannot be read or holds such, with a message on stderr.
        """
        found = dict(vars(self.parse_args(list(words))))
        path = found.pop("config", None)
        if path is None:
            return found
        try:
            return read_settings(path, kinds) | found
        except (ValueError, OSError, argparse.ArgumentError) as error:
            self.error(f"{path}: {error}" if isinstance(error, argparse.ArgumentError) else str(error))


def read_settings(path: str | Path, kinds: Sequence[type]) -> dict[str, Any]:
    """The options of a YAML file, typed.

    Args:
        kinds: dataclasses whose options may stand in it.

    Raises:
        ValueError: the file is no YAML mapping of known options to values.
        OSError: it cannot be read.
        argparse.ArgumentError: a value that is not of the option's type.
    """
    try:
        settings = yaml.load(Path(path).read_text(encoding="utf-8"), yaml.BaseLoader) or {}  # every value as it stands
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"got {path}, which is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"got {path} with a {type(settings).__name__}; expected a mapping of options to values")
    nested = {name for kind in kinds for name, hint in _hints(kind).items() if _dataclass(hint)}
    parts = {name: settings.pop(name) for name in nested & settings.keys()}
    for part in parts.values():  # `augmentation: {mixup: 0.8}` is the same as `mixup: 0.8`
        settings |= part if isinstance(part, dict) else {}
    if unknown := sorted(settings.keys() - names(*kinds)):
        raise ValueError(
            f"got {path} with the unknown options {unknown}; expected some of {', '.join(sorted(names(*kinds)))}"
        )
    parser = OptionParser(exit_on_error=False, add_help=False)
    for kind in kinds:
        parser.add_options(kind)
    nothing = {name: None for name, value in settings.items() if value in _NULL and parser.known[name]}
    words: list[str] = []
    for name, value in settings.items():
        if name not in nothing:
            words += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return {name: None for name, part in parts.items() if part in _NULL} | nothing | parser.given(words)


def _hints(kind: type) -> dict[str, Any]:
    """The type of each field."""
    hints = get_type_hints(kind)
    return {one.name: hints[one.name] for one in fields(kind)}


def _dataclass(hint: Any) -> type | None:
    """The dataclass of a field that holds one or None."""
    inner, _ = _without_none(hint)
    return inner if isinstance(inner, type) and is_dataclass(inner) else None


def _form(hint: Any) -> dict[str, Any]:
    """What jsonargparse is to read for a type: `list[int] | None` is one or more int, `tuple[int, int]` two."""
    inner, _ = _without_none(hint)
    if get_origin(inner) is list:
        return {"type": get_args(inner)[0], "nargs": "+"}
    if get_origin(inner) is tuple:
        return {"type": get_args(inner)[0], "nargs": len(get_args(inner))}
    return {"type": hint} | ({"nargs": "?", "const": True} if inner is bool else {})


def _without_none(hint: Any) -> tuple[Any, bool]:
    """The type without its None, and whether it had one."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return (kinds[0], True) if NoneType in get_args(hint) and len(kinds) == 1 else (hint, False)
