"""Configuration of a stitched model: the configurations of both anchors, cut to the blocks that are used.

`source_config` and `target_config` describe ordinary transformers models of `source_stop` and
`target_blocks - target_start` blocks. What libraries read from a config's top level (depth, widths, vocabulary,
layer types) is derived from the two.
"""

import sys
from collections.abc import Callable
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .checkpoint_files import FORMAT_VERSION, check_format

_DERIVED = (
    "format_version",
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
)

# Query and value projections under the names of all families.
_LORA_TARGETS = r".*\.(q_proj|v_proj|query_key_value|qkv_proj)"


def _derived(value: Callable[["StitchedConfig"], Any]) -> Any:
    """A property that follows from the two sides.

    It has a setter because PreTrainedConfig assigns every key of a JSON file: what stands there is the same value.
    """
    return property(value, lambda self, same: None)


class StitchedConfig(PreTrainedConfig):
    """Configuration of every stitched model; `StitchedModel.from_anchors` makes it.

    Args:
        source_config, target_config: configurations (or their dicts) of the kept part of each anchor.
        source_stop, target_start: the stitch (i, j): `source.blocks[:i]`, stitching layer, `target.blocks[j:]`.
        source_blocks, target_blocks: depths of the whole anchors.
        source_norm: name of the source's final norm, which does not run.
        head_bias: whether the target's head has a bias.
        stitch_bias: whether the stitching layer has a bias.
        stitch_fit: how the stitching layer was initialised by least squares (`r2`, `ridge`, `tokens`), or None
            for a random start.
        source_name, target_name: Hub ids or folders of the anchors.
        source_revision, target_revision: their commits, where known.
        delta: of a checkpoint without the anchors' tensors, what is needed to assemble it (see `klas_hf.hub.delta`).
        initializer_range: standard deviation of weights that are drawn at random.
        tie_word_embeddings: always False: the source embeds, the target has the head.
        use_cache, bos_token_id, eos_token_id, pad_token_id: as in any decoder's configuration; the target's.

    Example:
        >>> config = StitchedModel.from_anchors(source, target, stitch=(2, 3), calibration=batches).config
        >>> config.source_config.num_hidden_layers, config.target_config.num_hidden_layers  # of 3 and 4
        (2, 1)
        >>> config.num_hidden_layers, config.embedding_size, config.hidden_size, config.vocab_size
        (3, 16, 24, 64)
    """

    model_type = "stitched"
    _auto_class = "AutoConfig"  # a checkpoint carries its code
    sub_configs = {"source_config": AutoConfig, "target_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {}

    source_config: Any = None
    target_config: Any = None
    source_stop: int = 1
    target_start: int = 0
    source_blocks: int = 1
    target_blocks: int = 1
    source_norm: str = "norm"
    head_bias: bool = False
    stitch_bias: bool = True
    stitch_fit: dict[str, Any] | None = None
    source_name: str | None = None
    target_name: str | None = None
    source_revision: str | None = None
    target_revision: str | None = None
    delta: dict[str, Any] | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.source_config = _as_config(self.source_config)
        self.target_config = _as_config(self.target_config)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        check_format(config_dict)
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """All fields, with the derived ones: adapters and servers read the JSON."""
        _enter_lora_targets(self.model_type)
        return super().to_dict() | {name: getattr(self, name) for name in _DERIVED}

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to config.json: differences from the defaults, and the derived fields."""
        return super().to_diff_dict() | {name: getattr(self, name) for name in _DERIVED}

    @property
    def vocab_size(self) -> int:
        return self.target_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:  # resizing the embeddings sets it
        self.source_config.vocab_size = self.target_config.vocab_size = value

    format_version = _derived(lambda self: FORMAT_VERSION)
    per_layer_config = _derived(lambda self: [*_layers(self.source_config), *_layers(self.target_config)])
    num_hidden_layers = _derived(lambda self: len(self.per_layer_config))
    hidden_size = _derived(lambda self: self.target_config.hidden_size)
    embedding_size = _derived(lambda self: self.source_config.hidden_size)
    max_position_embeddings = _derived(
        lambda self: min(self.source_config.max_position_embeddings, self.target_config.max_position_embeddings)
    )
    layer_types = _derived(lambda self: _layer_types(self.source_config) + _layer_types(self.target_config))
    num_attention_heads = _derived(lambda self: self.target_config.num_attention_heads)
    # What must be alike in all layers to have a place at the top; None where it is not.
    num_key_value_heads = _derived(lambda self: _only({kv_shape(layer)[0] for layer in self.per_layer_config}))
    head_dim = _derived(lambda self: _only({kv_shape(layer)[1] for layer in self.per_layer_config}))
    # One number for transformers < 5.19, whose caches read it here: the widest keeps enough for every layer.
    sliding_window = _derived(lambda self: max(self.sliding_windows(), default=None))

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


def _as_config(config: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig:
    if config is None:  # transformers makes default instances, to compare with
        return CONFIG_MAPPING["llama"]()
    if isinstance(config, PreTrainedConfig):
        return config
    config = dict(config)
    return CONFIG_MAPPING[config.pop("model_type")](**config)


def _layer_types(config: PreTrainedConfig) -> list[str]:
    """Attention type of each block; without an explicit list every block is of one type."""
    given = getattr(config, "layer_types", None)
    if given is not None:
        return list(given)
    windowed = getattr(config, "sliding_window", None) is not None
    return ["sliding_attention" if windowed else "full_attention"] * config.num_hidden_layers


def _layers(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The configuration as each block sees it (alike for all blocks of a side)."""
    return [config] * config.num_hidden_layers


def kv_shape(layer: PreTrainedConfig) -> tuple[int, int]:
    """(KV heads, head width) of a block; families that have no field for one of them take it from the heads."""
    heads = layer.num_attention_heads
    return (
        getattr(layer, "num_key_value_heads", None) or heads,
        getattr(layer, "head_dim", None) or layer.hidden_size // heads,
    )


def _only(values: set[Any]) -> Any:
    return next(iter(values)) if len(values) == 1 else None
