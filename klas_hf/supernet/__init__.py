"""Stitched supernets: all chosen stitches between several anchors, trained together (SN-Net, CVPR 2023)."""

from klas_hf.supernet.configuration import StitchedSupernetConfig
from klas_hf.supernet.images import StitchedSupernetForImageClassification
from klas_hf.supernet.language import StitchedSupernetForCausalLM
from klas_hf.supernet.paths import Path, StitchedSupernet

__all__ = [
    "Path",
    "StitchedSupernet",
    "StitchedSupernetConfig",
    "StitchedSupernetForCausalLM",
    "StitchedSupernetForImageClassification",
]
