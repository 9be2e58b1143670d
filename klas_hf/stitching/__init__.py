"""Models from anchors' blocks: single paths and supernets, their stitching layers fitted by least squares.

Names load on first use: a single path needs no supernet.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from klas_hf.stitching.supernet import StitchedSupernet
    from klas_hf.stitching.supernet_images import StitchedSupernetForImageClassification
    from klas_hf.stitching.supernet_language import StitchedSupernetForCausalLM

_KINDS = ("supernet_language", "supernet_images")

__all__ = ["StitchedSupernet", "StitchedSupernetForCausalLM", "StitchedSupernetForImageClassification"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'klas_hf.stitching' has no attribute {name!r}")
    kinds = [import_module(f"klas_hf.stitching.{kind}") for kind in _KINDS]  # StitchedSupernet chooses among them
    return next(getattr(kind, name) for kind in kinds if hasattr(kind, name))
