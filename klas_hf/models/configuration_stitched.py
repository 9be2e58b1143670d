"""Configuration of a stitched language model: the configurations of its slices, each cut to the blocks that it runs.

Each of `slice_configs` describes an ordinary transformers model of `stop - start` blocks. What libraries read from a
config's top level (depth, widths, vocabulary, layer types) is derived from them.
"""

import copy
import sys
from itertools import chain
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from .configuration_base import PathConfig, as_config, derived

# Query and value projections under the names of all families.
_LORA_TARGETS = r".*\.(q_proj|v_proj|query_key_value|qkv_proj)"


class StitchedConfig(PathConfig):
    """Configuration of every stitched language model; `StitchedModel.from_path` makes it.

    Args:
        slice_configs: configurations (or their dicts) of the slices, each of the blocks that it runs.
        slices: `[anchor, start, stop]` of every slice, anchors by position.
        anchor_blocks: depths of the whole anchors.
        slice_norms: name of each slice's final norm, of which only the last runs.
        head_bias: whether the last slice's head has a bias.
        joint_bias: whether the stitching layers have one.
        identity_joints: whether slices follow each other as they are, without stitching layers.
        joint_fits: how each stitching layer was initialised (`r2`, `ridge`, `rows`; `joint` but for least squares), or
            None for a random start.
        anchor_names, anchor_revisions: Hub ids or folders of the anchors, and their commits, where known.
        training: how the model was fine-tuned, or None.
        search: how the path was found (`budget`, `share` of the dearest anchor's MACs, `divergence` and its `error`,
            `paths` compared, `contenders` healed), or None.
        delta: of a checkpoint without the anchors' tensors, what is needed to assemble it (see `klas_hf.hub.delta`).
        initializer_range: standard deviation of weights that are drawn at random.
        tie_word_embeddings: whether the head is the embedding: first and last slice are of one anchor that ties them.
        use_cache, bos_token_id, eos_token_id, pad_token_id: as in any decoder's configuration; the last anchor's.

    Example:
        >>> config = StitchedModel.from_anchors(source, target, stitch=(2, 3), calibration=batches).config
        >>> config.path, [one.num_hidden_layers for one in config.slice_configs]  # of 3 and 4 blocks
        ('0[:2] 1[3:]', [2, 1])
        >>> config.num_hidden_layers, config.embedding_size, config.hidden_size, config.vocab_size
        (3, 16, 24, 64)
    """

    model_type = "stitched"
    listed: ClassVar[str] = "slice_configs"
    written: ClassVar[tuple[str, ...]] = (
        *PathConfig.written,
        "num_hidden_layers",
        "vocab_size",
        "hidden_size",
        "embedding_size",
        "layer_types",
        "max_position_embeddings",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "sliding_window",
        "logit_scale",
        "final_logit_softcapping",
        "attn_logit_softcapping",
    )
    keys_to_ignore_at_inference = ["past_key_values"]

    slice_configs: Any = None
    slice_norms: list[str] | None = None
    head_bias: bool = False
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.slice_configs = [as_config(config, "llama") for config in self.slice_configs or [None]]
        if self.slices is None:  # transformers makes default instances, to compare with
            self.slices = [[0, 0, self.slice_configs[0].num_hidden_layers]]
        self.slices = [list(one) for one in self.slices]
        self.anchor_blocks = self.anchor_blocks or [self.slices[0][2]]
        self.slice_norms = self.slice_norms or ["norm"] * len(self.slices)
        super().__post_init__(**kwargs)
        if len(set(map(_attention_shape, self.slice_configs))) > 1:  # what sets is_heterogeneous, as servers ask for it
            PreTrainedConfig.per_layer_config.fset(self, {})

    def to_dict(self) -> dict[str, Any]:
        """All fields, with the derived ones; read by PEFT, which then finds the model's LoRA targets."""
        _enter_lora_targets(self.model_type)
        return super().to_dict()

    @property
    def vocab_size(self) -> int:
        return self.slice_configs[-1].vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:  # resizing the embeddings sets it
        for config in self.slice_configs:
            config.vocab_size = value

    per_layer_config = derived(lambda self: list(chain.from_iterable(map(self._layers, self.slice_configs))))
    num_hidden_layers = derived(lambda self: sum(one.num_hidden_layers for one in self.slice_configs))
    hidden_size = derived(lambda self: self.slice_configs[-1].hidden_size)
    embedding_size = derived(lambda self: self.slice_configs[0].hidden_size)
    max_position_embeddings = derived(lambda self: min(one.max_position_embeddings for one in self.slice_configs))
    layer_types = derived(lambda self: list(chain.from_iterable(map(_layer_types, self.slice_configs))))
    num_attention_heads = derived(lambda self: self.slice_configs[-1].num_attention_heads)
    # What must be alike in all layers to have a place at the top; None where it is not.
    num_key_value_heads = derived(lambda self: _only({kv_shape(layer)[0] for layer in self.per_layer_config}))
    head_dim = derived(lambda self: _only({kv_shape(layer)[1] for layer in self.per_layer_config}))
    # One number for transformers < 5.19, whose caches read it here: the widest keeps enough for every layer.
    sliding_window = derived(lambda self: max(self.sliding_windows(), default=None))
    # What a server does to logits: a factor and a cap of its own, beside the head's.
    logit_scale = derived(lambda self: logit_factor(self.slice_configs[-1]))
    final_logit_softcapping = derived(lambda self: getattr(self.slice_configs[-1], "final_logit_softcapping", None))
    attn_logit_softcapping = derived(lambda self: _only(set(map(attention_cap, self.slice_configs))))

    def _layers(self, config: PreTrainedConfig) -> list[PreTrainedConfig]:
        """The whole model's configuration as each block of a slice sees it: its own attention, the model's rest."""
        layer = copy.copy(config)
        _, layer.num_key_value_heads, layer.head_dim = _attention_shape(config)
        whole = ("architectures", "hidden_size", "max_position_embeddings", "model_type", "num_hidden_layers")
        for name in whole:
            setattr(layer, name, getattr(self, name))
        return [layer] * config.num_hidden_layers

    def sliding_windows(self) -> set[int]:
        """The windows, in tokens, of the layers that have one."""
        layers = zip(self.layer_types, self.per_layer_config, strict=True)
        return {layer.sliding_window for kind, layer in layers if kind == "sliding_attention"}

    def kv_shapes(self) -> set[tuple[int, int]]:
        """The (KV heads, head width) that occur among the layers."""
        return {kv_shape(layer) for layer in self.per_layer_config}


