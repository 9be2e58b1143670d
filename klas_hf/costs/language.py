"""Costs of causal language models, stitched or not."""

import copy

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from klas_hf.anchors.families import decoder_family
from klas_hf.budgets import Cost
from klas_hf.costs.counting import macs_by_module, parameter_count
from klas_hf.costs.measured import linear_weights
from klas_hf.costs.paths import AnchorCosts, stitch_costs
from klas_hf.models.configuration_stitched import StitchedConfig, kv_shape
from klas_hf.stitch_costs import StitchCosts


def decoder_costs(config: PreTrainedConfig, dtype: torch.dtype, tokens: int) -> Cost:
    """MACs, parameters and cache bytes of a causal language model of this configuration."""
    meta = _on_meta(config)
    macs = sum(_macs_by_module(meta, tokens).values())
    return Cost(macs, parameter_count(meta), _kv_numbers_per_token(config) * dtype.itemsize, tokens)


def decoder_stitch_costs(source: PreTrainedConfig, target: PreTrainedConfig, tokens: int) -> StitchCosts:
    """Costs of every stitch between two causal language models, from one counted forward of each."""
    first, last = (decoder_part_costs(config, torch.float32, tokens) for config in (source, target))
    return stitch_costs(first, last, tokens=tokens)


def decoder_part_costs(config: PreTrainedConfig, dtype: torch.dtype, tokens: int) -> AnchorCosts:
    """Costs of a causal language model's parts, for one sequence of so many tokens, from one counted forward."""
    family = decoder_family(config)
    model = _on_meta(config)
    by_module = _macs_by_module(model, tokens)
    blocks = model.base_model.get_submodule(family.blocks)
    norm, head = model.base_model.get_submodule(family.norm), model.get_output_embeddings()
    is_embedding = head.weight is model.get_input_embeddings().weight
    heads, width = kv_shape(config)
    return AnchorCosts(
        embed_macs=0,
        block_macs=[sum(by_module.get(module, 0) for module in block.modules()) for block in blocks],
        head_macs=by_module.get(head, 0),
        embed_parameters=parameter_count(model.get_input_embeddings()),
        block_parameters=[parameter_count(block) for block in blocks],
        head_parameters=parameter_count(norm) + parameter_count(head),
        widths=[config.hidden_size] * (len(blocks) + 1),
        positions=[tokens] * (len(blocks) + 1),
        block_kv_bytes=[2 * heads * width * dtype.itemsize] * len(blocks),
        block_linears=[linear_weights(block) for block in blocks],
        tied_parameters=head.weight.numel() if is_embedding else 0,
        merges=family.writer is not None,
    )


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
    return macs_by_module(model, input_ids=ids, attention_mask=mask, use_cache=False)


def _kv_numbers_per_token(config: PreTrainedConfig) -> int:
    layers = config.per_layer_config if isinstance(config, StitchedConfig) else [config] * config.num_hidden_layers
    return sum(2 * heads * width for heads, width in map(kv_shape, layers))
