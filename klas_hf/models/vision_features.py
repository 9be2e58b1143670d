"""A vision classifier taken apart: embed ─► blocks ─► head, alike for every kind of model.

Each kind (one file `vision_<kind>.py`) says where its parts are and how they are called. What belongs to a change of
stage (Swin's patch merging, ConvNeXt's downsampling, LeViT's subsampling attention) runs before the block that
follows it, so the output of a block always lies on the grid of its own stage, which is the grid that it may be
stitched on.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel


class Features(NamedTuple):
    """What passes between blocks.

    Attributes:
        hidden: tokens `(batch, prefix + height · width, channels)`, or a map `(batch, channels, height, width)`.
        height, width: the grid, in positions.
    """

    hidden: Tensor
    height: int
    width: int


@dataclass(frozen=True)
class Block:
    """One block of a classifier.

    Attributes:
        modules: names in the classifier of what the block runs, in order.
        stage: which stage it belongs to, from 0.
    """

    modules: tuple[str, ...]
    stage: int


class VisionKind(ABC):
    """How one kind of vision classifier is taken apart.

    Attributes:
        layout: "tokens" or "map", the form of `Features.hidden`.
        prefix_tokens: class and distillation tokens before the patch tokens.
        fixed_size: whether only images of `config.image_size` can be embedded.
        residual: whether a block that keeps its shape can be skipped (stochastic depth).
        normed_features: whether feature maps for dense heads go through a layer norm, as in the family's backbone.
        norm_eps: of these layer norms.
        writer: in the last module of a block, the linear layer whose output is the last to be added to the state, as it
            is; None where there is none, or a norm or a scale stands between.
        training: config fields that a stitched model sets, because it has stochastic depth of its own.
        embed: names of the modules before the first block.
        head: names of the modules after the last block.
    """

    layout: ClassVar[str] = "tokens"
    prefix_tokens: int = 0
    fixed_size: bool = False
    residual: bool = True
    normed_features: bool = True
    norm_eps: float = 1e-5
    writer: str | None = None
    training: ClassVar[dict[str, Any]] = {}
    embed: tuple[str, ...]
    head: tuple[str, ...]

    @abstractmethod
    def blocks(self, config: PreTrainedConfig) -> tuple[Block, ...]:
        """All blocks of a model of this configuration."""

    @abstractmethod
    def run_embed(self, model: PreTrainedModel, pixel_values: Tensor) -> Features:
        """`(batch, channels, height, width)` pixels to the first block's input."""

    @abstractmethod
    def run_module(self, module: nn.Module, name: str, features: Features) -> Features:
        """Run one of a block's modules."""

    @abstractmethod
    def run_head(self, model: PreTrainedModel, features: Features) -> Tensor:
        """The last block's output to logits `(batch, labels)`."""

    def run_block(self, model: PreTrainedModel, block: Block, features: Features) -> Features:
        """Run one block."""
        for name in block.modules:
            features = self.run_module(model.get_submodule(name), name, features)
        return features

    def pooled(self, features: Features) -> Tensor:
        """Mean over the grid, class tokens left out: `(batch, channels)`."""
        if self.layout == "map":
            return features.hidden.mean((-2, -1))
        return features.hidden[:, self.prefix_tokens :].mean(1)

    def check_pixels(self, pixel_values: Tensor, config: PreTrainedConfig) -> None:
        """Raise ValueError unless a model of this configuration can embed such images."""
        channels = config.num_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"got pixel_values of shape {tuple(pixel_values.shape)}; expected (batch, {channels}, height, width)"
            )
        self.check_size(pixel_values, config)

    def check_size(self, pixel_values: Tensor, config: PreTrainedConfig) -> None:
        """Raise ValueError unless a model of this configuration takes images of this height and width."""
        if self.fixed_size and (size := image_size(config)) != tuple(pixel_values.shape[-2:]):
            raise ValueError(
                f"got images of {tuple(pixel_values.shape[-2:])} pixels for a {config.model_type} of {size}; expected "
                "that size. Resize the images with the anchor's image processor"
            )


def on_map(hidden: Tensor) -> Features:
    """A map `(batch, channels, height, width)` with its grid."""
    return Features(hidden, hidden.shape[-2], hidden.shape[-1])


def image_size(config: PreTrainedConfig, default: int = 224) -> tuple[int, int]:
    """(height, width) in pixels that a configuration is for; `default` where the family has no such field."""
    size: Any = getattr(config, "image_size", None) or default
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def staged_blocks(names: list[list[tuple[str, ...]]]) -> tuple[Block, ...]:
    """Blocks from the module names of each block of each stage."""
    return tuple(Block(modules, stage) for stage, blocks in enumerate(names) for modules in blocks)


def drop_block(before: Features, after: Features, rate: float) -> Features:
    """Stochastic depth (Huang et al. 2016): leave the block out for a share `rate` of the samples.

    Only what the block adds is dropped, and what is kept is scaled up; a block that changes shape always runs.
    """
    if rate == 0 or before.hidden.shape != after.hidden.shape:
        return after
    shape = (len(after.hidden),) + (1,) * (after.hidden.ndim - 1)
    kept = torch.empty(shape, dtype=after.hidden.dtype, device=after.hidden.device).bernoulli_(1 - rate) / (1 - rate)
    return after._replace(hidden=before.hidden + kept * (after.hidden - before.hidden))
