"""What the configurations of stitched language and vision models share: the path, and a list of configurations."""

from collections.abc import Callable
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .checkpoint_files import FORMAT_VERSION, check_format, path_text, sensible


def derived(value: Callable[[Any], Any]) -> Any:
    """A property that follows from the slices.

    It has a setter because PreTrainedConfig assigns every key of a JSON file: what stands there is the same value.
    """
    return property(value, lambda self, same: None)


class PathConfig(PreTrainedConfig):
    """Base of the configurations of stitched models.

    Attributes:
        listed: the field that holds configurations; `slice_configs` makes them sub-configs `slice_0`, `slice_1`, ….
        written: the derived properties that libraries read in config.json.
    """

    listed: ClassVar[str]
    written: ClassVar[tuple[str, ...]] = ("format_version", "path")
    _auto_class = "AutoConfig"  # a checkpoint carries its code
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {}

    slices: Any = None
    anchor_blocks: list[int] | None = None
    joint_bias: bool = True
    identity_joints: bool = False
    joint_fits: list[dict[str, Any]] | None = None
    anchor_names: list[Any] | None = None
    anchor_revisions: list[Any] | None = None
    training: dict[str, Any] | None = None
    search: dict[str, Any] | None = None
    delta: dict[str, Any] | None = None
    initializer_range: float = 0.02

    @property
    def sub_configs(self) -> dict[str, Any]:
        """Where transformers sets dtypes and attention implementations, by these names."""
        stem = self.listed.removesuffix("configs")
        return {f"{stem}{number}": AutoConfig for number in range(len(getattr(self, self.listed) or ()))}

    def __getattr__(self, name: str) -> Any:
        stem, number = type(self).listed.removesuffix("configs"), name.rpartition("_")[2]
        if name == f"{stem}{number}" and number.isdigit() and int(number) < len(getattr(self, self.listed)):
            return getattr(self, self.listed)[int(number)]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        with sensible(cls.model_type):
            check_format(config_dict)
            made = super().from_dict(config_dict, **kwargs)
            (made[0] if isinstance(made, tuple) else made).to_dict()  # all that follows from the slices
        return made

    def to_dict(self) -> dict[str, Any]:
        """All fields, with the derived ones: adapters and servers read the JSON."""
        return super().to_dict() | self._own_fields()

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to config.json: differences from the defaults, and the derived fields."""
        return super().to_diff_dict() | self._own_fields()

    def _own_fields(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.written}
        return fields | {self.listed: [config.to_dict() for config in getattr(self, self.listed)]}

    format_version = derived(lambda self: FORMAT_VERSION)
    path = derived(lambda self: path_text(self.slices))


def as_config(config: PreTrainedConfig | dict[str, Any] | None, default: str = "vit") -> PreTrainedConfig:
    """A configuration from its dict; None, as in transformers' instances to compare with, gives that of `default`."""
    if config is None:
        return CONFIG_MAPPING[default]()
    if isinstance(config, PreTrainedConfig):
        return config
    config = dict(config)
    return CONFIG_MAPPING[config.pop("model_type")](**config)
