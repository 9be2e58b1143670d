"""Paths through the backbones of dense models: a stock segmentation model of transformers on a `StitchedBackbone`.

The head is that of the last slice's anchor, or a new one. It takes maps of the widths that its own backbone gives;
those that lie in another anchor's slice come to it through a 1×1 convolution each, a stitching layer beside the path,
fitted by least squares to the map that the head knows.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from klas_hf.anchors.checkpoints import AnchorCheckpoint, ClassifierCheckpoint
from klas_hf.anchors.dense import (
    DenseCheckpoint,
    as_backbone,
    body_config,
    dense_head,
    is_dense,
    norms_state,
    strided_maps,
    wanted_maps,
)
from klas_hf.anchors.fitting import write_fit
from klas_hf.anchors.images import ImageBatch
from klas_hf.anchors.language import HUB_OPTIONS, anchor_config, hub_options
from klas_hf.anchors.vision import check_labels
from klas_hf.anchors.vision_states import map_rows
from klas_hf.anchors.weights import evaluating
from klas_hf.costs import measure_costs
from klas_hf.maths.least_squares import RIDGE, LeastSquares
from klas_hf.models import StitchedBackbone, StitchedVisionConfig
from klas_hf.models.configuration_stitched_dense import on_stitched
from klas_hf.models.vision_features import image_size as size_of
from klas_hf.models.vision_shapes import trace
from klas_hf.paths import Path as AnchorPath
from klas_hf.processes import progress, shared_out, sum_over_processes
from klas_hf.stitching.images import (
    calibration_images,
    check_joints,
    check_order,
    common_size,
    name_anchors,
    slice_state,
    slices_state,
    start_joints,
    stitched_vision_config,
)
from klas_hf.stitching.joints import Joint
from klas_hf.stitching.loading import load_parts, prefix_map, warn_of_random_stitches


def stitch_dense(
    anchors: Sequence[str | Path | PreTrainedModel],
    path: AnchorPath,
    *,
    head: PreTrainedConfig | None = None,
    calibration: Iterable[Any] | None = None,
    calibration_items: int | None = None,
    ridge: float | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    revisions: Sequence[str | None] | None = None,
    image_size: int | tuple[int, int] | None = None,
    joint: Joint = "least_squares",
    **kwargs: Any,
) -> PreTrainedModel:
    """Make the dense model of a path through dense anchors, or, with a new `head`, classifiers; see `assemble_path`."""
    revisions = revisions or [None] * len(anchors)
    opener = DenseCheckpoint if head is None else ClassifierCheckpoint
    with ExitStack() as files:
        opened: dict[int, Any] = {
            place: files.enter_context(opener(anchors[place], **hub_options(kwargs, revisions[place])))
            for place in path.anchors
        }
        if head is None:
            check_labels(*(one.whole for one in opened.values()))
        else:
            for one in opened.values():
                one.config = as_backbone(one.config)
        configs = [
            opened[place].config if place in opened else _body(anchor, hub_options(kwargs, revision))
            for place, (anchor, revision) in enumerate(zip(anchors, revisions, strict=True))
        ]
        size = common_size([configs[place] for place in path.anchors], image_size)
        config = stitched_vision_config(configs, path, size, joint)
        check_joints(config, path, joint, calibration is not None)
        last = opened[path.slices[-1].anchor]
        whole = copy.deepcopy(head or last.whole)
        maps = strided_maps(last.config, whole) if head is not None else wanted_maps(last.whole)
        ends = set_maps(config, maps, laterals=head is None)
        if head is None and all(one.kind.residual for one in opened.values()):
            # A dense model's forward takes no rate: it trains with the anchor's own.
            config.drop_path_rate = last.config.to_dict().get("drop_path_rate", 0.0)
        name_anchors(config, opened)
        batches = None if calibration is None else list(calibration_images(calibration, config, calibration_items))
        dtype = last.dtype if dtype in (None, "auto") else dtype
        state = slices_state(opened, config)
        if head is None:
            for name, (place, at) in ends.items():
                state |= norms_state(opened[place], {name: at})
        state |= _fresh(config, state)
        backbone = load_parts(StitchedBackbone, config, state, dtype=dtype, device_map=prefix_map(device_map)).eval()
        if batches is None and (backbone.stitching_layers() or backbone.lateral_joints):
            warn_of_random_stitches()
        start_joints(backbone, opened, batches, ridge, joint, dtype)
        if backbone.lateral_joints and batches is not None:
            _fit_laterals(backbone, last, maps, batches, ridge, dtype)
        options = {name: value for name, value in kwargs.items() if name not in HUB_OPTIONS}
        return _with_head(whole, backbone, None if head is not None else last, dtype, device_map, **options)


def check_dense_pair(first: PreTrainedConfig, last: PreTrainedConfig, size: int | tuple[int, int] | None) -> None:
    """Raise ValueError unless two dense models know the same classes and the source is the cheaper one."""
    check_labels(first, last)
    size = common_size([body_config(first), body_config(last)], size)
    check_order([measure_costs(config, image_size=size).macs for config in (first, last)])


def set_maps(config: StitchedVisionConfig, maps: Sequence[int], *, laterals: bool) -> dict[str, tuple[int, int]]:
    """Make a stitched backbone give the maps that a head wants, and say which state of which anchor each is.

    Args:
        config: of the stitched backbone.
        maps: states of the last slice's anchor that the head takes.
        laterals: whether they must be of the widths that they have there.

    Returns:
        Stage of the path → (anchor, state).

    Raises:
        ValueError: the path has no stage on the grid of one of them.
    """
    size, head = size_of(config), config.slices[-1][0]
    shapes = {place: trace(config.anchor_configs[place], size) for place, _, _ in config.slices}
    states = [(config.slices[0][0], 0)]
    states += [(config.slices[number][0], block + 1) for number, block in config.stage_ends()]
    by_grid = {shapes[place][at].grid: name for name, (place, at) in zip(config.stage_names, states, strict=True)}
    found: dict[str, tuple[int, int]] = {}
    widths: dict[str, list[int]] = {}
    for wanted in maps:
        shape = shapes[head][wanted]
        if shape.grid not in by_grid:
            raise ValueError(
                f"got the path {config.path}, none of whose stages gives a map of stride {size[0] / shape.height:.0f} "
                f"({shape.height}×{shape.width} of {size[0]}×{size[1]} pixels), which the head needs; expected a path "
                "through every stage whose map the head takes"
            )
        name = by_grid[shape.grid]
        place, at = found[name] = dict(zip(config.stage_names, states, strict=True))[name]
        if laterals and place != head:
            widths[name] = [shapes[place][at].channels, shape.channels]
    config.set_output_features_output_indices(out_features=list(found), out_indices=None)
    config.lateral_channels = widths or None
    return found


def _body(anchor: str | Path | PreTrainedModel, hub: dict[str, Any]) -> PreTrainedConfig:
    """What the backbone's classifier of an anchor that the path does not use is like."""
    config = anchor.config if isinstance(anchor, PreTrainedModel) else anchor_config(anchor, **hub)
    return body_config(config) if is_dense(config) else as_backbone(config)


