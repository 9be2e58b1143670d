"""Configuration of a stitched vision model: the configurations of both anchors, and where they are joined.

Unlike a language model's, the anchors' configurations are not cut: windows shift and rates grow with a block's
place in the whole, so the models are built whole (on the meta device) and what is not used is taken out.
"""

from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from .checkpoint_files import FORMAT_VERSION, check_format
from .vision_features import image_size
from .vision_kinds import vision_kind


class StitchedVisionConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of `StitchedForImageClassification` and `StitchedBackbone`.

    Args:
        source_config, target_config: configurations (or their dicts) of the whole anchors.
        source_stop, target_start: the stitch (i, j): `source.blocks[:i]`, stitching layer, `target.blocks[j:]`.
        source_channels, target_channels: widths that the stitching layer maps from and to.
        image_size: (height, width) in pixels; None takes the source's.
        stitch_bias: whether the stitching layer has a bias.
        stitch_fit: how the stitching layer was initialised by least squares (`r2`, `ridge`, `rows`), or None.
        drop_path_rate: stochastic depth of the last block in training; it grows linearly from 0 at the first.
        source_name, target_name: Hub ids or folders of the anchors.
        source_revision, target_revision: their commits, where known.
        delta: of a checkpoint without the anchors' tensors, what is needed to assemble it (see `klas_hf.hub.delta`).
        out_features, out_indices: which stages `StitchedBackbone` returns.
        initializer_range: standard deviation of weights that are drawn at random.

    Example:
        >>> config = StitchedModel.from_anchors(small, large, stitch=(2, 3), calibration=images).config
        >>> config.source_channels, config.target_channels, config.image_size
        (16, 24, [16, 16])
        >>> config.stage_names  # the stem, then a stage per block of a ViT
        ['stem', 'stage1', 'stage2', 'stage3']
    """

    model_type = "stitched_vision"
    _auto_class = "AutoConfig"  # a checkpoint carries its code
    sub_configs = {"source_config": AutoConfig, "target_config": AutoConfig}
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {}

    source_config: Any = None
    target_config: Any = None
    source_stop: int = 1
    target_start: int = 0
    source_channels: int = 1
    target_channels: int = 1
    image_size: list[int] | None = None
    stitch_bias: bool = True
    stitch_fit: dict[str, Any] | None = None
    drop_path_rate: float = 0.0
    initializer_range: float = 0.02
    source_name: str | None = None
    target_name: str | None = None
    source_revision: str | None = None
    target_revision: str | None = None
    delta: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.source_config = as_config(self.source_config)
        self.target_config = as_config(self.target_config)
        self.image_size = list(self.image_size or image_size(self.source_config))
        self.stage_names = ["stem", *(f"stage{number + 1}" for number in range(len(self.stage_ends())))]
        kwargs.pop("stage_names", None)  # derived
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        check_format(config_dict)
        fields = {name: value for name, value in config_dict.items() if name != "format_version"}
        return super().from_dict(fields, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to config.json: differences from the defaults, and the format."""
        return super().to_diff_dict() | {"format_version": FORMAT_VERSION}

    @property
    def num_channels(self) -> int:
        return self.source_config.num_channels

    @property
    def hidden_size(self) -> int:
        return self.target_channels

    def stage_ends(self) -> list[tuple[int, int]]:
        """The last block of each stage of the path, as (side, number of the block): 0 source, 1 target.

        The stage in which the source is left goes on in the target, where it may have another number: both are on one
        grid. Between anchors of a single stage each block is one, as in their backbones.
        """
        source = [block.stage for block in vision_kind(self.source_config).blocks(self.source_config)]
        target = [block.stage for block in vision_kind(self.target_config).blocks(self.target_config)]
        if target[-1] == 0:
            return [(0, n) for n in range(self.source_stop)] + [(1, n) for n in range(self.target_start, len(target))]
        left = [(0, n) for n in range(self.source_stop - 1) if source[n] != source[n + 1]]
        # The stitch stands for the output of target block j, which may be the last of its stage.
        entered = range(max(self.target_start - 1, 0), len(target))
        return left + [(1, n) for n in entered if target[n : n + 1] != target[n + 1 : n + 2]]


def as_config(config: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig:
    """A configuration from its dict; transformers makes default instances too, to compare with."""
    if config is None:
        return CONFIG_MAPPING["vit"]()
    if isinstance(config, PreTrainedConfig):
        return config
    config = dict(config)
    return CONFIG_MAPPING[config.pop("model_type")](**config)
