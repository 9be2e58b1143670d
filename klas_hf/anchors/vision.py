"""An image classifier or a dense model as an anchor: what each of its blocks gives, and its head on it.

A dense head reads maps of several states beside the last (`vision_states`). One that another anchor left comes to it
through a least-squares layer, as in the stitched model.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from klas_hf.anchors.anchor import Anchor
from klas_hf.anchors.dense import (
    backbone_of,
    body_config,
    dense_head,
    is_dense,
    norm_name,
    on_stitched_backbone,
    wanted_maps,
)
from klas_hf.anchors.images import VOID, ImageBatch, image_batches
from klas_hf.anchors.language import anchor_config, hub_options, pretrained
from klas_hf.anchors.vision_states import MappedFeatures, feature_rows, giving, map_rows, split, stacked
from klas_hf.anchors.weights import device_of, evaluating
from klas_hf.maths.least_squares import RIDGE, LeastSquares, LinearFit
from klas_hf.models.modeling_stitched_vision import StitchingLayer, as_map, dropped_prefix
from klas_hf.models.vision_features import Block, Features, VisionKind, drop_block, image_size
from klas_hf.models.vision_kinds import vision_kind
from klas_hf.models.vision_shapes import FeatureShape, trace
from klas_hf.processes import progress, shared_out, sum_over_processes


class VisionAnchor(Anchor[ImageBatch, Any]):
    """A pretrained image classifier or dense model, read by blocks; a state is `Features` or `MappedFeatures`.

    BatchNorm uses its running statistics, unless the model is in training. Of a dense model, `config` is that of the
    classifier that its backbone is the body of.

    Raises:
        ValueError: its kind is unknown.
    """

    unit = "image"

    def __init__(self, model: PreTrainedModel, revision: str | None = None):
        self.dense = dense_head(model.config) if is_dense(model) else None
        model = model if self.dense is None else on_stitched_backbone(model)
        super().__init__(model, revision)
        self.body = model if self.dense is None else backbone_of(model).slices[0]
        self.config = self.body.config
        self.kind: VisionKind = vision_kind(self.config)
        self.wanted = [] if self.dense is None else wanted_maps(model.config)
        self._laterals: dict[tuple[str, int], LinearFit] = {}  # weights of an anchor, map of the head → layer

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self.kind.blocks(self.config)

    def writer(self, block: int) -> nn.Module | None:
        name = self.kind.writer
        return None if name is None else self.body.get_submodule(f"{self.blocks[block].modules[-1]}.{name}")

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def widths(self) -> list[int]:
        return [shape.channels for shape in self.shapes()]

    @property
    def classes(self) -> int:
        return self.model.config.num_labels

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    def shapes(self, size: tuple[int, int] | None = None) -> tuple[FeatureShape, ...]:
        """Shapes of all states, for images of this (height, width)."""
        return trace(self.config, size)

    def read(self, data: Iterable[Any], *, probed: bool = False) -> Iterator[ImageBatch]:
        return image_batches(data, per_pixel=self.dense is not None and not probed)

    def check_like(self, other: "VisionAnchor") -> None:
        if (self.dense is None) != (other.dense is None):
            raise ValueError(
                f"got {self.name} and {other.name}, of which one is a classifier and one a dense model; expected two "
                "of one kind"
            )
        check_labels(self.model.config, other.model.config)

    def image_labels(self, labels: Tensor) -> Tensor:
        """What a probe of pooled features learns: an image's class, or, of a dense model, its classes' shares of it.

        Args:
            labels: `(images,)`, or masks `(images, height, width)`.

        Raises:
            ValueError: masks for a classifier, classes for a dense model, or an image without a labelled pixel.
        """
        if (labels.ndim > 1) != (self.dense is not None):
            raise ValueError(
                f"got labels of shape {tuple(labels.shape)} for {self.name}; expected "
                + ("masks (images, height, width)" if self.dense else "class numbers (images,)")
            )
        if self.dense is None:
            return labels
        each = [torch.bincount(mask[mask != VOID], minlength=self.classes) for mask in labels]
        counts = torch.stack(each).float()
        if counts.shape[1] > self.classes or not counts.sum(1).all():
            raise ValueError(
                f"got a mask of {counts.shape[1]} classes, or without one, for {self.name} of {self.classes}; expected "
                f"0 to {self.classes - 1} in some pixels, and {VOID} in the others"
            )
        return counts / counts.sum(1, keepdim=True)

    @torch.no_grad()
    def meet(self, others: Sequence["VisionAnchor"], calibration: Iterable[ImageBatch]) -> None:
        met = [one for one in others if (one.fingerprint, len(self.wanted) - 1) not in self._laterals]
        if self.dense is None or not met:
            return
        sums = [
            LeastSquares(one.widths[one._mapped(state, self)], self.widths[state], self.device)
            for one in met
            for state in self.wanted
        ]
        for batch in progress(shared_out(calibration), f"calibrating the maps of {self.name}"):
            own = self._maps(self.states(batch)[-1], batch)
            for n, one in enumerate(met):
                maps = one.states(batch)[-1].maps
                for k, (wanted, grid) in enumerate(zip(own, self._grids(batch), strict=True)):
                    theirs = one._normed(maps[grid][1], grid, batch)
                    sums[n * len(own) + k].update(map_rows(theirs), map_rows(wanted))
        for place, one_sum in enumerate(sums):
            one_sum.combine(sum_over_processes)
            n, k = divmod(place, len(self.wanted))
            self._laterals[met[n].fingerprint, k] = one_sum.solve(RIDGE)

    def front(self, inputs: Mapping[str, Any], stop: int) -> Any:
        """As of every anchor; `inputs` may have `rates`, an iterator over the blocks' rates of stochastic depth."""
        self.kind.check_pixels(inputs["pixel_values"], self.config)
        state: Any = self.kind.run_embed(self.body, inputs["pixel_values"])
        state = state if self.dense is None else MappedFeatures(state.hidden, state.height, state.width, {})
        return self.run(state, inputs, 0, stop)

    def run(self, state: Any, inputs: Mapping[str, Any], start: int, stop: int) -> Any:
        self.kind.check_size(inputs["pixel_values"], self.config)
        features = Features(state.hidden, state.height, state.width)
        passed = {(features.height, features.width): (self, features.hidden)}
        for block in self.blocks[start:stop]:
            after = self.kind.run_block(self.body, block, features)
            features = drop_block(features, after, next(inputs["rates"])) if "rates" in inputs else after
            passed[features.height, features.width] = (self, features.hidden)
        if self.dense is None:
            return features
        return MappedFeatures(features.hidden, features.height, features.width, dict(state.maps) | passed)

    @torch.no_grad()
    def states(self, batch: ImageBatch, stop: int | None = None) -> list[Features]:
        inputs = {"pixel_values": batch.pixel_values.to(device=self.device, dtype=self.model.dtype)}
        with evaluating(self.model):
            found = [self.front(inputs, 0)]
            for number in range(self.num_blocks if stop is None else stop):
                found.append(self.run(found[-1], inputs, number, number + 1))
        return found

    def logits(self, state: Features) -> Tensor:
        return self.kind.run_head(self.body, state)

    @torch.no_grad()
    def answers(self, state: Any, batch: ImageBatch, units: slice = slice(None)) -> Tensor:
        with evaluating(self.model):
            if self.dense is None:
                return self.logits(state)[units]
            with giving(backbone_of(self.model), self._maps(state, batch)):
                pixels = batch.pixel_values.to(device=self.device, dtype=self.model.dtype)
                scores = self.dense.scores(self.model(pixel_values=pixels), batch.answer_size)
            return scores.movedim(1, -1).flatten(0, 2)[units]

    def rows(self, state: Features, batch: ImageBatch, into: "VisionAnchor | None" = None) -> Tensor:
        return feature_rows(state, self.kind, 0 if into is None else dropped_prefix(self.kind, into.kind))

    def probed(self, state: Features, batch: ImageBatch, units: slice = slice(None)) -> Tensor:
        return self.kind.pooled(state)[units]

    def grids(self, batch: ImageBatch) -> list[tuple[int, int, int]]:
        shapes = self.shapes((batch.pixel_values.shape[-2], batch.pixel_values.shape[-1]))
        return [(shape.height, shape.width, self.kind.prefix_tokens) for shape in shapes]

    def joint(self, stop: int, into: "VisionAnchor", start: int, bias: bool = True) -> StitchingLayer:
        return StitchingLayer(self.kind, into.kind, self.widths[stop], into.widths[start], bias)

    def take(self, state: Features) -> Features:
        return state._replace(hidden=state.hidden.to(device=self.device, dtype=self.model.dtype))

    @staticmethod
    def stacked(states: Sequence[Any]) -> Any:
        return stacked(states)

    @staticmethod
    def split(state: Any, count: int) -> list[Any]:
        return split(state, count)

    def _grids(self, batch: ImageBatch) -> list[tuple[int, int]]:
        """(height, width) of the maps that the head takes."""
        every = self.grids(batch)
        return [every[state][:2] for state in self.wanted]

    def _mapped(self, state: int, head: "VisionAnchor") -> int:
        """The state of this anchor that lies where another's does that its head takes: the last on that grid."""
        size = image_size(self.config)
        wanted = head.shapes(size)[state].grid
        found = [number for number, shape in enumerate(self.shapes(size)) if shape.grid == wanted]
        if not found:
            raise ValueError(
                f"got {self.name} without a map of stride {size[0] / wanted[0]:.0f}, which the head of {head.name} "
                "takes; expected anchors whose backbones have maps of the same strides"
            )
        return found[-1]

    def _normed(self, hidden: Tensor, grid: tuple[int, int], batch: ImageBatch) -> Tensor:
        """A map as this anchor's backbone gives it, `(batch, channels, height, width)`."""
        one = as_map(self.kind, Features(hidden, *grid))
        state = max(number for number, found in enumerate(self.grids(batch)) if found[:2] == grid)
        norms, name = backbone_of(self.model).norms, norm_name(self.config, state)
        return norms[name](one.movedim(1, -1)).movedim(-1, 1).contiguous() if name in norms else one

    def _maps(self, state: MappedFeatures, batch: ImageBatch) -> tuple[Tensor, ...]:
        """What the head takes of a path's state, in its own widths."""
        found = []
        for number, grid in enumerate(self._grids(batch)):
            owner, hidden = state.maps[grid]
            one = owner._normed(hidden, grid, batch)
            if owner is not self:
                fit = self._laterals[owner.fingerprint, number]
                weight, bias = fit.weight.to(one), fit.bias.to(one)
                one = torch.einsum("bchw,dc->bdhw", one, weight) + bias[:, None, None]
            found.append(one)
        return tuple(found)


