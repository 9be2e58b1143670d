"""A checkpoint in the place of another: the old one or the new one, whole, whatever happens meanwhile.

transformers writes into the folder file by file, so a full disk would leave half of the new one over half of the old.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_NAMES = "names.moving.json"  # beside a new checkpoint's files while they move: all their names
_PUSHED = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "max_shard_size")


@contextmanager
def replacing(folder: str | os.PathLike, variant: str | None = None) -> Iterator[Path]:
    """A new folder, inside `folder`, whose files move up when the block ends; if it raises, nothing has changed.

    Until then the disk holds the old and the new checkpoint. Old weights that the new one has not replaced go, as
    loaders may prefer them (an unsharded file to shards); all other files stay. A process that dies while files move
    leaves the rest to whoever next loads or saves here (`finish_replacing`).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    finish_replacing(folder)
    with TemporaryDirectory(prefix=".saving-", dir=folder) as name:  # here, as a folder's parent may be another disk
        part = Path(name, "new")
        part.mkdir()
        yield part
        if written := sorted(file.name for file in part.iterdir()):
            (part / _NAMES).write_text(json.dumps({"written": written, "variant": variant}))
            moving = folder / Path(name).name.replace(".saving-", ".moving-")
            os.replace(part, moving)
            _move_up(moving)


def finish_replacing(folder: str | os.PathLike) -> None:
    """Move up what a process that died in `replacing` has left; config.json goes first, and before it nothing moves.

    Raises:
        OSError: the folder cannot be written to, and its checkpoint is neither the old nor the new one.
        ValueError: the list of files makes no sense, or names one elsewhere.
    """
    for names in Path(folder).glob(f".moving-*/{_NAMES}"):
        if (names.parent / "config.json").exists():
            continue  # the old checkpoint is whole
        try:
            _move_up(names.parent)
        except OSError as error:
            raise OSError(
                f"got {str(folder)!r}, where a process died while it replaced the checkpoint ({error}); expected a "
                f"folder that may be written to, to end that. Move the files of {names.parent.name} up"
            ) from error


def _move_up(moving: Path) -> None:
    """Put the files of a new checkpoint in place; of two processes that do it at once, either may move each."""
    folder, (written, variant) = moving.parent, _told(moving / _NAMES)
    for file in sorted(written, key=lambda name: (name != "config.json", name)):
        with suppress(FileNotFoundError):
            if (folder / file).is_dir() and (moving / file).exists():  # which cannot be replaced in one step
                os.replace(folder / file, moving / f".old-{file}")
            os.replace(moving / file, folder / file)
    suffix = f"\\.{re.escape(variant)}" if variant else ""
    weights = re.compile(rf"model{suffix}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{suffix}\.json")
    if any(map(weights.fullmatch, written)):  # rather than an adapter alone
        for old in list(folder.iterdir()):
            if weights.fullmatch(old.name) and old.name not in written:
                old.unlink(missing_ok=True)
    shutil.rmtree(moving, ignore_errors=True)


def _told(names: Path) -> tuple[list[str], str | None]:
    """The names of a new checkpoint's files, and its variant: the folder may be someone else's."""
    try:
        told = json.loads(names.read_text())
        written, variant = told["written"], told["variant"]
        if not all(name and name == Path(name).name != ".." for name in written) or not isinstance(variant, str | None):
            raise ValueError(f"{written} with the variant {variant!r}")
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"got {names}, which tells no checkpoint's files ({error}); expected names of files beside it. Remove the "
            f"folder {names.parent.name} if you do not trust it"
        ) from error
    return written, variant


class WrittenWhole:
    """Of models: what a folder holds stays until the new checkpoint is written whole."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save as any model of transformers; what is pushed is pushed when it is saved.

        A checkpoint that the folder holds stays as it is until the new one is written whole, but for a
        `distributed_checkpoint`, which all processes write in place.

        Raises:
            ValueError: `state_dict` with `push_to_hub`.
        """
        if push_to_hub and state_dict is not None:
            raise ValueError(
                "got state_dict and push_to_hub; expected one of them, as what is pushed is the model's own tensors. "
                "Save first, then upload the folder (huggingface_hub.upload_folder)"
            )
        write = super().save_pretrained  # type: ignore[misc]
        if kwargs.get("distributed_checkpoint"):
            write(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
            return
        with replacing(save_directory, kwargs.get("variant")) as part:
            write(part, is_main_process, state_dict, **kwargs)
        if is_main_process:
            self.save_processor(save_directory)
        if push_to_hub:
            options = {name: kwargs[name] for name in _PUSHED if name in kwargs}
            self.push_to_hub(kwargs.get("repo_id", Path(save_directory).name), **options)  # type: ignore[attr-defined]

    def save_processor(self, folder: str | os.PathLike) -> None:
        """Save what goes along with the model: nothing, unless a kind of model says so."""
