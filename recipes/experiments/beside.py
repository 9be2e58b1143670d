"""What every size is compared with beside rules and anchors: cascades of the anchors, and the dear one in few bits."""

import copy
from collections.abc import Callable, Sequence
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
    try:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup
    except ImportError:
        return {}
    head = model.get_output_embeddings()
    width = {name: module for name, module in model.named_modules() if _is_block_layer(module, head)}
    inside = sum(module.weight.numel() for module in width.values())
    every = sum(parameter.numel() for parameter in model.parameters())
    if 2 * inside < every:
        return {}
    found = {}
    for name, bits, config in (
        ("int8", 8, Int8WeightOnlyConfig()), ("int4", 4, IntxWeightOnlyConfig(torch.int4, PerGroup(GROUP)))
    ):  # fmt: skip
        small = copy.deepcopy(model)
        quantize_(small, config, filter_fn=lambda _, where: where in width)
        scales = sum(m.weight.shape[0] * (1 if bits == 8 else m.weight.shape[1] // GROUP) for m in width.values())
        size = 2 * (every - inside) + inside * bits / 8 + 2 * scales
        found[name] = {"bytes": size / (2 * every), "quality": measure(small)}
    return found


def _is_block_layer(module: nn.Module, head: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear) and module is not head and module.in_features % GROUP == 0
