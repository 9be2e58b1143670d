"""Least squares between two classifiers: the rows of features, and a fit put into a stitching layer."""

import torch
from torch import Tensor

from klas_hf.maths.least_squares import LinearFit
from klas_hf.models.modeling_stitched_vision import StitchingLayer
from klas_hf.models.vision_features import Features, VisionKind


def rows(features: Features, kind: VisionKind, dropped: int = 0) -> Tensor:
    """One row per position and image, `(batch · positions, channels)`, as a stitching layer sees them."""
    if kind.layout == "map":
        return features.hidden.movedim(1, -1).flatten(0, 2)
    return features.hidden[:, dropped:].flatten(0, 1)


@torch.no_grad()
def set_vision_stitch(layer: StitchingLayer, fit: LinearFit) -> None:
    """Put a fit into a stitching layer."""
    weight = layer.projection.weight
    weight.copy_(fit.weight.reshape(weight.shape))
    if layer.projection.bias is not None:
        layer.projection.bias.copy_(fit.bias)
