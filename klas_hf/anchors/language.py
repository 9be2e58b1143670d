"""A causal language model as an anchor: its blocks' hidden states, and its head on any of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.utils import CONFIG_NAME, cached_file

from klas_hf.anchors.anchor import Anchor
from klas_hf.anchors.batches import TokenBatch, token_batches
from klas_hf.anchors.decoder_parts import decoder_part
from klas_hf.anchors.families import DECODER_FAMILIES, decoder_family
from klas_hf.anchors.vocabularies import check_vocabularies
from klas_hf.anchors.weights import device_of, evaluating, list_files, note_files
from klas_hf.models.checkpoint_files import check_whole, senseless
from klas_hf.models.modeling_stitched import scale_logits
from klas_hf.models.vision_kinds import VISION_KINDS
from klas_hf.processes import others_bars, process_state

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
# Options with which a model has the tensors of its files, in its dtype.
_UNCHANGING = {*HUB_OPTIONS, "dtype", "torch_dtype", "device_map", "attn_implementation"}


def hub_options(options: Mapping[str, Any], revision: str | None = None) -> dict[str, Any]:
    """Those of `from_pretrained`'s options that say where files come from, of this revision if one is given."""
    found = {name: options[name] for name in HUB_OPTIONS if name in options}
    return found if revision is None else found | {"revision": revision}


