"""Paths through image classifiers as models.

The models of all slices are made whole on the meta device, what is not used is taken out, and transformers fills what
is left from the checkpoints: the tensors of unused blocks are never read. The tensors keep the names that they have in
their anchors' checkpoints, so whatever transformers renames on loading it renames here too.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from klas_hf.anchors.checkpoints import ClassifierCheckpoint, UnreadTensor
from klas_hf.anchors.images import ImageBatch, image_batches
from klas_hf.anchors.language import HUB_OPTIONS, anchor_config, hub_options
from klas_hf.anchors.vision import check_labels
from klas_hf.anchors.vision_states import feature_rows
from klas_hf.anchors.weights import evaluating
from klas_hf.models import StitchedBackbone, StitchedForImageClassification, StitchedVisionConfig
from klas_hf.models.modeling_stitched_vision import StitchingLayer, dropped_prefix
from klas_hf.models.vision_features import Features, VisionKind, image_size
from klas_hf.models.vision_kinds import vision_kind
from klas_hf.models.vision_shapes import FeatureShape, trace, traced
from klas_hf.paths import Path as AnchorPath
from klas_hf.stitching.calibration import sampled
from klas_hf.stitching.joints import Joint, check_joint, check_writers, fit_joints, merge_joints
from klas_hf.stitching.loading import load_parts, warn_of_random_stitches


def stitch_classifiers(
    anchors: Sequence[str | Path | PreTrainedModel],
    path: AnchorPath,
    *,
    calibration: Iterable[Any] | None = None,
    calibration_items: int | None = None,
    ridge: float | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    revisions: Sequence[str | None] | None = None,
    image_size: int | tuple[int, int] | None = None,
    joint: Joint = "least_squares",
    **kwargs: Any,
) -> StitchedForImageClassification:
    """Make the model of a path through image classifiers; see `assemble_path`."""
    revisions = revisions or [None] * len(anchors)
    with ExitStack() as files:
        opened = {
            place: files.enter_context(ClassifierCheckpoint(anchors[place], **hub_options(kwargs, revisions[place])))
            for place in path.anchors
        }
        configs = [
            opened[place].config if place in opened else _config(anchor, hub_options(kwargs, revision))
            for place, (anchor, revision) in enumerate(zip(anchors, revisions, strict=True))
        ]
        first, last = opened[path.slices[0].anchor], opened[path.slices[-1].anchor]
        check_labels(first.config, last.config)
        config = stitched_vision_config(
            configs, path, common_size([configs[place] for place in path.anchors], image_size), joint
        )
        name_anchors(config, opened)
        check_joints(config, path, joint, calibration is not None)
        batches = None if calibration is None else calibration_images(calibration, config, calibration_items)
        dtype = last.dtype if dtype in (None, "auto") else dtype
        options = {name: value for name, value in kwargs.items() if name not in HUB_OPTIONS}
        state = slices_state(opened, config)
        model = load_parts(
            StitchedForImageClassification, config, state, dtype=dtype, device_map=device_map, **options
        ).eval()
        if batches is None and model.stitching_layers():
            warn_of_random_stitches()
        start_joints(model, opened, batches, ridge, joint, dtype)
    return model


def start_joints(
    model: Any, anchors: Mapping[int, ClassifierCheckpoint], calibration: Iterable[ImageBatch] | None,
    ridge: float | None, joint: Joint, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Fit the joints of a stitched vision model, or merge them, where there are any and data to do so on."""
    if calibration is None or not model.joints:
        return
    if joint == "merged":
        _merge(model, anchors, calibration, ridge, dtype=dtype)
    elif model.stitching_layers():
        _fit(model, anchors, calibration, ridge, joint, dtype=dtype)


def check_joints(config: StitchedVisionConfig, path: AnchorPath, joint: str, calibrated: bool) -> None:
    """Raise ValueError unless the joints of a path can be of this kind."""
    check_joint(joint, path, [(x, y) for x, y in config.joint_channels], calibrated)
    if joint == "merged":
        kinds = {place: (one.model_type, vision_kind(one).writer) for place, one in enumerate(config.anchor_configs)}
        check_writers(path, kinds, "a ViT, DeiT or Swin")


