"""What a compressed KAN head is measured against: rounding of the dense coefficients, and magnitude pruning.

Both give an ordinary dense model, and say how many bytes a file of it would take.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from klas_hf.models.kan_layers import KANLayer
from klas_hf.models.modeling_kan import KANForImageClassification


@dataclass(frozen=True)
class RivalHead:
    """A model with another form of head.

    Attributes:
        model: dense, with the values that the form can hold.
        head_bytes: that the form takes.
    """

    model: KANForImageClassification
    head_bytes: int


@torch.no_grad()
def rounded_kan(model: KANForImageClassification, bits: int = 4) -> RivalHead:
    """Round every coefficient to the nearest of 2^bits − 1 values, with a float32 scale per output.

    Args:
        model: dense; it stays as it is.
        bits: per coefficient, 2 to 8.

    Raises:
        ValueError: another number of bits.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"got bits={bits}; expected 2 to 8")
    made, levels, total = copy.deepcopy(model), 2 ** (bits - 1) - 1, 0
    for layer in made.head.layers:
        for weights in layer.parameters():
            flat = weights.flatten(1)
            scale = (flat.abs().amax(1, keepdim=True) / levels).clamp_min(torch.finfo(torch.float32).tiny)
            weights.copy_(((flat / scale).round() * scale).view_as(weights))
            total += -(-weights.numel() * bits // 8) + 4 * len(weights)
    return RivalHead(made, total)


@torch.no_grad()
def pruned_kan(model: KANForImageClassification, share: float) -> RivalHead:
    """Take out the share of the edges whose coefficients have the least norm; kept edges cost a bit of a mask more.

    Args:
        model: dense; it stays as it is.
        share: of all edges of the head, from 0 to below 1.

    Raises:
        ValueError: another share.
    """
    if not 0 <= share < 1:
        raise ValueError(f"got share={share}; expected 0 to below 1")
    made = copy.deepcopy(model)
    layers = list(made.head.layers)
    norms = [_norms(layer) for layer in layers]
    edges = torch.cat([norm.flatten() for norm in norms])
    dropped = round(share * len(edges))
    limit = edges.sort().values[dropped]
    for layer, norm in zip(layers, norms, strict=True):
        for weights in layer.parameters():
            weights[norm < limit] = 0
    per_edge = sum(weights[0, 0].numel() for weights in layers[0].parameters())
    kept = sum(int((norm >= limit).sum()) for norm in norms)
    return RivalHead(made, 4 * per_edge * kept + -(-len(edges) // 8))


def _norms(layer: KANLayer) -> Tensor:
    """Of each edge's weights, `(outputs, inputs)`."""
    return torch.cat([weights.view(*weights.shape[:2], -1) for weights in layer.parameters()], -1).norm(dim=-1)
