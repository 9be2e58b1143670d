"""Options of a recipe or a command: dataclasses, filled from a YAML file (`--config`) and then the command line."""

import sys
from argparse import ArgumentParser
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def parse_options(*kinds: type, argv: Sequence[str] | None = None, description: str | None = None) -> tuple[Any, ...]:
    """Fill dataclasses from `--config file.yaml`, if given, and the other options, which win over it.

    Args:
        kinds: dataclasses; their fields are the options, with the help in the field's metadata.
        argv: the options; None takes the command line's.
        description: what `--help` says first.

    Raises:
        ValueError: the file has a key that is no option; the known ones are named.
        SystemExit: a bad or missing option, as argparse does.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(kinds, description=description)
    parser.add_argument("--config", help="YAML file with any of these options; the command line wins")
    read_settings(parser, argv, known={action.dest for action in parser._actions} - {"help", "config"})
    *filled, _ = parser.parse_args_into_dataclasses(argv)
    return tuple(filled)


def read_settings(parser: ArgumentParser, argv: Sequence[str], known: Collection[str]) -> None:
    """Make the settings of the file that `--config` names, if it is given, the parser's defaults.

    Args:
        known: options that may stand in the file.

    Raises:
        ValueError: the file is no YAML mapping, or has another key.
    """
    path = _config_path(argv)
    if path is None:
        return
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"got {path}, which is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"got {path} with a {type(settings).__name__}; expected a mapping of options to values")
    unknown = sorted(settings.keys() - set(known))
    if unknown:
        raise ValueError(f"got {path} with the unknown options {unknown}; expected some of {sorted(known)}")
    parser.set_defaults(**settings)
    for action in parser._actions:
        action.required = action.required and action.dest not in settings


def _config_path(argv: Sequence[str]) -> str | None:
    for place, word in enumerate(argv):
        if word == "--config" and place + 1 < len(argv):
            return argv[place + 1]
        if word.startswith("--config="):
            return word.removeprefix("--config=")
    return None
