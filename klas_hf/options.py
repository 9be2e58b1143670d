"""Options of a recipe: dataclasses, filled from a YAML file (`--config`) and then from the command line."""

import sys
from collections.abc import Sequence
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
    path = _config_path(argv)
    if path is not None:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        known = {action.dest for action in parser._actions} - {"help", "config"}
        unknown = sorted(settings.keys() - known)
        if unknown:
            raise ValueError(f"got {path} with the unknown options {unknown}; expected some of {sorted(known)}")
        parser.set_defaults(**settings)
        for action in parser._actions:
            action.required = action.required and action.dest not in settings
    *filled, _ = parser.parse_args_into_dataclasses(argv)
    return tuple(filled)


def _config_path(argv: Sequence[str]) -> str | None:
    for place, word in enumerate(argv):
        if word == "--config" and place + 1 < len(argv):
            return argv[place + 1]
        if word.startswith("--config="):
            return word.removeprefix("--config=")
    return None
