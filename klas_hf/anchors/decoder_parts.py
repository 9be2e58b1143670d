"""Parts of a decoder: its configuration cut to some blocks, and models of these that share its weights."""

import copy
from collections.abc import Iterable

import torch
from torch import nn
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from klas_hf.anchors.families import decoder_family


def cut_config(config: PreTrainedConfig, start: int, stop: int, *, fed: bool = False) -> PreTrainedConfig:
    """The configuration of `blocks[start:stop]`, embeddings untied; every list with an entry per block is cut.

    Args:
        fed: for a decoder that is fed hidden states instead of embeddings.
    """
    cut, depth = copy.deepcopy(config), config.num_hidden_layers
    cut.num_hidden_layers = stop - start
    cut.tie_word_embeddings = False
    for name, value in config.to_dict().items():
        per_block = isinstance(value, list) and len(value) == depth
        if per_block and name not in ("architectures", "eos_token_id"):
            setattr(cut, name, value[start:stop])
    if fed:
        for name, value in decoder_family(config).fed_hidden.items():
            setattr(cut, name, value)
    return cut


def decoder_part(
    decoder: PreTrainedModel, blocks: Iterable[nn.Module], start: int, stop: int, *, fed: bool
) -> PreTrainedModel:
    """`blocks[start:stop]` of a decoder, without its final norm, as a decoder that shares its modules.

    Args:
        fed: it takes `inputs_embeds`, the state before its first block; else it begins with the decoder's embedding.
    """
    family = decoder_family(decoder.config)
    config = cut_config(decoder.config, start, stop, fed=fed)
    config._attn_implementation = decoder.config._attn_implementation
    with torch.device("meta"):
        part = MODEL_MAPPING[type(config)](config)
    for name, module in decoder.named_children():
        if name not in (family.blocks, family.embeddings, family.norm):
            part.set_submodule(name, module)
    part.set_submodule(family.norm, nn.Identity())
    part.set_submodule(family.blocks, nn.ModuleList(blocks))
    part.set_input_embeddings(None if fed else decoder.get_input_embeddings())
    return part
