"""KAN heads for image classifiers, compressed to a phone's size (SHARe-KAN, arXiv 2512.15742).

    splines ─► layers ─► modeling ─► compression ─► compressed: evaluated as stored ─► export

Importing it registers `KANConfig` and the models with the Auto classes of transformers.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from klas_hf.kan.configuration_kan import KANConfig
from klas_hf.kan.modeling_kan import KANForImageClassification, KANForManyTasks, compress_kan, head_bytes

__all__ = ["KANConfig", "KANForImageClassification", "KANForManyTasks", "compress_kan", "head_bytes"]

AutoConfig.register("kan", KANConfig)
AutoModel.register(KANConfig, KANForManyTasks)
AutoModelForImageClassification.register(KANConfig, KANForImageClassification)
