"""Stitched supernets: all chosen stitches between several anchors, trained together (SN-Net, CVPR 2023)."""

from klas_hf.supernet.configuration import StitchedSupernetConfig
from klas_hf.supernet.modeling import Path, StitchedSupernet

__all__ = ["Path", "StitchedSupernet", "StitchedSupernetConfig"]
