"""Tiny random anchors of every family, and a reference for stitched models that shares no code with them.

The two anchors of a family differ in width, depth, heads, head_dim, KV heads and RoPE; windows and per-block lists
are set so that each matters within a dozen tokens. All weights are random, norms and biases too.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path as Folder
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from klas_hf import StitchedForCausalLM
from klas_hf.paths import Path

VOCABULARY = 67
PAD, BOS, EOS = 0, 1, 2

_SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}
_LARGE = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10.0},
}
_HEAD_DIM = ({"head_dim": 8}, {"head_dim": 16})
_WINDOW = ({"sliding_window": 4}, {"sliding_window": 6})
_PER_BLOCK_WINDOW = (
    {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3},
)
_TWO_ROPES = tuple(
    {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
            "full_attention": {"rope_type": "default", "rope_theta": 40 * local},
        }
    }
    for local in (5.0, 20.0)
)


def _both(*settings: tuple[dict, dict] | dict) -> tuple[dict[str, Any], dict[str, Any]]:
    small, large = {}, {}
    for setting in settings:
        one, other = (setting, setting) if isinstance(setting, dict) else setting
        small |= one
        large |= other
    return small, large


# What each family sets beside the sizes above: (small, large).
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": _both(_HEAD_DIM, ({"tie_word_embeddings": False}, {"tie_word_embeddings": True})),
    "mistral": _both(_HEAD_DIM, _WINDOW),
    "qwen2": _both(_PER_BLOCK_WINDOW, ({"tie_word_embeddings": True}, {"tie_word_embeddings": False})),
    "qwen3": _both(_HEAD_DIM, _PER_BLOCK_WINDOW),
    "gemma": _both(_HEAD_DIM),
    "gemma2": _both(_HEAD_DIM, _WINDOW, {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.5}),
    "gemma3_text": _both(_HEAD_DIM, _WINDOW, _TWO_ROPES, {"sliding_window_pattern": 2, "query_pre_attn_scalar": 8}),
    "smollm3": _both(
        {"use_sliding_window": True},
        _WINDOW,
        ({"no_rope_layers": [1, 0, 1]}, {"no_rope_layers": [0, 1, 1, 0, 1]}),
    ),
    "olmo2": _both(),
    "phi3": _both(_WINDOW, {"pad_token_id": PAD, "original_max_position_embeddings": 128}),
    "phi": _both({"partial_rotary_factor": 0.5}),
    "granite": _both(
        (
            {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_scaling": 2.0},
            {"embedding_multiplier": 5.0, "residual_multiplier": 0.4, "logits_scaling": 0.5},
        ),
        {"attention_multiplier": 0.3},
    ),
    "starcoder2": _both(_WINDOW),
    "gpt_neox": _both(
        {"num_key_value_heads": None},  # it has no such field
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "partial_rotary_factor": 0.5}},
        ),
    ),
    "mixtral": _both(_HEAD_DIM, _WINDOW, {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def tiny_config(family: str, *, large: bool = False, **changes: Any) -> PreTrainedConfig:
    """The small or the large configuration of a family."""
    settings = (_LARGE if large else _SMALL) | FAMILIES[family][large]
    common = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    given = {name: value for name, value in (common | settings | changes).items() if value is not None}
    return CONFIG_MAPPING[family](**given)


def tiny_model(family: str = "llama", *, large: bool = False, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random causal LM in eval mode; no weight is at a special value such as 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, large=large, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def token_ids(*shape: int, seed: int = 0) -> Tensor:
    """Random ids that are neither padding, BOS nor EOS."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(ids: Tensor, lengths: list[int]) -> dict[str, Tensor]:
    """Rows of the given lengths, padded on the left, with their mask."""
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, -length:] = 1
    return {"input_ids": torch.where(mask.bool(), ids, PAD), "attention_mask": mask}


def randomise_joints(model: StitchedForCausalLM, seed: int = 0) -> list[nn.Module]:
    """Give the stitching layers weights that keep the scale of hidden states, and biases."""
    layers, generator = model.stitching_layers(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / layer.in_features**0.5)
            layer.bias.copy_(0.3 * torch.randn(layer.bias.shape, generator=generator))
    return layers


def save_with_tokenizer(
    model: PreTrainedModel, folder: Folder, words: list[str] | None = None, **options: Any
) -> Folder:
    """Save an anchor with a word-level tokenizer of its vocabulary's size; `words` replaces the first entries."""
    names = [f"word{number}" for number in range(model.config.vocab_size)]
    names[: len(words or [])] = words or []
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token=names[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=names[0]).save_pretrained(folder)
    model.save_pretrained(folder, **options)
    return folder


def block_list(model: PreTrainedModel) -> nn.ModuleList:
    return model.base_model.layers


@torch.no_grad()
def reference_logits(
    anchors: Sequence[PreTrainedModel],
    path: str | tuple[int, int],
    layers: Sequence[nn.Module],
    **inputs: Tensor,
) -> Tensor:
    """What the model of a path should give, from hooks on the whole anchors: `(batch, tokens, vocabulary)`.

    For each slice its anchor runs in full, but the input of its block `start` is replaced by what the stitching layer
    makes of the slice before (at the anchor's depth: the output of the last block), and the output of its block
    `stop - 1` is kept.
    """
    fed: Tensor | None = None
    for number, one in enumerate(Path.of(path).slices):
        blocks = block_list(anchors[one.anchor])
        kept: list[Tensor] = []
        handles = []
        if number and one.start < len(blocks):
            handles += [blocks[one.start].register_forward_pre_hook(partial(_feed, fed), with_kwargs=True)]
        elif number:
            handles += [blocks[-1].register_forward_hook(partial(_replace_output, fed))]
        if one.stop is not None:
            handles += [blocks[one.stop - 1].register_forward_hook(partial(_keep, kept))]
        try:
            logits = anchors[one.anchor](**inputs, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        if one.stop is not None:
            fed = layers[number](kept[0])
    return logits


def _keep(kept: list[Tensor], module: nn.Module, args: Any, output: Any) -> None:
    kept.append(output[0] if isinstance(output, tuple) else output)


def _feed(fed: Tensor, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return ((fed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": fed})


def _replace_output(fed: Tensor, module: nn.Module, args: Any, output: Any) -> Any:
    return (fed, *output[1:]) if isinstance(output, tuple) else fed