def calibration_images(
    calibration: Iterable[Any], config: StitchedVisionConfig, items: int | None
) -> Iterable[ImageBatch]:
    """The images that joints are fitted to, as many as `sampled` says; errors as `usable_images`."""
    path, used = AnchorPath.parse(config.path), [one for one in config.anchor_configs]
    joints = _joined(used, path, image_size(config))
    features = max((left.channels / (left.height * left.width) for left, _ in joints), default=0.0)
    chosen = sampled(calibration, image_batches, lambda _: features, items)
    return usable_images(chosen, *(used[place] for place in path.anchors))


def name_anchors(config: StitchedVisionConfig, opened: Mapping[int, ClassifierCheckpoint]) -> None:
    """Note in a model's configuration which anchors were read."""
    count = len(config.anchor_configs)
    config.anchor_names = [opened[place].name if place in opened else None for place in range(count)]
    config.anchor_revisions = [opened[place].revision if place in opened else None for place in range(count)]


def stitched_vision_config(
    configs: Sequence[PreTrainedConfig], path: AnchorPath, size: tuple[int, int], joint: Joint = "least_squares"
) -> StitchedVisionConfig:
    """The configuration of the model of a path through classifiers of these configurations.

    Raises:
        ValueError: path out of range, a joint between different grids, or to class tokens that nothing stands for.
    """
    check_grids(configs, path, size)
    anchors = [copy.deepcopy(config) for config in configs]
    for anchor in anchors:
        for name, value in vision_kind(anchor).training.items():
            setattr(anchor, name, value)
    last = configs[path.slices[-1].anchor]
    depths = [len(vision_kind(config).blocks(config)) for config in configs]
    return StitchedVisionConfig(
        anchor_configs=anchors,
        slices=[list(one) for one in path.bounds(depths)],
        anchor_blocks=depths,
        joint_channels=[[left.channels, right.channels] for left, right in _joined(configs, path, size)],
        image_size=list(size),
        identity_joints=joint in ("identity", "merged"),
        id2label=dict(last.id2label),
        label2id=dict(last.label2id),
        architectures=["StitchedForImageClassification"],
    )


def common_size(configs: Sequence[PreTrainedConfig], size: int | tuple[int, int] | None = None) -> tuple[int, int]:
    """(height, width) of the images that all anchors take: the one asked for, or that of the most particular anchor.

    Raises:
        ValueError: an anchor that takes images of one size only is for another.
    """
    fixed = [config for config in configs if vision_kind(config).fixed_size]
    if size is None:
        size = image_size((fixed or list(configs))[-1])
    size = (size, size) if isinstance(size, int) else (size[0], size[1])
    for config in fixed:
        if image_size(config) != size:
            raise ValueError(
                f"got images of {size} pixels for a {config.model_type} that takes {image_size(config)} only; expected "
                "anchors for one image size. Choose anchors of the same resolution"
            )
    return size


def check_pair(first: PreTrainedConfig, last: PreTrainedConfig, size: tuple[int, int]) -> None:
    """Raise ValueError unless the two classifiers know the same classes and the source is the cheaper one."""
    check_labels(first, last)
    check_order([sum(traced(config, size).macs) for config in (first, last)])


def check_order(macs: Sequence[int]) -> None:
    """Raise ValueError unless the source is the cheaper of two anchors for images of these MACs."""
    if macs[0] > macs[1]:
        raise ValueError(
            f"got a source of {macs[0]:,} MACs and a target of {macs[1]:,}: reversed; expected the cheaper anchor "
            "as the source. Swap source and target"
        )