class LanguageAnchor(Anchor[TokenBatch, Tensor]):
    """A pretrained causal LM, read by blocks; a state is `(batch, tokens, width)`.

    Raises:
        ValueError: its family is unknown.
    """

    unit = "token that is neither padding nor BOS"

    def __init__(self, model: PreTrainedModel, revision: str | None = None):
        self.family = decoder_family(model.config)
        super().__init__(model, revision)
        self._parts: dict[tuple[int, int, bool], PreTrainedModel] = {}

    @property
    def decoder(self) -> PreTrainedModel:
        return self.model.base_model

    def writer(self, block: int) -> nn.Module | None:
        name = decoder_family(self.config).writer
        return None if name is None else self.blocks[block].get_submodule(name)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.decoder.get_submodule(self.family.blocks)

    @property
    def num_blocks(self) -> int:
        return self.config.num_hidden_layers

    @property
    def width(self) -> int:
        return self.config.hidden_size

    @property
    def widths(self) -> list[int]:
        return [self.width] * (self.num_blocks + 1)

    @property
    def classes(self) -> int:
        return self.config.vocab_size

    @property
    def device(self) -> torch.device:
        return device_of(self.model.get_input_embeddings())

    def read(self, data: Iterable[Any], *, probed: bool = False) -> Iterator[TokenBatch]:
        return token_batches(data, self.config.bos_token_id, self.classes)

    def meet(self, others: Sequence[Any], calibration: Iterable[TokenBatch]) -> None:
        pass  # a head reads the last state alone

    def check_like(self, other: "LanguageAnchor") -> None:
        check_vocabularies(self.path, self.config, other.path, other.config)

    def front(self, inputs: Mapping[str, Any], stop: int) -> Tensor:
        return self._part(0, stop, fed=False)(**dict(inputs) | {"use_cache": False}).last_hidden_state

    def run(self, state: Tensor, inputs: Mapping[str, Any], start: int, stop: int) -> Tensor:
        if start == stop:
            return state
        given = {name: value for name, value in inputs.items() if name != "input_ids"}
        mask = given.get("attention_mask")
        if mask is not None:
            mask = mask.to(state.device)
            given["attention_mask"] = mask if len(mask) == len(state) else mask.repeat(len(state) // len(mask), 1)
        part = self._part(start, stop, fed=True)
        return part(inputs_embeds=state, **given | {"use_cache": False}).last_hidden_state

    def go_on(self, state: Tensor, layers: list[CacheLayerMixin], start: int, stop: int) -> Tensor:
        """The state after `blocks[start:stop]` of tokens that follow those whose keys and values these blocks have.

        Args:
            state: `(1, tokens, width)` before these blocks.
            layers: a cache's, one for each of the blocks; they grow by the tokens.
        """
        cache = _CacheFrom(start, layers)
        return self._part(start, stop, fed=True)(inputs_embeds=state, past_key_values=cache).last_hidden_state

    @torch.no_grad()
    def states(self, batch: TokenBatch, stop: int | None = None) -> list[Tensor]:
        stop = self.num_blocks if stop is None else stop
        with evaluating(self.model), captured_states(self.blocks[:stop]) as states:
            last = self.front(batch.to(self.device).inputs, stop)
        return states or [last]

    def logits(self, state: Tensor) -> Tensor:
        norm, head = self.decoder.get_submodule(self.family.norm), self.model.get_output_embeddings()
        normed = norm(state.to(device=device_of(head), dtype=head.weight.dtype))
        return scale_logits(head(normed), self.config)

    @torch.no_grad()
    def answers(self, state: Tensor, batch: TokenBatch, units: slice = slice(None)) -> Tensor:
        return self.logits(self.probed(state, batch, units))

    def rows(self, state: Tensor, batch: TokenBatch, into: Any = None) -> Tensor:
        return state[batch.counted.to(state.device)]

    def probed(self, state: Tensor, batch: TokenBatch, units: slice = slice(None)) -> Tensor:
        sequence, token = batch.counted.nonzero()[units].to(state.device).unbind(1)
        return state[sequence, token]

    def grids(self, batch: TokenBatch) -> list[tuple[int, int, int]]:
        return [(0, 0, 0)] * (self.num_blocks + 1)

    def joint(self, stop: int, into: "LanguageAnchor", start: int, bias: bool = True) -> nn.Linear:
        return nn.Linear(self.width, into.width, bias=bias)

    def take(self, state: Tensor) -> Tensor:
        return state.to(device=self.device, dtype=self.model.dtype)

    @staticmethod
    def stacked(states: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(states))

    @staticmethod
    def split(state: Tensor, count: int) -> list[Tensor]:
        return list(state.chunk(count))

    def _part(self, start: int, stop: int, *, fed: bool) -> PreTrainedModel:
        """A part that shares the model's modules; made once."""
        if (start, stop, fed) not in self._parts:
            self._parts[start, stop, fed] = decoder_part(self.decoder, self.blocks[start:stop], start, stop, fed=fed)
        part = self._parts[start, stop, fed]
        part.training = self.model.training  # its blocks are the model's, and have the model's modes
        return part


class _CacheFrom(Cache):
    """The cache of some blocks, which number their layers from the anchor's first block."""

    def __init__(self, first: int, layers: list[CacheLayerMixin]):
        super().__init__(layers=layers)
        self.first = first

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().update(keys, values, layer_idx - self.first, *args, **kwargs)


def load_anchor(anchor: str | Path | PreTrainedModel | LanguageAnchor, **kwargs: Any) -> LanguageAnchor:
    """Load an anchor by Hub id or folder, or take a model as it is.

    Args:
        anchor: Hub id, local folder, model, or an anchor already loaded.
        kwargs: for `AutoModelForCausalLM.from_pretrained` (dtype, device_map, revision, …).

    Raises:
        OSError: neither a folder nor to be had from the Hub.
        ValueError: its family is unknown.
    """
    if isinstance(anchor, LanguageAnchor):
        return anchor
    if isinstance(anchor, PreTrainedModel):
        return LanguageAnchor(anchor)
    model = pretrained(AutoModelForCausalLM, anchor, decoder_family, **kwargs)
    return LanguageAnchor(model, revision=kwargs.get("revision"))


def pretrained(auto_class: Any, anchor: str | Path, check: Callable[[PreTrainedConfig], Any], **kwargs: Any) -> Any:
    """A model in eval mode, by Hub id or folder; `check` sees its configuration before anything is downloaded.

    Where `device_map` says nothing else it lies on accelerate's device, and in the dtype of its checkpoint.
    """
    if kwargs.get("device_map") is None:
        kwargs["device_map"] = on_accelerator()
    hub = hub_options(kwargs)
    check(anchor_config(anchor, **hub))
    with explained_access(anchor), others_bars():
        folder = Path(cached_file(anchor, CONFIG_NAME, **hub)).parent
        files = list_files(folder)
        told = kwargs | {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = auto_class.from_pretrained(anchor, **told)
    check_whole(anchor, info["missing_keys"], info["mismatched_keys"])
    if files is not None and kwargs.keys() <= _UNCHANGING and list_files(folder) == files:
        note_files(model, files)
    return model.eval()


def on_accelerator() -> dict[str, torch.device] | None:
    """A `device_map` that puts all of a model on accelerate's device; None where that is the CPU."""
    device = process_state().device
    return None if device.type == "cpu" else {"": device}


def anchor_config(anchor: str | Path, **hub: Any) -> PreTrainedConfig:
    """The configuration of an anchor, by Hub id or folder.

    Raises:
        OSError: neither a folder nor to be had from the Hub.
        ValueError: transformers does not know its type.
    """
    with explained_access(anchor):
        try:
            return AutoConfig.from_pretrained(anchor, **hub)
        except ValueError as error:
            known = sorted([*DECODER_FAMILIES, *VISION_KINDS])
            raise ValueError(f"{error}\nExpected an anchor of one of {known}") from error


@contextmanager
def explained_access(anchor: str | Path) -> Iterator[None]:
    """Say, when an anchor cannot be reached, how to pass a local one; and whose files it is that make no sense."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"could not load the anchor {str(anchor)!r}: {error}\nIt is neither a local folder with config.json and "
            "safetensors weights nor to be had from the Hub. Pass the path of a local folder, or check the id, the "
            "network (HF_HUB_OFFLINE), and for gated models your login (hf auth login)"
        ) from error
    except Exception as error:
        if not senseless(error):
            raise
        raise ValueError(
            f"got the anchor {str(anchor)!r}, of which no model can be made ({type(error).__name__}: {error}); "
            "expected a config.json and safetensors weights that belong together. Download or save it again"
        ) from error


@contextmanager
def captured_states(blocks: nn.ModuleList) -> Iterator[list[Tensor]]:
    """What enters the first block and what each gives, `(batch, tokens, width)`, in the order in which they run."""
    states: list[Tensor] = []

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def keep(module: nn.Module, args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks[:1]]
    handles += [block.register_forward_hook(keep) for block in blocks]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
