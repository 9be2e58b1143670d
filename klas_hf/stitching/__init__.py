"""Models from anchors' blocks: single paths and supernets, their stitching layers fitted by least squares."""

from klas_hf.stitching.supernet import StitchedSupernet
from klas_hf.stitching.supernet_images import StitchedSupernetForImageClassification
from klas_hf.stitching.supernet_language import StitchedSupernetForCausalLM

__all__ = ["StitchedSupernet", "StitchedSupernetForCausalLM", "StitchedSupernetForImageClassification"]
