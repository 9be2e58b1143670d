"""The decoder families that can be stitched, one line each: where a family keeps its parts.

All parts but the head are named relative to the decoder (the model without its head). A family belongs here when
its decoder takes `inputs_embeds` as the hidden states of its first block, adds no absolute position embedding to
them, and passes one hidden state from block to block.
"""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class DecoderFamily:
    """Where a decoder keeps its parts.

    Attributes:
        prefix: name of the decoder within the causal LM.
        blocks: the list of blocks.
        norm: the norm after the last block.
        embeddings: the token embedding.
        heads: names of the unembedding, in a checkpoint and in the model.
        head_bias: whether the unembedding has a bias.
        writer: the linear layer of a block whose output is the last to be added to the residual stream, as it is; None
            where a norm, a scale or a choice of experts stands between.
        fed_hidden: config fields to set where the decoder is fed hidden states instead of embeddings, so that it
            neither scales nor drops them.
    """

    prefix: str = "model"
    blocks: str = "layers"
    norm: str = "norm"
    embeddings: str = "embed_tokens"
    heads: tuple[str, ...] = ("lm_head",)
    head_bias: bool = False
    writer: str | None = "mlp.down_proj"
    fed_hidden: dict[str, Any] = field(default_factory=dict)


_LLAMA_LIKE = DecoderFamily()
_WITHOUT_WRITER = DecoderFamily(writer=None)
_GRANITE_LIKE = DecoderFamily(writer=None, fed_hidden={"embedding_multiplier": 1.0})

DECODER_FAMILIES: dict[str, DecoderFamily] = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "mixtral": _WITHOUT_WRITER,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "gemma": _LLAMA_LIKE,
    "gemma2": _WITHOUT_WRITER,
    "gemma3_text": _WITHOUT_WRITER,
    "smollm3": _LLAMA_LIKE,
    "olmo2": _WITHOUT_WRITER,
    "phi3": _LLAMA_LIKE,
    "phi": DecoderFamily(norm="final_layernorm", head_bias=True, writer="mlp.fc2", fed_hidden={"embd_pdrop": 0.0}),
    "granite": _GRANITE_LIKE,
    "starcoder2": DecoderFamily(writer="mlp.c_proj", fed_hidden={"embedding_dropout": 0.0}),
    "gpt_neox": DecoderFamily(
        prefix="gpt_neox",
        norm="final_layer_norm",
        embeddings="embed_in",
        heads=("lm_head", "embed_out"),
        writer="mlp.dense_4h_to_h",
    ),
}

_ABSOLUTE_POSITIONS = ("gpt2", "gpt_neo", "gpt_bigcode", "opt", "codegen", "biogpt", "xglm", "imagegpt")


def decoder_family(config: PreTrainedConfig) -> DecoderFamily:
    """The family of a causal language model's configuration.

    Raises:
        ValueError: the family cannot be stitched, or is not known here; the known ones are named.
    """
    model_type = config.model_type
    if model_type in _ABSOLUTE_POSITIONS:
        raise ValueError(
            f"got an anchor of type {model_type!r}, which adds position embeddings to whatever enters its first block "
            "and so would add them again to stitched hidden states; expected a family with rotary positions, one of "
            f"{sorted(DECODER_FAMILIES)}"
        )
    if model_type not in DECODER_FAMILIES:
        raise ValueError(f"got an anchor of unknown type {model_type!r}; expected one of {sorted(DECODER_FAMILIES)}")
    return DECODER_FAMILIES[model_type]
