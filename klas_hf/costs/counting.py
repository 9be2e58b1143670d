"""Counting: MACs by torch's FlopCounterMode on the meta device, where nothing is allocated.

"FLOPs" in the stitching papers are multiply-accumulates; FlopCounterMode counts two operations for each, so its
counts are halved.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """What one model costs; MACs are the "FLOPs" of the stitching papers.

    Attributes:
        macs: multiply-accumulates of one forward: over `tokens` tokens, logits of every position included, or over
            one image.
        parameters: parameters stored, each counted once.
        kv_bytes_per_token: bytes that a cached token takes, in the model's dtype; 0 for images.
        tokens: length of the sequence that `macs` is for; 0 for images.
        image_height, image_width: pixels of the image that `macs` is for; 0 for sequences.

    Example:
        >>> cost = Cost(macs=2_500_000, parameters=30_000, kv_bytes_per_token=96, tokens=128)
        >>> cost.macs // cost.tokens, cost.image_height  # MACs per token
        (19531, 0)
    """

    macs: int
    parameters: int
    kv_bytes_per_token: int = 0
    tokens: int = 0
    image_height: int = 0
    image_width: int = 0


@torch.no_grad()
def macs_by_module(model: nn.Module, **inputs: Any) -> dict[nn.Module, int]:
    """MACs of each module's own operations in one forward, those of its children left out."""
    counter = FlopCounterMode(display=False, depth=None)
    with counter:
        model(**inputs)
    totals = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    root = type(model).__name__
    own = {}
    for name, module in model.named_modules():
        path = f"{root}.{name}" if name else root
        children = sum(totals.get(f"{path}.{child}", 0) for child, _ in module.named_children())
        own[module] = totals.get(path, 0) - children
    return own


def parameter_count(module: nn.Module) -> int:
    """Number of parameters, each counted once."""
    return sum(p.numel() for p in module.parameters())
