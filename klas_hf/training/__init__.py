"""Training through Accelerate: stitched models, supernets and tuned probes. The only place that drives an optimiser."""

from klas_hf.training.augmentation import Augmentation
from klas_hf.training.batch_norm import recalibrate_batch_norm
from klas_hf.training.config import TrainingConfig
from klas_hf.training.loop import TrainingResult, train_stitches

__all__ = [
    "Augmentation",
    "TrainingConfig",
    "TrainingResult",
    "recalibrate_batch_norm",
    "train_stitches",
]
