"""Stitched models and their configuration, registered with the Auto classes of transformers.

The two modules are flat and import nothing else of this package, so that a checkpoint can carry them as its code.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from klas_hf.models.configuration_stitched import StitchedConfig
from klas_hf.models.modeling_stitched import StitchedForCausalLM, StitchedModel, StitchedTextModel

__all__ = ["StitchedConfig", "StitchedForCausalLM", "StitchedModel", "StitchedTextModel"]

AutoConfig.register("stitched", StitchedConfig)
AutoModel.register(StitchedConfig, StitchedTextModel)
AutoModelForCausalLM.register(StitchedConfig, StitchedForCausalLM)
