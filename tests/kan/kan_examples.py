"""Small classifiers with KAN heads, and what their tensors stand for by numpy and scipy alone."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import BSpline
from tiny_vision import tiny_pair
from transformers import AutoBackbone, PreTrainedModel, ResNetConfig

from klas_hf import KANForImageClassification, StitchedModel
from klas_hf.models.kan_splines import Grid

BASES = ("none", "silu")


def tiny_kan(seed: int = 0, stitched: bool = False, **settings: Any) -> KANForImageClassification:
    """Images of 32 pixels to 5 classes; a ResNet of transformers with 16 channels, or two stitched ViTs, 24 wide."""
    torch.manual_seed(seed)
    backbone: PreTrainedModel
    if stitched:
        backbone = StitchedModel.from_anchors(*(one.float() for one in tiny_pair("vit")), stitch=(1, 2))
    else:
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
        backbone = AutoBackbone.from_config(ResNetConfig(**sizes)).eval()
    return KANForImageClassification.from_backbone(
        backbone, **{"num_labels": 5, "hidden_widths": [12], "initializer_range": 0.2} | settings
    )


def knots(grid: Grid) -> NDArray[np.float64]:
    return grid.low + grid.step * np.arange(-grid.order, grid.intervals + grid.order + 1)


def splines(inputs: NDArray, coefficients: NDArray, grid: Grid) -> NDArray:
    """scipy's B-splines with coefficients `(coefficients, …)`, constant outside the grid."""
    places = knots(grid)
    low, high = places[grid.order], places[grid.order + grid.intervals]
    inside = np.clip(inputs.astype(float), low, np.nextafter(high, low))
    return BSpline(places, coefficients.astype(float), grid.order, extrapolate=False)(inside)


def naive_layer(inputs: NDArray, coefficients: NDArray, base: NDArray | None, grid: Grid) -> NDArray:
    """One edge at a time."""
    outputs, width, _ = coefficients.shape
    out = np.zeros((len(inputs), outputs))
    for o in range(outputs):
        for i in range(width):
            out[:, o] += splines(inputs[:, i], coefficients[o, i], grid)
            if base is not None:
                out[:, o] += base[o, i] * inputs[:, i] / (1 + np.exp(-inputs[:, i]))
    return out


def naive_head(features: NDArray, layers: list[tuple[NDArray, NDArray | None]], grid: Grid) -> NDArray:
    """Layers of (coefficients, base), each after rows of mean 0 and variance 1."""
    for coefficients, base in layers:
        features = features - features.mean(1, keepdims=True)
        features = features / np.sqrt((features**2).mean(1, keepdims=True) + 1e-5)
        features = naive_layer(features, coefficients, base, grid)
    return features


def stored(state: dict[str, torch.Tensor], name: str) -> NDArray:
    """A matrix of a checkpoint's tensors, in floats."""
    values = state[f"{name}.values"].numpy().astype(np.float64)
    return values * state[f"{name}.scale"].numpy() if f"{name}.scale" in state else values


def stored_coefficients(state: dict[str, torch.Tensor], layer: str, inputs: int, bits: int) -> NDArray:
    """The splines that a compressed layer's tensors stand for."""
    ones = np.unpackbits(state[f"{layer}.indices"].numpy(), axis=1, bitorder="little")[:, : inputs * bits]
    indices = (ones.reshape(len(ones), inputs, bits).astype(int) * 2 ** np.arange(bits)).sum(-1)
    biases = stored(state, f"{layer}.biases")
    biases = biases if biases.shape[1] == inputs else np.repeat(biases / inputs, inputs, 1)
    return stored(state, f"{layer}.gains")[..., None] * stored(state, "codebook")[indices] + biases[..., None]
