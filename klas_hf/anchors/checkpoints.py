"""An anchor's configuration and its tensors one by one, so that only those used are ever read."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from klas_hf.anchors.families import DecoderFamily, decoder_family
from klas_hf.anchors.language import anchor_config, explained_access
from klas_hf.models.checkpoint_files import check_inside
from klas_hf.models.vision_kinds import vision_kind

ADVISED = 1 << 20  # bytes that the system takes advice on at once: it may leave out what goes beyond its own read-ahead
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class AnchorCheckpoint:
    """Tensors of a model, from a Hub id, a folder or a model in memory.

    Args:
        anchor: Hub id, local folder or model.
        shared: give the tensors of a model in memory themselves, not copies of them.
        config: of an id or folder, where it has been read; None reads it.
        hub: revision, token, cache_dir, local_files_only … for the Hub.

    Raises:
        OSError: not to be reached, damaged, or without safetensors weights (pickled ones are not read).
    """

    def __init__(
        self,
        anchor: str | Path | PreTrainedModel,
        *,
        shared: bool = False,
        config: PreTrainedConfig | None = None,
        **hub: Any,
    ):
        self._open_files = ExitStack()
        self._files: dict[str, Any] = {}
        self.hub, self.shared = hub, shared
        self._anchor = anchor
        self._places: dict[str, dict[str, tuple[int, int]]] = {}  # path → where in the file each tensor lies
        self._opening = Lock()  # transformers reads in several threads
        self.names: dict[str, str] = {}  # key → name in the files, where that is another
        if isinstance(anchor, PreTrainedModel):
            self.config: PreTrainedConfig = anchor.config
            self.dtype = anchor.dtype
            self._tensors: Mapping[str, Tensor] = anchor.state_dict()
            self._shards: dict[str, str] = {}
            self.name = str(anchor.config.name_or_path or "") or None
            self.revision = getattr(anchor.config, "_commit_hash", None)
        else:
            self.config = config or anchor_config(anchor, **hub)
            self.dtype = self.config.dtype or torch.float32
            self.name, self.revision = str(anchor), _commit(anchor, hub)
            self._tensors = {}
            self._shards = self._find_shards()
        self.keys = set(self._tensors) | set(self._shards)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open_files.close()

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The anchor's own generation config, or None where it has none."""
        if isinstance(self._anchor, PreTrainedModel):
            return self._anchor.generation_config
        try:
            return GenerationConfig.from_pretrained(self._anchor, **self.hub)
        except OSError:
            return None

    def tensor(self, key: str, *, copied: bool = True) -> Any:
        """A tensor, or the slice of a safetensors file that becomes one when it is read.

        Args:
            copied: whether one of a model in memory may be written to, and so must not be the model's own.
        """
        key = self.names.get(key, key)
        if key in self._tensors:
            found = self._tensors[key].detach()
            return found.clone() if copied and not self.shared else found  # transformers would share it
        shard = self._shards[key]
        with self._opening:
            if shard not in self._files:
                self._files[shard] = self._open_files.enter_context(_open(self._path(shard)))
        try:
            return self._files[shard].get_slice(key)
        except SafetensorError as error:
            raise OSError(
                f"the anchor {str(self._anchor)!r} has {shard} without {key}, which {_INDEX} says it holds ({error}); "
                "expected the files as they were saved. Download or save it again"
            ) from error

    def announce(self, key: str) -> None:
        """Tell the system which bytes of a file are read next: around a page that is touched it would fetch megabytes.

        Nothing is done for models in memory, and where the system does not take advice (macOS, Windows).
        """
        key = self.names.get(key, key)
        if key in self._tensors or not hasattr(os, "posix_fadvise"):
            return
        with open(self._path(self._shards[key]), "rb") as file:
            with self._opening:
                if file.name not in self._places:
                    self._places[file.name] = _places(file)
            start, stop = self._places[file.name][key]
            for place in range(start, stop, ADVISED):
                os.posix_fadvise(file.fileno(), place, min(ADVISED, stop - place), os.POSIX_FADV_WILLNEED)

    def _find_shards(self) -> dict[str, str]:
        """Tensor name → file name."""
        with explained_access(str(self._anchor)):
            single = cached_file(self._anchor, _SINGLE, _raise_exceptions_for_missing_entries=False, **self.hub)
        if single is not None:
            with _open(single) as file:
                return dict.fromkeys(file.keys(), _SINGLE)
        with explained_access(str(self._anchor)):
            index = cached_file(self._anchor, _INDEX, _raise_exceptions_for_missing_entries=False, **self.hub)
            if index is None:
                raise OSError(
                    f"found neither {_SINGLE} nor {_INDEX}; only safetensors weights are read, never pickled ones"
                )
        try:
            return dict(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise OSError(
                f"{index} is damaged ({error!r}); expected a file name for each tensor. Download or save it again"
            ) from error

    def _path(self, shard: str) -> str:
        check_inside(str(self._anchor), shard)
        if Path(str(self._anchor)).is_dir() and not Path(str(self._anchor), shard).is_file():
            raise OSError(
                f"the anchor {str(self._anchor)!r} is missing {shard}; expected all files that {_INDEX} names. "
                "Download or save it again"
            )
        with explained_access(str(self._anchor)):
            return cached_file(self._anchor, shard, **self.hub)


class ClassifierCheckpoint(AnchorCheckpoint):
    """Tensors of an image classifier.

    Raises:
        ValueError: its kind cannot be stitched.
    """

    def __init__(self, anchor: str | Path | PreTrainedModel, **hub: Any):
        config = anchor.config if isinstance(anchor, PreTrainedModel) else anchor_config(anchor, **hub)
        self.kind = vision_kind(config)
        super().__init__(anchor, config=config, **hub)


class UnreadTensor:
    """A tensor of a checkpoint whose file is opened when transformers takes it, if it does: `tensor[...]` reads it."""

    def __init__(self, checkpoint: AnchorCheckpoint, key: str, copied: bool = True):
        self.checkpoint, self.key, self.copied = checkpoint, key, copied

    def __getitem__(self, index: Any) -> Tensor:
        found = self.checkpoint.tensor(self.key, copied=self.copied)
        self.checkpoint.announce(self.key)
        return found[index]


class DecoderCheckpoint(AnchorCheckpoint):
    """Tensors of a causal LM: its decoder's and its head's.

    Raises:
        ValueError: its family cannot be stitched, or it was saved without its head.
    """

    def __init__(self, anchor: str | Path | PreTrainedModel, *, shared: bool = False, **hub: Any):
        config = anchor.config if isinstance(anchor, PreTrainedModel) else anchor_config(anchor, **hub)
        self.family = decoder_family(config)
        super().__init__(anchor, shared=shared, config=config, **hub)
        if not any(key.startswith(f"{self.family.prefix}.") for key in self.keys):
            raise ValueError(self._headless())

    def head_keys(self) -> dict[str, str]:
        """Parameter of the head ("weight", "bias") → key in the checkpoint; the embedding's key where tied.

        Raises:
            ValueError: the checkpoint has no head (it was saved from a model without one).
        """
        keys = head_keys(self.keys, self.family, self.config)
        if "weight" not in keys:
            raise ValueError(self._headless())
        return keys

    @property
    def ties(self) -> bool:
        """Whether the head's weight is the embedding.

        Raises:
            ValueError: the checkpoint has no head.
        """
        return self.head_keys()["weight"] == _embedding_key(self.family)

    def _headless(self) -> str:
        return (
            f"got {self.name or 'an anchor'} without the weights of its head ({' or '.join(self.family.heads)}); "
            "expected a causal language model. Pass one saved from AutoModelForCausalLM"
        )


def decoder_keys(keys: Iterable[str], family: DecoderFamily) -> Iterator[tuple[str, str]]:
    """(name within the decoder, key in the checkpoint) of every tensor of a causal language model but the head's."""
    prefix, heads = f"{family.prefix}.", tuple(f"{head}." for head in family.heads)
    for key in sorted(keys):
        if key.startswith(prefix) and not key.startswith(heads):
            yield key.removeprefix(prefix), key


def head_keys(keys: Iterable[str], family: DecoderFamily, config: PreTrainedConfig) -> dict[str, str]:
    """Parameter of the head ("weight", "bias") → key in the checkpoint; the embedding's key where tied."""
    keys = list(keys)
    found = {key.removeprefix(f"{head}."): key for head in family.heads for key in keys if key.startswith(f"{head}.")}
    if config.tie_word_embeddings and _embedding_key(family) in keys:
        found["weight"] = _embedding_key(family)
    return found


def _embedding_key(family: DecoderFamily) -> str:
    return f"{family.prefix}.{family.embeddings}.weight"


def _commit(anchor: str | Path, hub: dict[str, Any]) -> str | None:
    """The commit that a Hub id stands for now; what was asked for where that is not known."""
    if Path(anchor).is_dir():
        return hub.get("revision")
    with explained_access(anchor):
        return extract_commit_hash(cached_file(anchor, CONFIG_NAME, **hub), None) or hub.get("revision")


def _places(file: BinaryIO) -> dict[str, tuple[int, int]]:
    """Of each tensor of a safetensors file that is whole: its first byte, and the one behind its last."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    return {
        key: (8 + length + about["data_offsets"][0], 8 + length + about["data_offsets"][1])
        for key, about in header.items()
        if key != "__metadata__"
    }


def _open(path: str) -> Any:
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise OSError(
            f"{path} is damaged ({error}); expected a whole safetensors file. Download or save it again"
        ) from error
