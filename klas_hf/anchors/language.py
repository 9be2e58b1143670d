"""A causal language model as an anchor: its blocks' hidden states, and its head on any of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from klas_hf.anchors.batches import TokenBatch
from klas_hf.anchors.families import DECODER_FAMILIES, decoder_family
from klas_hf.anchors.weights import evaluating, fingerprint
from klas_hf.models.modeling_stitched import scale_logits
from klas_hf.models.vision_kinds import VISION_KINDS

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


class LanguageAnchor:
    """A pretrained causal LM, read by blocks.

    Args:
        model: the model; it is not changed.
        revision: its commit on the Hub, where known.

    Raises:
        ValueError: its family is unknown.
    """

    def __init__(self, model: PreTrainedModel, revision: str | None = None):
        self.family = decoder_family(model.config)
        self.model = model
        self.config = model.config
        self.revision = revision
        self.path: str | None = str(model.config.name_or_path) or None
        self.name = self.path or type(model).__name__

    @property
    def decoder(self) -> PreTrainedModel:
        return self.model.base_model

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
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.model.get_input_embeddings().weight.device

    @torch.no_grad()
    def hidden_states(self, batch: TokenBatch) -> list[Tensor]:
        """Output of every block, `num_blocks` tensors `(batch, tokens, width)`; the last one is not normed.

        Dropout is off meanwhile.
        """
        batch = batch.to(self.device)
        with evaluating(self.model), captured_outputs(self.blocks) as outputs:
            self.decoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        return outputs

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's own head on the output of a block: `(..., width)` → `(..., vocabulary)`, final norm included."""
        norm = self.decoder.get_submodule(self.family.norm)
        weight = self.model.get_output_embeddings().weight
        return self.head(norm(hidden.to(device=weight.device, dtype=weight.dtype)))

    def head(self, normed: Tensor) -> Tensor:
        """The unembedding of normed hidden states: `(..., width)` → `(..., vocabulary)`."""
        head = self.model.get_output_embeddings()
        return scale_logits(head(normed.to(head.weight.device)), self.config)

    @cached_property
    def fingerprint(self) -> str:
        """What identifies the weights (see `fingerprint`)."""
        return fingerprint(self.model)


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
    """A model in eval mode, by Hub id or folder; `check` sees its configuration before anything is downloaded."""
    check(anchor_config(anchor, **{name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}))
    with explained_access(anchor):
        return auto_class.from_pretrained(anchor, use_safetensors=True, **kwargs).eval()


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
    """Say, when an anchor cannot be reached, how to pass a local one."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"could not load the anchor {str(anchor)!r}: {error}\nIt is neither a local folder with config.json and "
            "safetensors weights nor to be had from the Hub. Pass the path of a local folder, or check the id, the "
            "network (HF_HUB_OFFLINE), and for gated models your login (hf auth login)"
        ) from error


@contextmanager
def captured_outputs(blocks: nn.ModuleList) -> Iterator[list[Tensor]]:
    """What each block gives, `(batch, tokens, width)`, in the order in which they run."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
