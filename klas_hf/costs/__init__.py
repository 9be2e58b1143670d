"""What models cost, counted, not estimated."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from klas_hf.anchors.dense import body_config, is_dense
from klas_hf.anchors.vision import is_vision
from klas_hf.budgets import Cost
from klas_hf.costs.dense import dense_anchor_costs, dense_costs
from klas_hf.costs.language import decoder_costs, decoder_part_costs, decoder_stitch_costs
from klas_hf.costs.measured import measure_times, measure_whole
from klas_hf.costs.paths import AnchorCosts, PathCosts
from klas_hf.costs.usage import Usage
from klas_hf.costs.vision import anchor_costs, classifier_costs, vision_stitch_costs
from klas_hf.models.configuration_stitched_vision import StitchedVisionConfig
from klas_hf.models.vision_features import image_size as size_of
from klas_hf.stitch_costs import StitchCosts

__all__ = ["Cost", "PathCosts", "Usage", "measure_costs", "measure_path_costs", "measure_stitch_costs"]

Size = int | tuple[int, int] | None


def measure_costs(
    model: PreTrainedModel | PreTrainedConfig,
    *,
    tokens: int = 128,
    image_size: Size = None,
    usage: Usage | None = None,
) -> Cost:
    """MACs, parameters and cache bytes of a causal language model, image classifier or dense model, stitched or not.

    Args:
        model: a model or only its configuration; no weight is allocated or run.
        tokens: length of the one sequence that is counted.
        image_size: side, or (height, width), of the one image that is counted, in pixels; None takes the
            configuration's.
        usage: how it will be run; given, the model is timed so (a configuration with random weights).

    Returns:
        MACs of one forward, parameters, and bytes of a cached token; with a usage also seconds, and bytes of weights
        and activations.

    Raises:
        ValueError: a family is unknown, or a usage's prompt is longer than the model reads.

    Example:
        >>> cost = measure_costs(target, tokens=16)
        >>> cost.parameters == target.num_parameters(), cost.kv_bytes_per_token  # 4 blocks, K and V of 12, fp32
        (True, 384)
        >>> measure_costs(large.config).image_height
        16
    """
    config, size = _config(model), (0, 0)
    _check_usage(config, usage)
    if is_dense(config):
        cost = dense_costs(config, _pair(image_size, config))
    elif isinstance(config, StitchedVisionConfig) or is_vision(config):
        size = _pair(image_size, config)
        cost = classifier_costs(config, size)
    else:
        cost = decoder_costs(config, _dtype(model), tokens)
    return cost if usage is None else measure_whole(model, cost, usage, size)


def measure_stitch_costs(
    source: PreTrainedModel | PreTrainedConfig,
    target: PreTrainedModel | PreTrainedConfig,
    *,
    tokens: int = 128,
    image_size: Size = None,
    positions: tuple[int, int] = (0, 1),
) -> StitchCosts:
    """Costs of every stitch between two anchors, from one counted forward of each.

    Args:
        source, target: models or configurations; no weight is allocated or run.
        tokens, image_size: as for `measure_costs`; None takes the target's image size.
        positions: of the two anchors in a list of more, for images.

    Returns:
        MACs and parameters of all stitches, `(m, n)` for anchors of m and n blocks.

    Raises:
        ValueError: a family is unknown, the target has class tokens that the source lacks, or one anchor is for text
            and one for images.

    Example:
        >>> costs = measure_stitch_costs(source, target, tokens=16)  # anchors of 3 and 4 blocks
        >>> model = StitchedModel.from_anchors(source, target, stitch=(2, 1), calibration=batches)
        >>> cost = measure_costs(model, tokens=16)
        >>> costs.macs.shape, costs.of(Stitch(2, 1)) == (cost.macs, cost.parameters)
        ((3, 4), True)
    """
    first, last = _config(source), _config(target)
    kinds = [_kind(config) for config in (first, last)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"got {kinds[0]} and {kinds[1]}; expected two anchors of one kind")
    if kinds[0] != _TEXT:
        size = _pair(image_size, last)
        bodies = [body_config(one) if is_dense(one) else one for one in (first, last)]
        return vision_stitch_costs((_parts(first, size), _parts(last, size)), bodies[0], bodies[1], size, positions)
    return decoder_stitch_costs(first, last, tokens)


def measure_path_costs(
    anchors: Sequence[PreTrainedModel | PreTrainedConfig],
    *,
    tokens: int = 128,
    image_size: Size = None,
    usage: Usage | None = None,
) -> PathCosts:
    """Costs of every path through some anchors, from one counted forward of each.

    Args:
        anchors: models or configurations; no weight is allocated or run.
        tokens, image_size: as for `measure_costs`; None takes the last anchor's image size.
        usage: how the models will be run; given, each anchor's parts are timed so, with random weights in the last
            anchor's dtype (once: see `klas_hf.costs.measured`).

    Returns:
        `PathCosts`, whose `of(path)` is the `Cost` of one path.

    Raises:
        ValueError: a family is unknown, anchors for text and for images, or a prompt that an anchor does not read.

    Example:
        >>> costs = measure_path_costs([source, target], tokens=16)
        >>> whole, pruned = costs.of("1[:]"), costs.of("1[:1] 1[3:]")  # two blocks out, a layer in
        >>> whole == measure_costs(target, tokens=16), pruned.macs < whole.macs
        (True, True)
    """
    configs = [_config(anchor) for anchor in anchors]
    for config in configs:
        _check_usage(config, usage)
    kinds = {_kind(config) for config in configs}
    if len(kinds) != 1:
        raise ValueError(
            f"got {len(configs)} anchors, {' and '.join(sorted(kinds))}; expected one or more, all of one kind"
        )
    if kinds != {_TEXT}:
        size = _pair(image_size, configs[-1])
        costs = PathCosts([_parts(config, size) for config in configs], 0, *size)
    else:
        size, dtype = (0, 0), _dtype(anchors[-1])
        costs = PathCosts([decoder_part_costs(config, dtype, tokens) for config in configs], tokens)
    if usage is None:
        return costs
    layers = [(part.widths, part.positions) for part in costs.anchors]
    return replace(costs, times=measure_times(configs, layers, _dtype(anchors[-1]), usage, size))


def _check_usage(config: PreTrainedConfig, usage: Usage | None) -> None:
    """Raise ValueError where seconds are asked for of a dense model, or of more tokens than a language model reads."""
    if usage is None:
        return
    if is_dense(config):
        raise ValueError(
            f"got usage={usage} for a {type(config).__name__}, a dense model, whose parts are not timed; leave it out: "
            "MACs and parameters are counted"
        )
    most = getattr(config, "max_position_embeddings", math.inf)  # images have none
    if usage.prompt >= most:
        raise ValueError(
            f"got a usage with prompt={usage.prompt:,} for a {type(config).__name__} that reads up to {most:,} tokens; "
            "expected fewer"
        )


def _config(model: PreTrainedModel | PreTrainedConfig) -> PreTrainedConfig:
    return model.config if isinstance(model, PreTrainedModel) else model


def _dtype(model: PreTrainedModel | PreTrainedConfig) -> torch.dtype:
    """The one that a model has, or a configuration names: by its name, once the model has been saved."""
    dtype = model.dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


_TEXT = "a language model"


def _kind(config: PreTrainedConfig) -> str:
    if is_dense(config):
        return "a dense model"
    return "an image classifier" if is_vision(config) else _TEXT


def _parts(config: PreTrainedConfig, size: tuple[int, int]) -> AnchorCosts:
    return dense_anchor_costs(config, size) if is_dense(config) else anchor_costs(config, size)


def _pair(size: Size, config: PreTrainedConfig) -> tuple[int, int]:
    if size is None:
        return size_of(config.backbone_config if is_dense(config) else config)
    return (size, size) if isinstance(size, int) else (size[0], size[1])
