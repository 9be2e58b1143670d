"""Costs counted, not estimated: MACs by torch's FlopCounterMode on the meta device, where nothing is allocated.

"FLOPs" in the stitching papers are multiply-accumulates; FlopCounterMode counts two operations for each, so its
counts are halved.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from klas_hf.anchors.families import decoder_family
from klas_hf.models.configuration_stitched import StitchedConfig, kv_shape
from klas_hf.stitches import StitchCosts


@dataclass(frozen=True)
class Cost:
    """What one model costs.

    Attributes:
        macs: multiply-accumulates of one forward over `tokens` tokens, logits of every position included.
        parameters: parameters stored, each counted once.
        kv_bytes_per_token: bytes that a cached token takes, in the model's dtype.
        tokens: length of the sequence that `macs` is for.
    """

    macs: int
    parameters: int
    kv_bytes_per_token: int
    tokens: int


def measure_costs(model: PreTrainedModel | PreTrainedConfig, *, tokens: int = 128) -> Cost:
    """MACs, parameters and cache bytes of a causal language model, stitched or not.

    Args:
        model: a model or only its configuration; no weight is allocated or run.
        tokens: length of the one sequence that is counted.
    """
    config = model.config if isinstance(model, PreTrainedModel) else model
    meta = _on_meta(config)
    macs = sum(_macs_by_module(meta, tokens).values())
    parameters = sum(p.numel() for p in meta.parameters())
    dtype = model.dtype if isinstance(model, PreTrainedModel) else config.dtype or torch.float32
    return Cost(macs, parameters, _kv_numbers_per_token(config) * dtype.itemsize, tokens)


def measure_stitch_costs(
    source: PreTrainedModel | PreTrainedConfig, target: PreTrainedModel | PreTrainedConfig, *, tokens: int = 128
) -> StitchCosts:
    """Costs of every stitch between two anchors, from one counted forward of each.

    Args:
        source, target: models or configurations; no weight is allocated or run.
        tokens: length of the one sequence that is counted.

    Raises:
        ValueError: a family is unknown.
    """
    first, last = _Parts.of(_config(source), tokens), _Parts.of(_config(target), tokens)
    widths = _config(source).hidden_size, _config(target).hidden_size
    return StitchCosts(
        tokens=tokens,
        source_blocks=np.array(first.block_macs, dtype=np.int64),
        target_blocks=np.array(last.block_macs, dtype=np.int64),
        stitch=tokens * widths[0] * widths[1],
        source_total=sum(first.block_macs) + first.head_macs,
        target_total=sum(last.block_macs) + last.head_macs,
        ends=last.head_macs,
        source_parameters=np.array(first.block_parameters, dtype=np.int64),
        target_parameters=np.array(last.block_parameters, dtype=np.int64),
        stitch_parameters=widths[0] * widths[1] + widths[1],
        ends_parameters=first.embedding_parameters + last.head_parameters,
    )


@dataclass(frozen=True)
class _Parts:
    """One anchor, taken apart: embedding, blocks, head with final norm."""

    block_macs: list[int]
    head_macs: int
    block_parameters: list[int]
    embedding_parameters: int
    head_parameters: int

    @classmethod
    def of(cls, config: PreTrainedConfig, tokens: int) -> "_Parts":
        family = decoder_family(config)
        model = _on_meta(config)
        by_module = _macs_by_module(model, tokens)
        blocks = model.base_model.get_submodule(family.blocks)
        norm, head = model.base_model.get_submodule(family.norm), model.get_output_embeddings()
        return cls(
            block_macs=[sum(by_module.get(module, 0) for module in block.modules()) for block in blocks],
            head_macs=by_module.get(head, 0),
            block_parameters=[_parameters(block) for block in blocks],
            embedding_parameters=_parameters(model.get_input_embeddings()),
            head_parameters=_parameters(norm) + _parameters(head),
        )


def _config(model: PreTrainedModel | PreTrainedConfig) -> PreTrainedConfig:
    return model.config if isinstance(model, PreTrainedModel) else model


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    config = copy.deepcopy(config)
    with torch.device("meta"):
        # batched_mm runs as many experts for each token as it is routed to, and asks for no values to do it.
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", experts_implementation="batched_mm"
        )
    return model.eval()


@torch.no_grad()
def _macs_by_module(model: PreTrainedModel, tokens: int) -> dict[nn.Module, int]:
    """MACs of each module's own operations, those of its children left out."""
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    # A full mask, so that no family builds one from values that do not exist on meta.
    mask = torch.zeros(1, 1, tokens, tokens, device="meta", dtype=model.dtype)
    counter = FlopCounterMode(display=False, depth=None)
    with counter:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    totals = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    root = type(model).__name__
    own = {}
    for name, module in model.named_modules():
        path = f"{root}.{name}" if name else root
        children = sum(totals.get(f"{path}.{child}", 0) for child, _ in module.named_children())
        own[module] = totals.get(path, 0) - children
    return own


def _kv_numbers_per_token(config: PreTrainedConfig) -> int:
    layers = config.per_layer_config if isinstance(config, StitchedConfig) else [config] * config.num_hidden_layers
    return sum(2 * heads * width for heads, width in map(kv_shape, layers))
