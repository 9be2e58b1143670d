"""The files of a checkpoint: a damaged one is refused with what is wrong, where transformers fills gaps at random."""

import json
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedConfig
from transformers.utils import cached_file

from .replacing import finish_replacing

# Of the files' layout and the configuration's meaning; raised when an older klas_hf would misread them. Format 1 had
# two anchors and one joint; format 2 never tied a head to the embedding, and is read as it was.
FORMAT_VERSION, _OLDEST = 3, 2
_PLACES = ("revision", "cache_dir", "subfolder")
HUB_OPTIONS = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# AutoTokenizer makes up an empty one where there are none of these.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# What makes each input of a model, and the files of which one lies where it is.
_PROCESSORS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "input_ids": (AutoTokenizer, VOCABULARY_FILES),
    "pixel_values": (AutoImageProcessor, ("preprocessor_config.json", "processor_config.json")),
}
# What libraries raise at files that make no sense.
_SENSELESS = (
    ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, SafetensorError, StrictDataclassError,
)  # fmt: skip
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def check_format(config: dict[str, Any]) -> None:
    """Raise ValueError if a configuration was written by a version of klas_hf that this one cannot read."""
    version = config.get("format_version", 1)
    if version > FORMAT_VERSION:
        raise ValueError(
            f"got a stitched checkpoint of format {version}, written by a newer klas_hf; expected format "
            f"{FORMAT_VERSION}. Upgrade: pip install -U klas_hf"
        )
    if version < _OLDEST:
        raise ValueError(
            f"got a stitched checkpoint of format {version}, written before models were paths of any number of slices; "
            f"expected format {_OLDEST} or newer. Stitch its anchors again (StitchedModel.from_anchors) and save that"
        )


def path_text(slices: Sequence[Sequence[int]]) -> str:
    """`[anchor, start, stop]` of the slices of a path as `klas_hf.paths.Path` writes them, such as "0[:8] 1[14:]"."""
    ends = [str(stop) for _, _, stop in slices[:-1]] + [""]
    return " ".join(f"{anchor}[{start or ''}:{end}]" for (anchor, start, _), end in zip(slices, ends, strict=True))


def save_processor(model_input: str, anchor: str, hub: dict[str, Any], folder: str | os.PathLike) -> None:
    """Save the tokenizer or image processor of an anchor, where it has one and the folder has none.

    Warns where the anchor cannot be reached any more: what is saved beside it may have taken hours.

    Args:
        model_input: "input_ids" or "pixel_values".
        anchor: Hub id or folder.
        hub: revision, token, cache_dir, local_files_only.
    """
    kind, files = _PROCESSORS[model_input]
    if any(Path(folder, file).exists() for file in files):
        return
    try:
        if any(cached_file(anchor, file, _raise_exceptions_for_missing_entries=False, **hub) for file in files):
            kind.from_pretrained(anchor, **hub).save_pretrained(folder)
    except OSError as error:
        warnings.warn(
            f"saved {str(folder)!r} without what makes its {model_input}, as the anchor {anchor!r} cannot be reached "
            f"({error}); save it beside the model: {kind.__name__}.from_pretrained(…).save_pretrained(folder)",
            stacklevel=4,
        )


def is_delta(name: str | os.PathLike, **kwargs: Any) -> bool:
    """Whether a checkpoint holds trained tensors alone (see `klas_hf.hub.delta`), whatever configuration is given."""
    hub = {option: kwargs[option] for option in HUB_OPTIONS if option in kwargs}
    return bool(PreTrainedConfig.get_config_dict(name, **hub)[0].get("delta"))


