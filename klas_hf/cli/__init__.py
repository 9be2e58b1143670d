"""The command line `klas-hf`: thin commands over the public functions, with files in folders between them.

    doctor ─► score ─► select ─► stitch ─► train ─► evaluate ─► plot, report ─► card ─► push
              └────────────────── make ──────────────────┘

Exit codes: 0 done; 1 a failed check of `doctor`, or a failure while working; 2 bad usage or bad input; 130 interrupted.
An error is one message on stderr; `--traceback` adds where it comes from.
"""

import argparse
import errno
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

__all__ = ["main"]

# Command → its line in the help. Each has a module of its name, imported when the command runs.
_COMMANDS = {
    "make": "make the best model within a budget: all of the below in one",
    "doctor": "check a pair of anchors before anything is loaded",
    "score": "score all stitches between two anchors",
    "select": "choose stitches from a file of scores",
    "stitch": "join two anchors and save the stitched model",
    "train": "fine-tune a stitched model",
    "evaluate": "measure models: loss on text, accuracy on images",
    "plot": "draw the heatmap of scores, or the curve of measured models",
    "report": "make one HTML page of an output folder",
    "card": "write the model card of a stitched model",
    "draft": "say which paths of a supernet pay as drafts for another",
    "serve": "serve a supernet, each request within its budget",
    "push": "publish a stitched model on the Hugging Face Hub",
}
_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # of a failing machine, not of bad input


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and give its exit code.

    Args:
        argv: the words after `klas-hf`; None takes the command line's.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            parsed = _parser().parse_args(words[:1])
            command = import_module(f"klas_hf.cli.{parsed.command}").COMMAND
            return command(parsed.command, words[1:])
        except SystemExit as end:  # argparse: help, or bad usage
            return end.code if isinstance(end.code, int) else 2
        except KeyboardInterrupt:
            return _fail("interrupted; what was finished is kept", 130, "--traceback" in words)
        except (ValueError, TypeError, ImportError) as error:
            return _fail(str(error), 2, "--traceback" in words)
        except OSError as error:
            failed = error.errno in _FULL_DISK or isinstance(error, ConnectionError)
            return _fail(str(error), 1 if failed else 2, "--traceback" in words)
        except Exception as error:
            message = f"{type(error).__name__}: {error} (--traceback shows where)"
            return _fail(message, 1, "--traceback" in words)


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:<10}{line}" for name, line in _COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="klas-hf",
        usage="klas-hf COMMAND ...",
        description="Every size between two pretrained models.",
        epilog=f"commands:\n{listed}\n\n`klas-hf COMMAND --help` explains one.\n"
        "More processes: accelerate launch -m klas_hf.cli COMMAND ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=_COMMANDS, metavar="COMMAND", help="one of those below")
    return parser


def _fail(message: str, code: int, show_traceback: bool) -> int:
    if show_traceback:
        traceback.print_exc()
    print(f"klas-hf: error: {message}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    print(f"klas-hf: warning: {message}", file=sys.stderr)
