"""What a command leaves behind: files that never replace others unasked, tables for people, JSON for machines."""

import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

OVERWRITE = "replace what is at the output"


def check_output(output: str | Path, overwrite: bool, *, resumable: str | None = None) -> Path:
    """The path, if nothing is there that would be replaced unasked.

    Args:
        resumable: name in a folder that an interrupted run leaves; beside it other things are no hindrance, for the run
            may have been interrupted while it saved them.

    Raises:
        FileExistsError: a file or a folder with something in it.
        NotADirectoryError: a parent that is a file.
        PermissionError: nothing can be written there.
    """
    path = Path(output).expanduser()
    check_writable(path)
    content = {one.name for one in path.iterdir()} if path.is_dir() else path.exists()
    is_unfinished = isinstance(content, set) and resumable in content
    if content and not is_unfinished and not overwrite:
        raise FileExistsError(f"got the output {path}, which exists; name another one, or add --overwrite")
    return path


def check_writable(output: Path) -> None:
    """Find out before the work whether a file or folder can be made.

    Raises:
        NotADirectoryError: a parent that is a file.
        PermissionError: nothing can be written there.
    """
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f"got the output {output}, but {folder} is a file; expected a folder")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(
            f"got the output {output}, but nothing can be written in {folder} ({error.strerror}); name another one"
        ) from error


def is_main_process() -> bool:
    """Whether this is the main one of the launch's processes; answered without torch where nothing has loaded it."""
    if "accelerate" not in sys.modules:
        return os.environ.get("RANK", "0") == "0"

    from klas_hf.processes import process_state

    return process_state().is_main_process


def save_model(model: Any, processor: Any, output: Path) -> None:
    """Save a model with its tokenizer or image processor; the model comes last, so that a folder with it is whole."""
    from klas_hf.processes import others_bars, process_state

    if is_main_process():
        output.mkdir(parents=True, exist_ok=True)
        processor.save_pretrained(output)
        with others_bars():
            model.save_pretrained(output)
    process_state().wait_for_everyone()


def say(text: str) -> None:
    """Print, on the main process only."""
    if is_main_process():
        print(text, flush=True)


def say_json(value: Any) -> None:
    """Print strict JSON: what is not finite becomes null."""
    say(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def human_bytes(count: float) -> str:
    """Bytes as people read them: 1.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_count(count: float) -> str:
    """A number of MACs or parameters as people read it: 1.24 G."""
    for unit in ("", " k", " M"):
        if abs(count) < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:,.3g} G" if count < 1000 else f"{count / 1000:,.4g} T"


def names(items: Iterable[Any], most: int = 4) -> str:
    """A few of many, by comma."""
    listed = [str(item) for item in items]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
