"""Counting: MACs by torch's FlopCounterMode on the meta device, where nothing is allocated.

"FLOPs" in the stitching papers are multiply-accumulates; FlopCounterMode counts two operations for each, so its
counts are halved.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


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
