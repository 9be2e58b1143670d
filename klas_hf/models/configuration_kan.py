"""Configuration of image classifiers with KAN heads."""

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from .configuration_base import derived
from .configuration_stitched_vision import backbone_config
from .kan_compressed import Compression
from .kan_splines import Grid

FORMAT_VERSION = 1  # of the tensors' layout and the fields' meaning


class KANConfig(PreTrainedConfig):
    """Configuration of `KANForImageClassification` and `KANForManyTasks`.

    Args:
        backbone_config: configuration (or its dict) of the backbone: of any that `AutoBackbone` knows, a
            `StitchedVisionConfig` included.
        hidden_widths: of the head's hidden layers, if any.
        grid_intervals, spline_order, grid_low, grid_high: the grid of every spline (`klas_hf.models.kan_splines.Grid`).
        base: "none" (splines alone) or "silu".
        compression: `codebook`, `bits` and `bias` (of a `Compression`) of a compressed head, with the
            `r2` that was reached; None: a dense one.
        tasks: of `KANForManyTasks`, the names of each task's classes; None: one head, with the classes of `id2label`.
        training: how the model was trained, or None.
        initializer_range: standard deviation of a backbone's weights that are drawn at random.

    Raises:
        ValueError: a grid or compression that there is not, or a checkpoint of a newer format.

    Example:
        >>> from transformers import ResNetConfig
        >>> config = KANConfig(backbone_config=ResNetConfig(), hidden_widths=[32], num_labels=10)
        >>> config.grid.coefficients, config.compression is None
        (8, True)
    """

    model_type = "kan"
    _auto_class = "AutoConfig"  # a checkpoint carries its code
    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": AutoConfig}

    backbone_config: Any = None
    hidden_widths: Any = None
    grid_intervals: int = 5
    spline_order: int = 3
    grid_low: float = -3.0
    grid_high: float = 3.0
    base: str = "none"
    compression: dict[str, Any] | None = None
    tasks: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self.backbone_config = backbone_config(self.backbone_config, "resnet")
        self.hidden_widths = list(self.hidden_widths or [])
        super().__post_init__(**kwargs)
        _ = self.grid, self.how_compressed  # which check what they are made of

    @property
    def grid(self) -> Grid:
        """The grid of every spline."""
        return Grid(self.grid_intervals, self.spline_order, self.grid_low, self.grid_high)

    @property
    def how_compressed(self) -> Compression | None:
        """How the head is compressed; None: it is not."""
        given = dict(self.compression or {})
        given.pop("r2", None)
        return Compression(**given) if given else None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        version = config_dict.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise ValueError(
                f"got a KAN head of format {version}; expected format {FORMAT_VERSION}. A newer klas_hf wrote it: pip "
                "install -U klas_hf"
            )
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """All fields, with the version of the format."""
        return super().to_dict() | {"format_version": FORMAT_VERSION}

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to config.json."""
        return super().to_diff_dict() | {"format_version": FORMAT_VERSION}

    format_version = derived(lambda self: FORMAT_VERSION)