def check_grids(configs: Sequence[PreTrainedConfig], path: AnchorPath, size: tuple[int, int]) -> None:
    """Raise ValueError unless the path is within its anchors and every joint between equal grids."""
    for one, other in pairwise(path.slices):
        dropped_prefix(vision_kind(configs[one.anchor]), vision_kind(configs[other.anchor]))
    for (left, right), (one, other) in zip(_joined(configs, path, size), pairwise(path.slices), strict=True):
        if left.grid == right.grid:
            continue
        shapes = [trace(configs[place], size) for place in (one.anchor, other.anchor)]
        matching = [j for j, shape in enumerate(shapes[1]) if shape.grid == left.grid]
        possible = f"expected a start in {matching}" if matching else "its anchor has no block on that grid"
        grids = " → ".join(f"{i}: {shape.height}×{shape.width}" for i, shape in enumerate(shapes[0]) if i)
        raise ValueError(
            f"got path {path}, whose joint {one} → {other} is from a grid of {left.height}×{left.width} to one of "
            f"{right.height}×{right.width}; joints are possible between equal grids only. For {other} after {one} "
            f"{possible}. The blocks of anchor {one.anchor} lie on {grids}"
        )


def usable_images(calibration: Iterable[Any], *configs: PreTrainedConfig) -> Iterable[ImageBatch]:
    """The batches, read up to the first image so that data that will not do fail before long work.

    Raises:
        ValueError: there is no image, or one that a model of these configurations does not take.
    """
    batches = (batch for batch in image_batches(calibration) if len(batch))
    for batch in batches:
        for config in configs:
            vision_kind(config).check_pixels(batch.pixel_values, config)
        return chain([batch], batches)
    raise ValueError("got no calibration images; expected some. Check that an iterator was not used up before")


def _fit(
    model: Any, anchors: Mapping[int, ClassifierCheckpoint],
    calibration: Iterable[ImageBatch], ridge: float | None, joint: Joint, **loading: Any,
) -> None:  # fmt: skip
    """Fit the joints, over all positions of all images; `loading` is `dtype` of the anchors' first blocks."""
    layers, kinds = model.stitching_layers(), _kinds(model.config)

    def pairs(number: int) -> Callable[[ImageBatch], tuple[Tensor, Tensor]]:
        wanted, dropped = _wanted(model, anchors, layers, loading, number), dropped_prefix(*kinds[number : number + 2])

        def rows_of(batch: ImageBatch) -> tuple[Tensor, Tensor]:
            state = _last_features(model, batch, number + 1)
            return feature_rows(state, kinds[number], dropped), wanted(batch, state)

        return rows_of

    fit_joints(model, pairs, calibration, ridge, joint)


def _merge(
    model: Any, anchors: Mapping[int, ClassifierCheckpoint],
    calibration: Iterable[ImageBatch], ridge: float | None, **loading: Any,
) -> None:  # fmt: skip
    """Merge the joints into the blocks before; `loading` as for `_fit`."""
    config, kinds = model.config, _kinds(model.config)
    writers: list[nn.Module] = []
    for number, (place, _, stop) in enumerate(config.slices[:-1]):
        block = kinds[number].blocks(anchors[place].config)[stop - 1].modules[-1]
        writers.append(model.slices[number].get_submodule(f"{block}.{kinds[number].writer}"))

    def parts(number: int) -> Callable[[ImageBatch], tuple[Tensor, Tensor, Tensor]]:
        wanted = _wanted(model, anchors, writers, loading, number)

        def rows_of(batch: ImageBatch) -> tuple[Tensor, Tensor, Tensor]:
            written: list[Tensor] = []
            handle = writers[number].register_forward_hook(lambda _, args, output: written.append(output))
            try:
                state = _last_features(model, batch, number + 1)
            finally:
                handle.remove()
            rows = [feature_rows(one, kinds[number]) for one in (state, state._replace(hidden=written[-1]))]
            return rows[0], rows[1], wanted(batch, state)

        return rows_of

    merge_joints(model, writers, parts, calibration, ridge)


def _kinds(config: StitchedVisionConfig) -> list[VisionKind]:
    """The kind of every slice."""
    return [vision_kind(config.slice_config(number)) for number in range(len(config.slices))]