def load_whole(
    load: Callable[..., Any],
    name: str | os.PathLike,
    *args: Any,
    use_safetensors: bool | None = True,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    """What `load` (a `from_pretrained` of transformers) makes of a checkpoint, if that is whole and not pickled.

    Raises:
        ValueError: `use_safetensors=False`.
        OSError: a file is missing, damaged or pickled, or lacks tensors.
    """
    if use_safetensors is False:
        raise ValueError(
            "got use_safetensors=False; expected True, as unpickling can run any code. Save the weights as safetensors"
        )
    hub = {option: kwargs[option] for option in HUB_OPTIONS if option in kwargs}
    finish_replacing(name)
    with explained_damage(name, hub, [] if kwargs.get("variant") else None):
        for file in _shards(name, hub) or ():
            check_inside(name, file)
        told = {"ignore_mismatched_sizes": True} | kwargs  # without, they are refused here, by name
        model, info = load(name, *args, use_safetensors=True, output_loading_info=True, **told)
    check_whole(name, info["missing_keys"], () if kwargs.get("ignore_mismatched_sizes") else info["mismatched_keys"])
    return (model, info) if output_loading_info else model


@contextmanager
def explained_damage(name: str | os.PathLike, hub: dict[str, Any], files: list[str] | None = None) -> Iterator[None]:
    """Say which file of a checkpoint is missing, damaged or pickled, where loading it fails.

    Args:
        files: its safetensors files, where they are known; None finds the model's.

    Raises:
        OSError: what transformers or safetensors had to say, with the file and a remedy.
    """
    try:
        yield
    except _Explained:
        raise
    except (OSError, ValueError, *_SENSELESS) as error:
        damage = _damage(name, {option: hub[option] for option in _PLACES if option in hub}, files)
        if damage is None and (isinstance(error, ValueError) or not (isinstance(error, OSError) or senseless(error))):
            raise
        said = str(error) if isinstance(error, OSError | SafetensorError) else f"{type(error).__name__}: {error}"
        raise _Explained(
            f"could not load the checkpoint {str(name)!r}: {damage or said}. Expected "
            "config.json and whole safetensors files (pickled weights are never read). Download or save it again"
        ) from error


class _Explained(OSError):
    """What `explained_damage` has said already, within another."""


def senseless(error: Exception) -> bool:
    """Whether an error may come of files that make no sense, and not of a caller's slip or too little memory."""
    slip = isinstance(error, torch.OutOfMemoryError) or "unexpected keyword argument" in str(error)
    return isinstance(error, _SENSELESS) and not slip


@contextmanager
def sensible(kind: str) -> Iterator[None]:
    """Say of which configuration it is that makes no sense, while it is read.

    Raises:
        ValueError: in place of what libraries raise.
    """
    try:
        yield
    except _SENSELESS as error:
        raise ValueError(
            f"got a configuration of {kind!r} that makes no sense ({type(error).__name__}: {error}); expected a "
            "config.json as klas_hf writes it. Download or save it again"
        ) from error


def check_whole(name: str | os.PathLike, missing: set[str], misshapen: Collection[Any] = ()) -> None:
    """Raise OSError if tensors are missing from a checkpoint, or have other shapes: transformers would make them up."""
    for found, problem in ((missing, "are missing from it"), (misshapen, "have other shapes than config.json says")):
        if found:
            listed = ", ".join(sorted(map(str, found))[:5]) + (", …" if len(found) > 5 else "")
            raise OSError(
                f"could not load the checkpoint {str(name)!r}: {len(found)} tensors {problem} ({listed}). "
                "Expected all of the model's. Download or save it again"
            )


def check_inside(name: str | os.PathLike, file: Any) -> None:
    """Raise OSError unless the name of a file that a checkpoint's other files give lies inside its folder."""
    if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts or "\\" in file:
        raise _Explained(
            f"got the checkpoint {str(name)!r}, which names the file {file!r}; expected names of files inside its "
            "folder. Do not load what tries to read others"
        )


def _shards(name: str | os.PathLike, hub: dict[str, Any]) -> list[str] | None:
    """The files that an index on this machine names; None where there is one file, or no index.

    Raises:
        ValueError, KeyError, AttributeError, TypeError: the index is damaged.
    """
    index = _find(name, _INDEX, {option: hub[option] for option in _PLACES if option in hub})
    if index is None:
        return None
    return sorted(set(json.loads(Path(index).read_text("utf-8"))["weight_map"].values()))


def _damage(name: str | os.PathLike, hub: dict[str, Any], files: list[str] | None) -> str | None:
    """What is wrong with the files that are on this machine."""
    if files is None:
        try:
            files = [_SINGLE] if _find(name, _SINGLE, hub) is not None else _shards(name, hub) or [_SINGLE]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            return f"{_INDEX} is damaged ({error!r})"
    for file in files:
        path = _find(name, file, hub)
        if path is None:
            pickled = [one for one in _PICKLED if _find(name, one, hub)]
            if pickled:
                return f"its weights are pickled ({pickled[0]}), and unpickling can run any code"
            return f"{file} is missing" if Path(name).is_dir() else None  # the Hub says more
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            return f"{file} is damaged ({error})"
    return None


def _find(name: str | os.PathLike, file: str, hub: dict[str, Any]) -> str | None:
    """The path of a checkpoint's file, if it is on this machine."""
    return cached_file(
        name,
        file,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
        **hub,
    )
