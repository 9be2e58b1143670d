"""Parts of a decoder: its configuration cut to some blocks, and models of its ends that share its weights."""

import copy
from collections.abc import Iterable

import torch
from torch import nn
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from klas_hf.anchors.language import LanguageAnchor


def cut_config(config: PreTrainedConfig, start: int, stop: int) -> PreTrainedConfig:
    """The configuration of `blocks[start:stop]`, embeddings untied; every list with an entry per block is cut."""
    cut, depth = copy.deepcopy(config), config.num_hidden_layers
    cut.num_hidden_layers = stop - start
    cut.tie_word_embeddings = False
    for name, value in config.to_dict().items():
        per_block = isinstance(value, list) and len(value) == depth
        if per_block and name not in ("architectures", "eos_token_id"):
            setattr(cut, name, value[start:stop])
    return cut


def decoder_front(anchor: LanguageAnchor, stop: int) -> PreTrainedModel:
    """The embedding and `blocks[:stop]` of a decoder without its final norm; it shares the anchor's modules."""
    front = _shared_part(anchor, cut_config(anchor.config, 0, stop), anchor.blocks[:stop])
    front.set_submodule(anchor.family.norm, nn.Identity())
    front.set_input_embeddings(anchor.decoder.get_input_embeddings())
    return front


def decoder_rear(anchor: LanguageAnchor, start: int) -> PreTrainedModel:
    """`blocks[start:]` of a decoder with its final norm, fed by `inputs_embeds`; it shares the anchor's modules."""
    config = cut_config(anchor.config, start, anchor.num_blocks)
    for name, value in anchor.family.fed_hidden.items():
        setattr(config, name, value)
    rear = _shared_part(anchor, config, anchor.blocks[start:])
    rear.set_input_embeddings(None)
    return rear


def _shared_part(anchor: LanguageAnchor, config: PreTrainedConfig, blocks: Iterable[nn.Module]) -> PreTrainedModel:
    config._attn_implementation = anchor.config._attn_implementation
    with torch.device("meta"):
        part = MODEL_MAPPING[type(config)](config)
    for name, module in anchor.decoder.named_children():
        if name not in (anchor.family.blocks, anchor.family.embeddings):
            part.set_submodule(name, module)
    part.set_submodule(anchor.family.blocks, nn.ModuleList(blocks))
    return part
