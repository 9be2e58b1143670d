"""What every size is compared with beside rules and anchors: cascades of the anchors, and the dear one in few bits."""

import copy
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from klas_hf.curves.cascades import CascadeMember, CascadePoint, cascade_curve
from klas_hf.evaluation import predict_probabilities, predict_sequences
from klas_hf.rows import ResultRow

GROUP = 32  # weights that share a scale, at 4 bits
QUANTISED = ("int8", "int4")


def items_of(model: PreTrainedModel, batches: Sequence[Any], classes: Sequence[int] | None) -> dict[str, list[float]]:
    """Quality and confidence of a model on every image or sequence, and what it weighs, as JSON values."""
    if model.main_input_name == "pixel_values":
        probabilities, labels = predict_probabilities(model, batches, classes=classes)
        one = CascadeMember.of_probabilities(probabilities, labels, macs=0)
        quality, confidence, weights = one.quality, one.confidence, np.ones(len(labels))
    else:
        quality, confidence, weights = predict_sequences(model, batches)
    return {"quality": quality.tolist(), "confidence": confidence.tolist(), "weights": weights.tolist()}


def cascade(small: ResultRow, large: ResultRow) -> list[CascadePoint]:
    """The cascade of two anchors whose rows have `items`, at a hundred thresholds."""
    first, second = (
        CascadeMember(**{name: np.array(value) for name, value in row.details["items"].items()}, macs=row.macs)
        for row in (small, large)
    )
    thresholds = np.quantile(first.confidence, np.linspace(0, 1, 101))
    return cascade_curve(first, second, [*thresholds, np.inf])


def quantised(model: PreTrainedModel, measure: Callable[[PreTrainedModel], float]) -> dict[str, dict[str, float]]:
    """A model with its blocks' linear layers in 8 and in 4 bits: bytes, as a share of all weights' at 16, and quality.

    Empty where most of its weights lie elsewhere, as in convolutions, and without torchao.
    """
    if not can_quantise(model):
        return {}
    layers = _block_layers(model).values()
    inside, every = sum(module.weight.numel() for module in layers), sum(one.numel() for one in model.parameters())
    found = {}
    for name, bits in (("int8", 8), ("int4", 4)):
        scales = sum(m.weight.shape[0] * (1 if bits == 8 else m.weight.shape[1] // GROUP) for m in layers)
        size = 2 * (every - inside) + inside * bits / 8 + 2 * scales
        found[name] = {"bytes": size / (2 * every), "quality": measure(in_few_bits(model, name))}
    return found


def can_quantise(model: PreTrainedModel) -> bool:
    """Whether torchao is there, and most of the weights lie in linear layers of blocks."""
    inside = sum(module.weight.numel() for module in _block_layers(model).values())
    every = sum(parameter.numel() for parameter in model.parameters())
    return find_spec("torchao") is not None and 2 * inside >= every


def in_few_bits(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """A copy with its blocks' linear layers in "int8", a scale a row, or "int4", a scale for every 32 weights."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    config = Int8WeightOnlyConfig() if name == "int8" else IntxWeightOnlyConfig(torch.int4, PerGroup(GROUP))
    layers, small = _block_layers(model), copy.deepcopy(model)
    quantize_(small, config, filter_fn=lambda _, where: where in layers)
    return small


def _block_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    head = model.get_output_embeddings()
    return {name: module for name, module in model.named_modules() if _is_block_layer(module, head)}


def _is_block_layer(module: nn.Module, head: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear) and module is not head and module.in_features % GROUP == 0
