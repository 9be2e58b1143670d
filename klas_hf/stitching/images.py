"""Stitching two image classifiers.

Both models are made whole on the meta device, what is not used is taken out, and transformers fills what is left from
the two checkpoints: the tensors of unused blocks are never read. The tensors keep the names that they have in their
anchors' checkpoints, so whatever transformers renames on loading it renames here too.
"""

import copy
import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from klas_hf.anchors.checkpoints import ClassifierCheckpoint, UnreadTensor
from klas_hf.anchors.images import ImageBatch, image_batches
from klas_hf.anchors.language import HUB_OPTIONS
from klas_hf.anchors.vision import VisionAnchor, check_labels, load_vision_anchor
from klas_hf.anchors.vision_stitches import rows, set_vision_stitch
from klas_hf.costs import measure_costs
from klas_hf.maths.least_squares import LeastSquares, LinearFit
from klas_hf.models import StitchedForImageClassification, StitchedVisionConfig
from klas_hf.models.modeling_stitched_vision import StitchingLayer, dropped_prefix
from klas_hf.models.vision_features import image_size
from klas_hf.models.vision_kinds import vision_kind
from klas_hf.models.vision_shapes import trace
from klas_hf.paths import Stitch
from klas_hf.processes import progress, shared_out, sum_over_processes
from klas_hf.stitching.loading import RANDOM_STITCH, load_parts, with_revision


def stitch_classifiers(
    source: str | Path | PreTrainedModel,
    target: str | Path | PreTrainedModel,
    stitch: Stitch,
    *,
    calibration: Iterable[Any] | None = None,
    ridge: float | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    source_revision: str | None = None,
    target_revision: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    **kwargs: Any,
) -> StitchedForImageClassification:
    """Join two image classifiers; see `stitch_anchors`."""
    hub = {option: kwargs[option] for option in HUB_OPTIONS if option in kwargs}
    with ExitStack() as files:
        first = files.enter_context(ClassifierCheckpoint(source, **with_revision(hub, source_revision)))
        last = files.enter_context(ClassifierCheckpoint(target, **with_revision(hub, target_revision)))
        size = common_size(first.config, last.config, image_size)
        check_pair(first.config, last.config, size)
        config = stitched_vision_config(first.config, last.config, stitch, size)
        config.source_name, config.source_revision = first.name, first.revision
        config.target_name, config.target_revision = last.name, last.revision
        batches = None if calibration is None else usable_images(calibration, first.config, last.config)
        loading = {"dtype": last.dtype if dtype in (None, "auto") else dtype, "device_map": device_map}
        options = {name: value for name, value in kwargs.items() if name not in HUB_OPTIONS}
        state = _state(first, last, config)
        model = load_parts(StitchedForImageClassification, config, state, **loading, **options)
    if batches is None:
        warnings.warn(RANDOM_STITCH, stacklevel=4)
    else:
        anchors = [
            load_vision_anchor(anchor, dtype=loading["dtype"], **with_revision(hub, revision))
            for anchor, revision in ((source, source_revision), (target, target_revision))
        ]
        device = next(model.parameters()).device
        fit = fit_vision_stitch(_on(anchors[0], device), _on(anchors[1], device), stitch, batches, size, ridge)
        set_vision_stitch(model.stitch, fit)
        model.config.stitch_fit = {"r2": fit.r2, "ridge": fit.ridge, "rows": fit.rows}
    return model.eval()


def stitched_vision_config(
    first: PreTrainedConfig, last: PreTrainedConfig, stitch: Stitch, size: tuple[int, int]
) -> StitchedVisionConfig:
    """The configuration of the stitched model of two classifiers' configurations.

    Raises:
        ValueError: stitch out of range, between different grids, or to class tokens that the source lacks.
    """
    check_grids(first, last, stitch, size)
    sides = [copy.deepcopy(first), copy.deepcopy(last)]
    for side in sides:
        for name, value in vision_kind(side).training.items():
            setattr(side, name, value)
    return StitchedVisionConfig(
        source_config=sides[0],
        target_config=sides[1],
        source_stop=stitch.source_stop,
        target_start=stitch.target_start,
        source_channels=trace(first, size)[stitch.source_stop].channels,
        target_channels=trace(last, size)[stitch.target_start].channels,
        image_size=list(size),
        id2label=dict(last.id2label),
        label2id=dict(last.label2id),
        architectures=["StitchedForImageClassification"],
    )