def _fresh(config: StitchedVisionConfig, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """New tensors of a stitched backbone's norms and lateral layers, of those that come from no anchor."""
    new = StitchedBackbone(copy.deepcopy(config))
    kept = {name: tensor for name, tensor in new.state_dict().items() if name.startswith(("norms.", "lateral_joints."))}
    return {name: tensor for name, tensor in kept.items() if name not in state}


@torch.no_grad()
def _fit_laterals(
    backbone: StitchedBackbone, anchor: AnchorCheckpoint, maps: Sequence[int], calibration: Sequence[ImageBatch],
    ridge: float | None, dtype: Any,
) -> None:  # fmt: skip
    """Least squares from what enters each lateral layer to the map that the head's anchor has there."""
    wanted = whole_backbone(anchor, maps, backbone.config.image_size, dtype).to(backbone.device)
    layers = {name: one for name, one in backbone.lateral_joints.items()}
    equations = {name: LeastSquares(one.in_channels, one.out_channels, backbone.device) for name, one in layers.items()}
    entering: dict[str, Tensor] = {}
    handles = [one.register_forward_pre_hook(partial(_keep, entering, name)) for name, one in layers.items()]
    try:
        with evaluating(backbone), evaluating(wanted):
            for batch in progress(shared_out(calibration), "calibrating the maps of the head"):
                pixels = batch.pixel_values.to(backbone.device, backbone.dtype)
                backbone(pixels)
                theirs = dict(zip(backbone.out_features, wanted(pixels).feature_maps, strict=True))
                for name, sums in equations.items():
                    sums.update(map_rows(entering[name]), map_rows(theirs[name]))
    finally:
        for handle in handles:
            handle.remove()
    for name, sums in equations.items():
        sums.combine(sum_over_processes)
        # Channels of a normed map depend on each other: the equations are singular however many rows there are.
        write_fit(layers[name], sums.solve(RIDGE if ridge is None else ridge))


def whole_backbone(anchor: AnchorCheckpoint, maps: Sequence[int], size: Sequence[int], dtype: Any) -> StitchedBackbone:
    """A dense anchor's own backbone, which gives the maps of some states."""
    config = StitchedVisionConfig(anchor_configs=[copy.deepcopy(anchor.config)], image_size=list(size))
    ends = set_maps(config, maps, laterals=False)
    state = slice_state(anchor, 0) | norms_state(anchor, {name: at for name, (_, at) in ends.items()})  # type: ignore[arg-type]
    return load_parts(StitchedBackbone, config, state, dtype=dtype).eval()


def _keep(entering: dict[str, Tensor], name: str, module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
    entering[name] = args[0]


def _with_head(
    config: PreTrainedConfig, backbone: StitchedBackbone, anchor: DenseCheckpoint | None, dtype: Any, device_map: Any,
    **options: Any,
) -> PreTrainedModel:  # fmt: skip
    """The dense model of a backbone, with an anchor's head or a new one."""
    kind = dense_head(config)
    config = on_stitched(config, backbone.config)
    state: dict[str, Any] = {f"{kind.backbone}.{name}": tensor for name, tensor in backbone.state_dict().items()}
    if anchor is None:
        state = kind.kind(copy.deepcopy(config)).state_dict() | state
    else:
        state |= {key: anchor.tensor(key) for key in sorted(anchor.head_keys)}
    return load_parts(kind.kind, config, state, dtype=dtype, device_map=device_map, **options).eval()
