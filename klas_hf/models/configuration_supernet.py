"""Configuration of a stitched supernet: its anchors, its paths, and the stitching layers that these run."""

from itertools import count
from typing import Any, ClassVar

from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, PreTrainedConfig

from .checkpoint_files import sensible
from .configuration_stitched_vision import as_config
from .vision_features import image_size


class StitchedSupernetConfig(PreTrainedConfig):
    """Configuration of every `StitchedSupernet`; `StitchedSupernet.from_anchors` makes it.

    Args:
        anchor_configs: configurations (or their dicts) of the anchors.
        paths: as texts such as "0[:8] 1[14:]", those with a joint.
        joint_of: numbers of the stitching layers that each path runs, in order; paths may share one. None: none do.
        joint_fits: how each stitching layer was initialised (`r2`, `ridge`, `rows`), or None.
        image_size: (height, width) in pixels; None takes the dearest anchor's. None for text.
        tokens: of the sequence that the costs of language models are counted for.
        generation_configs: of language models, each anchor's own settings.
        drop_path_rate: stochastic depth of a path's last block in training, for images.
        initializer_range: standard deviation of weights that are drawn at random.
        anchor_names, anchor_revisions: Hub ids or folders of the anchors, and their commits, where known.
        training: how the supernet was fine-tuned, or None.
        ranking: all paths as texts, the best first (`StitchedSupernet.rank`), or None.

    Example:
        >>> config = StitchedSupernetConfig(
        ...     anchor_configs=[small.config, large.config], paths=["0[:1] 1[2:]", "0[:2] 1[3:]"], joint_of=[[0], [0]]
        ... )
        >>> supernet = StitchedSupernetForImageClassification(config)  # of random weights
        >>> len(supernet.paths), len(supernet.joints), config.image_size
        (4, 1, [16, 16])
    """

    model_type = "stitched_supernet"
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {}

    anchor_configs: Any = None
    paths: list[str] | None = None
    joint_of: list[list[int]] | None = None
    joint_fits: list[dict[str, Any]] | None = None
    image_size: list[int] | None = None
    tokens: int = 128
    generation_configs: list[dict[str, Any]] | None = None
    drop_path_rate: float = 0.0
    initializer_range: float = 0.02
    anchor_names: list[Any] | None = None
    anchor_revisions: list[Any] | None = None
    training: dict[str, Any] | None = None
    ranking: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.anchor_configs = [as_config(config) for config in self.anchor_configs or [None]]
        self.paths = list(self.paths or [])
        if self.joint_of is None:
            numbers = count()
            self.joint_of = [[next(numbers) for _ in path.split()[1:]] for path in self.paths]
        if type(self.anchor_configs[-1]) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
            self.image_size = list(self.image_size or image_size(self.anchor_configs[-1]))
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        with sensible(cls.model_type):
            made = super().from_dict(config_dict, **kwargs)
            (made[0] if isinstance(made, tuple) else made).to_dict()
        return made

    @property
    def num_channels(self) -> int:
        return self.anchor_configs[-1].num_channels

    @property
    def vocab_size(self) -> int:
        return self.anchor_configs[-1].vocab_size

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return super().to_dict() | {"anchor_configs": [config.to_dict() for config in self.anchor_configs]}

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to config.json."""
        return super().to_diff_dict() | {"anchor_configs": [config.to_dict() for config in self.anchor_configs]}
