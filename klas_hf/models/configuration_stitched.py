"""Configuration of a stitched model: the configurations of both anchors, cut to the blocks that are used.

`source_config` and `target_config` describe ordinary transformers models of `source_stop` and
`target_blocks - target_start` blocks. What libraries read from a config's top level (depth, widths, vocabulary,
layer types) is derived from the two.
"""

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

_DERIVED = ("num_hidden_layers", "vocab_size", "hidden_size", "embedding_size", "layer_types", "max_position_embeddings")


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
    """

    model_type = "stitched"
    sub_configs = {"source_config": AutoConfig, "target_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_fsdp_plan = {}

    source_config: PreTrainedConfig | dict[str, Any] | None = None
    target_config: PreTrainedConfig | dict[str, Any] | None = None
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

    def to_dict(self) -> dict[str, Any]:
        """All fields, with the derived ones: adapters and servers read the JSON."""
        return super().to_dict() | {name: getattr(self, name) for name in _DERIVED}

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to config.json: differences from the defaults, and the derived fields."""
        return super().to_diff_dict() | {name: getattr(self, name) for name in _DERIVED}

    # Derived values have setters because PreTrainedConfig assigns every key of a JSON file: what stands there is
    # the same value, so it is ignored (except vocab_size, which resizing the embeddings really changes).

    @property
    def num_hidden_layers(self) -> int:
        return self.source_config.num_hidden_layers + self.target_config.num_hidden_layers

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int) -> None:
        pass

    @property
    def vocab_size(self) -> int:
        return self.target_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.target_config.vocab_size = value
        if value > self.source_config.vocab_size:
            self.source_config.vocab_size = value

    @property
    def hidden_size(self) -> int:
        return self.target_config.hidden_size

    @hidden_size.setter
    def hidden_size(self, value: int) -> None:
        pass

    @property
    def embedding_size(self) -> int:
        return self.source_config.hidden_size

    @embedding_size.setter
    def embedding_size(self, value: int) -> None:
        pass

    @property
    def max_position_embeddings(self) -> int:
        return min(self.source_config.max_position_embeddings, self.target_config.max_position_embeddings)

    @max_position_embeddings.setter
    def max_position_embeddings(self, value: int) -> None:
        pass

    @property
    def layer_types(self) -> list[str]:
        return _layer_types(self.source_config) + _layer_types(self.target_config)

    @layer_types.setter
    def layer_types(self, value: list[str]) -> None:
        pass

    @property
    def per_layer_config(self) -> list[PreTrainedConfig]:
        return [*_layers(self.source_config), *_layers(self.target_config)]

    @per_layer_config.setter
    def per_layer_config(self, value: Any) -> None:
        pass


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
