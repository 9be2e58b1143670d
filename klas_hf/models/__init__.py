"""Stitched models and their configurations, registered with the Auto classes of transformers.

The modules are flat and import nothing else of this package, so that a checkpoint can carry them as its code. What
needs the rest of it comes from its table of actions, handed over here.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageClassification

from klas_hf.actions import ACTIONS
from klas_hf.models.configuration_stitched import StitchedConfig
from klas_hf.models.configuration_stitched_dense import STITCHED_DENSE
from klas_hf.models.configuration_stitched_vision import StitchedVisionConfig
from klas_hf.models.modeling_base import StitchedModel
from klas_hf.models.modeling_stitched import StitchedForCausalLM, StitchedTextModel
from klas_hf.models.modeling_stitched_vision import StitchedBackbone, StitchedForImageClassification

__all__ = [
    "StitchedBackbone",
    "StitchedConfig",
    "StitchedForCausalLM",
    "StitchedForImageClassification",
    "StitchedModel",
    "StitchedTextModel",
    "StitchedVisionConfig",
]

StitchedModel.actions = ACTIONS

AutoConfig.register("stitched", StitchedConfig)
AutoModel.register(StitchedConfig, StitchedTextModel)
AutoModelForCausalLM.register(StitchedConfig, StitchedForCausalLM)
AutoModelForImageClassification.register(StitchedVisionConfig, StitchedForImageClassification)
for _dense in STITCHED_DENSE.values():  # which registers stitched backbones
    AutoConfig.register(_dense.model_type, _dense)
