"""KAN heads for image classifiers, compressed to a phone's size (SHARe-KAN, arXiv 2512.15742).

    splines ─► layers ─► modeling ─► compression ─► compressed: evaluated as stored ─► export

What a checkpoint carries lies with that of the stitched models, in klas_hf.models; here is what makes them smaller.

Importing it registers `KANConfig` and the models with the Auto classes of transformers.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from klas_hf.kan.compression import compress_kan
from klas_hf.models.configuration_kan import KANConfig
from klas_hf.models.modeling_kan import KANForImageClassification, KANForManyTasks, head_bytes

__all__ = ["KANConfig", "KANForImageClassification", "KANForManyTasks", "compress_kan", "head_bytes"]

AutoConfig.register("kan", KANConfig)
AutoModel.register(KANConfig, KANForManyTasks)
AutoModelForImageClassification.register(KANConfig, KANForImageClassification)
