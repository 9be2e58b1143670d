"""What identifies an anchor's weights, and how a model is run without being changed."""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from huggingface_hub import constants
from torch import Tensor, nn

from klas_hf.files import write_atomically
from klas_hf.processes import process_state
from klas_hf.rows import library_versions

SAMPLED = 64  # values of a tensor, by which changes are noticed that torch does not count
SETTLED = 2.0  # seconds after which a file that is written again has another time, on any file system
_KNOWN: "WeakKeyDictionary[nn.Module, tuple[str, str]]" = WeakKeyDictionary()  # model → what it was, its fingerprint
_READ: "WeakKeyDictionary[nn.Module, tuple[str, Path]]" = WeakKeyDictionary()  # model → the same, where it is kept


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of all weights at bfloat16 precision, so that the dtype a model is loaded in does not matter.

    Once per model: it is taken anew where a tensor is another one, has been written to (torch counts that), or differs
    in one of `SAMPLED` values. And once for the files of an anchor that is named (`note_files`).
    """
    state = sorted(model.state_dict().items())
    seen = _seen(state)
    if seen is not None and _KNOWN.get(model, ("", ""))[0] == seen:
        return _KNOWN[model][1]
    before, kept = _READ.get(model, (None, None))
    as_read = kept is not None and before == seen
    found = _kept(kept) if kept is not None and as_read else None
    if found is None:
        digest = hashlib.sha256()
        for name, tensor in state:
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            _update(digest, _held(model, name, tensor).detach().to(dtype=torch.bfloat16))
        found = digest.hexdigest()
        if kept is not None and as_read:
            with suppress(OSError):  # a cache that cannot be written to only takes time
                write_atomically(kept, lambda path: path.write_text(str(found), encoding="ascii"))
    if seen is not None:
        _KNOWN[model] = seen, found
    return found


def list_files(folder: Path) -> list[tuple[Any, ...]] | None:
    """What tells the files of a checkpoint from others without reading them; None where it would not be sure to.

    Names, places, sizes and times, among them that of the last change to the file's entry (ctime), which nobody can
    set; Windows has none. A file of the Hub's cache is named by its content.
    """
    if os.name == "nt":
        return None
    found = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_file():
            about = entry.stat()
            times = about.st_mtime_ns, about.st_ctime_ns
            if max(times) / 1e9 > time.time() - SETTLED or entry.name == "adapter_config.json":
                return None  # written again within the clock's grain, or beside weights that lie elsewhere
            place = os.path.realpath(entry.path)
            found.append((entry.name, place, about.st_dev, about.st_ino, about.st_size, *times))
    return found


def note_files(model: nn.Module, files: list[tuple[Any, ...]]) -> None:
    """Note which files a model was just read from: its fingerprint is kept for them in Hugging Face's cache.

    Args:
        files: listed before and after, and the same.
    """
    seen = _seen(sorted(model.state_dict().items()))
    if seen is not None:
        dtypes = sorted({str(tensor.dtype) for tensor in model.state_dict().values()})
        about = json.dumps([files, type(model).__name__, dtypes, library_versions()], sort_keys=True)
        name = hashlib.sha256(about.encode()).hexdigest()[:32]
        _READ[model] = seen, Path(constants.HF_HOME) / "klas_hf" / "fingerprints" / name


def _kept(file: Path) -> str | None:
    """The fingerprint that a file of the cache holds; None where there is none."""
    with suppress(OSError, UnicodeDecodeError):
        return found[0] if (found := re.fullmatch("[0-9a-f]{64}", file.read_text(encoding="ascii"))) else None
    return None


def _seen(state: list[tuple[str, Tensor]]) -> str | None:
    """What tells tensors from others without reading all of them; None where torch does not count writes, and of
    quantised and offloaded ones."""
    if any(type(tensor) is not Tensor or tensor.is_inference() or tensor.is_meta for _, tensor in state):
        return None
    digest = hashlib.sha256()
    for name, tensor in state:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{tensor.data_ptr()}{tensor._version}".encode())
        values = tensor.detach().reshape(-1)
        _update(digest, values[:: max(1, len(values) // SAMPLED)])
    return digest.hexdigest()


def offloading(module: nn.Module) -> AlignDevicesHook | None:
    """What loads a module's own tensors for its forward, where accelerate has put them into memory or onto the disk."""
    hook: Any = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return next((one for one in hooks if getattr(one, "weights_map", None) is not None), None)


def device_of(module: nn.Module) -> torch.device:
    """Where the first tensor of a module is when it runs, wherever it may be offloaded to meanwhile."""
    owner = next(one for one in module.modules() if next(one.parameters(recurse=False), None) is not None)
    hook = offloading(owner)
    return next(owner.parameters(recurse=False)).device if hook is None else torch.device(hook.execution_device)


def _held(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A tensor of a model, also where it is offloaded."""
    owner, _, leaf = name.rpartition(".")
    hook = offloading(model.get_submodule(owner)) if tensor.is_meta else None
    return tensor if hook is None else hook.weights_map[leaf]


def _update(digest: "hashlib._Hash", tensor: Tensor) -> None:
    digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def is_shared_out(model: nn.Module) -> bool:
    """Whether each of several processes holds a part of a model's weights."""
    if process_state().num_processes == 1:
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter.data, DTensor) for parameter in model.parameters())


def check_whole_here(model: nn.Module) -> None:
    """Raise ValueError for a model of which each of several processes holds a part.

    Each reads its own share of the batches, and all would wait for each other's parts at forwards that only some run.
    """
    if is_shared_out(model):
        raise ValueError(
            f"got {type(model).__name__.removeprefix('FSDP')} with weights that several processes share out; expected "
            "whole ones in each, as each reads its own batches. Load it by its id or folder, or gather the weights: "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and every module back as it was."""
    modes = [(module, module.training) for module in model.modules()]
    if any(training for _, training in modes):
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            if module.training != training:  # mostly of the whole model alone, which takes its modules with it
                module.train(training)  # LeViT forgets here the attention biases that it keeps while evaluating
        for module, training in modes:
            if module.training != training:
                module.training = training