def _enter_lora_targets(model_type: str) -> None:
    """Give PEFT the modules that LoRA adapts by default.

    PEFT reads a model's configuration as a dict just before it looks the model type up. Done then, nothing imports PEFT
    early, and the order of imports does not matter.
    """
    table = sys.modules.get("peft.utils.constants")
    if table is not None:
        table.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(model_type, _LORA_TARGETS)


def _layer_types(config: PreTrainedConfig) -> list[str]:
    """Attention type of each block; without an explicit list every block is of one type."""
    given = getattr(config, "layer_types", None)
    if given is not None:
        return list(given)
    windowed = getattr(config, "sliding_window", None) is not None
    return ["sliding_attention" if windowed else "full_attention"] * config.num_hidden_layers


def kv_shape(layer: PreTrainedConfig) -> tuple[int, int]:
    """(KV heads, head width) of a block; families that have no field for one of them take it from the heads."""
    heads = layer.num_attention_heads
    return (
        getattr(layer, "num_key_value_heads", None) or heads,
        getattr(layer, "head_dim", None) or layer.hidden_size // heads,
    )


def _attention_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Heads, KV heads, head width."""
    return (config.num_attention_heads, *kv_shape(config))


def attention_cap(config: PreTrainedConfig) -> float | None:
    """What attention's scores are softly capped at (Gemma 2)."""
    return getattr(config, "attn_logit_softcapping", None)


def logit_factor(config: PreTrainedConfig) -> float:
    """What a family multiplies its logits by: Granite divides, Cohere multiplies."""
    return (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)


def _only(values: set[Any]) -> Any:
    return next(iter(values)) if len(values) == 1 else None
