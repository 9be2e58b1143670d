"""Cases of which only some run by default: those that differ most; all run with `-m slow`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

# One of each way to be built: class token, windows, BatchNorm attention, convolutions with and without BatchNorm.
KINDS = ("vit", "swin", "levit", "resnet", "convnext")
FAMILIES = ("llama", "qwen3", "gemma2", "phi", "mixtral")


def quick(cases: Iterable[Any], often: Collection[Any]) -> list[Any]:
    """All cases; those that are not among `often` are marked slow. A case that is a tuple has several parameters."""
    listed = list(cases)
    assert set(often) & set(listed), f"none of {often} is one of {listed}"
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if case in often else pytest.mark.slow)
        for case in listed
    ]