def _wanted(
    model: Any, anchors: Mapping[int, ClassifierCheckpoint], layers: Sequence[nn.Module],
    loading: Mapping[str, Any], number: int,
) -> Callable[[ImageBatch, Features], Tensor]:  # fmt: skip
    """What makes of a batch, and the features entering a joint, the rows that the next slice has in its own anchor."""
    (before, _, stop), (place, start, _) = model.config.slices[number : number + 2]
    kind, device = _kinds(model.config)[number + 1], _device(layers[number])
    if not number and before == place and stop < start:  # the path has run the first of these blocks
        between = _blocks(anchors[place], stop, start, model.config, **loading).to(device)
        return lambda batch, state: feature_rows(_next_features(between, state), kind)
    prefix = _blocks(anchors[place], 0, start, model.config, **loading).to(device)
    return lambda batch, state: feature_rows(_last_features(prefix, batch, None), kind)


def _last_features(model: Any, batch: ImageBatch, count: int | None) -> Any:
    pixels = batch.pixel_values.to(model.dtype)
    if model.device.type != "meta":  # offloaded modules fetch their inputs
        pixels = pixels.to(model.device)
    with evaluating(model):
        return model.run_slices(pixels, count)[0][-1]


def _next_features(part: StitchedBackbone, state: Features) -> Features:
    """What the one slice of a model makes of the features before its first block."""
    (slice_,), kind = part.slices, vision_kind(part.slices[0].config)
    ((_, start, stop),) = part.config.slices
    with evaluating(part):
        for block in kind.blocks(slice_.config)[start:stop]:
            state = kind.run_block(slice_, block, state)
    return state


def _blocks(
    anchor: ClassifierCheckpoint, start: int, stop: int, config: StitchedVisionConfig, **loading: Any
) -> StitchedBackbone:
    """`anchor.blocks[start:stop]`, of which nothing else is read but what its embedding is, to be read only."""
    alone = StitchedVisionConfig(
        anchor_configs=[copy.deepcopy(anchor.config)], slices=[[0, start, stop]], image_size=config.image_size
    )
    return load_parts(StitchedBackbone, alone, slice_state(anchor, 0, copied=False), **loading)


def _device(layer: nn.Module) -> torch.device:
    """Where a stitching layer runs, also where accelerate has offloaded it."""
    weight = layer.weight
    return torch.device(layer._hf_hook.execution_device) if weight.is_meta else weight.device


def slices_state(anchors: Mapping[int, ClassifierCheckpoint], config: StitchedVisionConfig) -> dict[str, Any]:
    """Name in the stitched model → tensor; the stitching layers' are random."""
    state: dict[str, Any] = {}
    for number, (place, _, _) in enumerate(config.slices):
        state |= slice_state(anchors[place], number)
    kinds = [vision_kind(anchors[place].config) for place, _, _ in config.slices]
    joints = zip(pairwise(kinds), () if config.identity_joints else config.joint_channels, strict=False)
    for number, ((one, other), channels) in enumerate(joints):
        layer = StitchingLayer(one, other, channels[0], channels[1], config.joint_bias)
        state |= {f"joints.{number}.{name}": tensor for name, tensor in layer.state_dict().items()}
    return state


def slice_state(anchor: ClassifierCheckpoint, number: int, copied: bool = True) -> dict[str, Any]:
    """The unread tensors of an anchor, or copies, as those of a path's slice of this number are called."""
    # What is used is for transformers to say, which renames the tensors of some families.
    return {f"slices.{number}.{key}": UnreadTensor(anchor, key, copied) for key in sorted(anchor.keys)}


def _joined(
    configs: Sequence[PreTrainedConfig], path: AnchorPath, size: tuple[int, int]
) -> list[tuple[FeatureShape, FeatureShape]]:
    """The shapes before and behind every joint.

    Raises:
        ValueError: the path is out of range.
    """
    bounds = path.bounds([len(vision_kind(config).blocks(config)) for config in configs])
    shapes = {place: trace(configs[place], size) for place in path.anchors}
    return [(shapes[one][stop], shapes[other][start]) for (one, _, stop), (other, start, _) in pairwise(bounds)]


def _config(anchor: str | Path | PreTrainedModel, hub: dict[str, Any]) -> PreTrainedConfig:
    return anchor.config if isinstance(anchor, PreTrainedModel) else anchor_config(anchor, **hub)