def common_size(
    first: PreTrainedConfig, last: PreTrainedConfig, size: int | tuple[int, int] | None = None
) -> tuple[int, int]:
    """(height, width) of the images that both anchors take: the one asked for, or that of the more particular anchor.

    Raises:
        ValueError: an anchor that takes images of one size only is for another.
    """
    if size is None:
        size = image_size(last if vision_kind(last).fixed_size else first if vision_kind(first).fixed_size else last)
    size = (size, size) if isinstance(size, int) else (size[0], size[1])
    for config in (first, last):
        if vision_kind(config).fixed_size and image_size(config) != size:
            raise ValueError(
                f"got images of {size} pixels for a {config.model_type} that takes {image_size(config)} only; expected "
                "anchors for one image size. Choose anchors of the same resolution"
            )
    return size


def check_pair(first: PreTrainedConfig, last: PreTrainedConfig, size: tuple[int, int]) -> None:
    """Raise ValueError unless the two classifiers know the same classes and the source is the cheaper one."""
    check_labels(first, last)
    macs = [measure_costs(config, image_size=size).macs for config in (first, last)]
    if macs[0] > macs[1]:
        raise ValueError(
            f"got a source of {macs[0]:,} MACs and a target of {macs[1]:,}: reversed; expected the cheaper anchor "
            "as the source. Swap source and target"
        )


def check_grids(first: PreTrainedConfig, last: PreTrainedConfig, stitch: Stitch, size: tuple[int, int]) -> None:
    """Raise ValueError unless the stitch is within both anchors and between equal grids."""
    dropped_prefix(vision_kind(first), vision_kind(last))
    shapes = trace(first, size), trace(last, size)
    stitch.check(len(shapes[0]) - 1, len(shapes[1]) - 1)
    source, target = shapes[0][stitch.source_stop], shapes[1][stitch.target_start]
    if source.grid != target.grid:
        matching = [j for j, shape in enumerate(shapes[1][:-1]) if shape.grid == source.grid]
        possible = f"expected j in {matching}" if matching else "the target has no block on the source's grid"
        grids = " → ".join(f"{i}: {shape.height}×{shape.width}" for i, shape in enumerate(shapes[0]) if i)
        raise ValueError(
            f"got stitch {stitch} from a grid of {source.height}×{source.width} to one of {target.height}×"
            f"{target.width}; stitches are possible between equal grids only. For i = {stitch.source_stop} {possible}. "
            f"The source's blocks lie on {grids}"
        )


def usable_images(calibration: Iterable[Any], *configs: PreTrainedConfig) -> Iterable[ImageBatch]:
    """The batches, read up to the first image so that data that will not do fail before long work.

    Raises:
        ValueError: there is no image, or one that a model of these configurations does not take.
    """
    batches = image_batches(calibration)
    for batch in batches:
        if len(batch):
            for config in configs:
                vision_kind(config).check_pixels(batch.pixel_values, config)
            return chain([batch], batches)
    raise ValueError("got no calibration images; expected some. Check that an iterator was not used up before")


@torch.no_grad()
def fit_vision_stitch(
    first: VisionAnchor,
    last: VisionAnchor,
    stitch: Stitch,
    batches: Iterable[Any],
    size: tuple[int, int],
    ridge: float | None = None,
) -> LinearFit:
    """Least-squares map from the output of source block i to that of target block j, over all positions of all images.

    Raises:
        ValueError: no image, or activations that are not finite.
    """
    widths = [
        trace(first.config, size)[stitch.source_stop].channels,
        trace(last.config, size)[stitch.target_start].channels,
    ]
    equations = LeastSquares(widths[0], widths[1], first.device)
    dropped = dropped_prefix(first.kind, last.kind)
    for batch in progress(shared_out(image_batches(batches)), "calibrating the stitching layer"):
        if not len(batch):
            continue
        x = first.features(batch.pixel_values, stitch.source_stop)[-1]
        y = last.features(batch.pixel_values, stitch.target_start)[-1]
        equations.update(rows(x, first.kind, dropped), rows(y, last.kind).to(first.device))
    equations.combine(sum_over_processes)
    return equations.solve(ridge)


def _state(first: ClassifierCheckpoint, last: ClassifierCheckpoint, config: StitchedVisionConfig) -> dict[str, Any]:
    layer = StitchingLayer(
        vision_kind(first.config), vision_kind(last.config), config.source_channels, config.target_channels,
        config.stitch_bias,
    )  # fmt: skip
    sides = {"source": first, "target": last}
    # What is used is for transformers to say, which renames the tensors of some families.
    state: dict[str, Any] = {
        f"{side}.{key}": UnreadTensor(anchor, key) for side, anchor in sides.items() for key in sorted(anchor.keys)
    }
    return state | {f"stitch.{name}": tensor for name, tensor in layer.state_dict().items()}


def _on(anchor: VisionAnchor, device: torch.device) -> VisionAnchor:
    """The anchor where the stitched model is; a model of the user's stays where it is."""
    return anchor if anchor.device == device else VisionAnchor(copy.deepcopy(anchor.model).to(device))
