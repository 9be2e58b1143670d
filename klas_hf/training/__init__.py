"""Training through Accelerate: stitched models, supernets and tuned probes. The only place that drives an optimiser."""

from klas_hf.training.batch_norm import recalibrate_batch_norm
from klas_hf.training.config import ImageTrainingConfig, TrainingConfig
from klas_hf.training.loop import TrainingDiverged, TrainingResult, train_stitches
from klas_hf.training.probes import train_probes

__all__ = [
    "ImageTrainingConfig",
    "TrainingConfig",
    "TrainingDiverged",
    "TrainingResult",
    "recalibrate_batch_norm",
    "train_probes",
    "train_stitches",
]