def load_vision_anchor(anchor: str | Path | PreTrainedModel | VisionAnchor, **kwargs: Any) -> VisionAnchor:
    """Load an image classifier or a dense model by Hub id or folder, or take a model as it is.

    Args:
        anchor: Hub id, local folder, model, or an anchor already loaded.
        kwargs: for `from_pretrained` of `AutoModelForImageClassification`, or of the dense model's class (dtype,
            device_map, revision, …).

    Raises:
        OSError: neither a folder nor to be had from the Hub.
        ValueError: its kind is unknown.
    """
    if isinstance(anchor, VisionAnchor):
        return anchor
    if isinstance(anchor, PreTrainedModel):
        return VisionAnchor(anchor)
    config = anchor_config(anchor, **hub_options(kwargs))
    if is_dense(config):
        model = pretrained(dense_head(config).kind, anchor, body_config, **kwargs)
    else:
        model = pretrained(AutoModelForImageClassification, anchor, vision_kind, **kwargs)
    return VisionAnchor(model, revision=kwargs.get("revision"))


def is_vision(anchor: Any, **hub: Any) -> bool:
    """Whether an anchor (Hub id, folder, model, configuration, or one already loaded) reads images.

    A dense model that can be stitched does, and a classifier of any type that transformers has one for: one that
    cannot be stitched is to be told the kinds that can.
    """
    if isinstance(anchor, VisionAnchor):
        return True
    if isinstance(anchor, str | Path):
        anchor = anchor_config(anchor, **hub)
    config = anchor if isinstance(anchor, PreTrainedConfig) else anchor.config
    return is_dense(config) or type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING


def check_labels(*configs: PreTrainedConfig) -> None:
    """Raise ValueError unless anchors of these configurations know the same classes, in the same order."""
    for config in configs[1:]:
        if config.num_labels != configs[0].num_labels:
            raise ValueError(
                f"got anchors of {configs[0].num_labels} and {config.num_labels} classes; expected the same classes. "
                "Fine-tune both anchors on one dataset first"
            )
        differing = [n for n, name in configs[0].id2label.items() if not _same_label(name, config.id2label.get(n), n)]
        if differing:
            n = differing[0]
            raise ValueError(
                f"got anchors that name {len(differing)} classes differently, class {n} as {configs[0].id2label[n]!r} "
                f"and as {config.id2label.get(n)!r}; expected the same classes in the same order. If they are, give "
                "both configurations the same id2label"
            )


def _same_label(one: str, other: str | None, number: int) -> bool:
    """Names are compared only where both are known: LABEL_0 is what transformers calls a class without a name."""
    unnamed = f"LABEL_{number}"
    return other is not None and (one == other or unnamed in (one, other))
