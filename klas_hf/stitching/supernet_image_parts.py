"""Supernets of image classifiers: from anchors, and their paths as models."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from klas_hf.anchors.images import image_batches
from klas_hf.anchors.vision import check_anchors, load_vision_anchor
from klas_hf.anchors.vision_stitches import rows, set_vision_stitch
from klas_hf.maths.least_squares import LinearFit
from klas_hf.models import StitchedForImageClassification
from klas_hf.models.configuration_supernet import StitchedSupernetConfig
from klas_hf.models.modeling_stitched_vision import dropped_prefix
from klas_hf.models.vision_kinds import vision_kind
from klas_hf.paths import Stitch
from klas_hf.stitching.images import (
    check_grids,
    check_pair,
    common_size,
    stitched_vision_config,
    usable_images,
)
from klas_hf.stitching.loading import load_parts
from klas_hf.stitching.supernet import note_origin
from klas_hf.stitching.supernet_images import StitchedSupernetForImageClassification
from klas_hf.stitching.supernets import SupernetParts


class ImageParts(SupernetParts):
    """Image classifiers that are to be joined."""

    def __init__(self, anchors: Sequence[Any], image_size: int | tuple[int, int] | None):
        self.anchors = [load_vision_anchor(anchor) for anchor in anchors]
        self.asked_size = image_size
        self.size = (0, 0)  # set by the check
        self.models = [anchor.model for anchor in self.anchors]
        self.names = [anchor.path for anchor in self.anchors]
        self.revisions = [anchor.revision for anchor in self.anchors]

    def check(self, stitches: Sequence[Stitch]) -> None:
        check_anchors(self.anchors)
        sizes = set()
        for pair in sorted({(stitch.source, stitch.target) for stitch in stitches}):
            first, last = (self.models[place].config for place in pair)
            sizes.add(common_size([first, last], self.asked_size))
            check_pair(first, last, next(iter(sizes)))
        if len(sizes) > 1:
            raise ValueError(f"got anchors for images of {sorted(sizes)} pixels; expected one size. Pass image_size")
        (self.size,) = sizes
        for stitch in stitches:
            stitch.check(*(self.anchors[place].num_blocks for place in (stitch.source, stitch.target)))
            check_grids([model.config for model in self.models], stitch.path, self.size)

    def settings(self) -> dict[str, Any]:
        sides = []
        for model in self.models:
            sides.append(copy.deepcopy(model.config))
            for name, value in vision_kind(model.config).training.items():
                setattr(sides[-1], name, value)
        last = self.models[-1].config
        return {
            "anchor_configs": sides,
            "image_size": list(self.size),
            "id2label": dict(last.id2label),
            "label2id": dict(last.label2id),
            "architectures": [StitchedSupernetForImageClassification.__name__],
        }

    def empty(self, config: StitchedSupernetConfig) -> StitchedSupernetForImageClassification:
        return StitchedSupernetForImageClassification(config)

    def widths(self, place: int) -> list[int]:
        return [shape.channels for shape in self.anchors[place].shapes()]

    def usable(self, calibration: Iterable[Any], stitches: Sequence[Stitch]) -> Iterable[Any]:
        joined = {place for stitch in stitches for place in (stitch.source, stitch.target)}
        return usable_images(calibration, *(self.models[place].config for place in joined))

    def batches(self, calibration: Iterable[Any]) -> Iterable[Any]:
        return image_batches(calibration)

    def states(self, place: int, batch: Any, stop: int) -> list[Any]:
        return self.anchors[place].features(batch.pixel_values, stop)

    def rows(
        self, pair: tuple[int, int], states: tuple[list[Any], list[Any]], batch: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        first, last = (self.anchors[place] for place in pair)
        dropped = dropped_prefix(first.kind, last.kind)
        source = [rows(one, first.kind, dropped) for one in states[0]]
        return source, [rows(one, last.kind).to(first.device) for one in states[1]]

    def set_layer(self, layer: Any, fit: LinearFit) -> None:
        set_vision_stitch(layer, fit)


def extract_classifier(
    supernet: StitchedSupernetForImageClassification, stitch: Stitch
) -> StitchedForImageClassification:
    """The stitched model of one of a supernet's stitches, with a copy of its weights."""
    given = supernet.config
    config = stitched_vision_config(given.anchor_configs, stitch.path, (given.image_size[0], given.image_size[1]))
    config.drop_path_rate = given.drop_path_rate
    note_origin(config, supernet, stitch)
    parts = {
        "slices.0": supernet.anchors[stitch.source],
        "slices.1": supernet.anchors[stitch.target],
        "joints.0": supernet.layer_of(stitch),
    }
    state = {
        f"{part}.{name}": tensor.detach().clone()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    model = load_parts(StitchedForImageClassification, config, state, dtype=supernet.dtype)
    return model.to(supernet.device).eval()
