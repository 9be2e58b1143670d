"""Training through Accelerate: stitched models and tuned probes. The only place that drives an optimiser."""

from klas_hf.training.config import TrainingConfig
from klas_hf.training.loop import TrainingDiverged, TrainingResult, train_stitches
from klas_hf.training.probes import train_probes

__all__ = ["TrainingConfig", "TrainingDiverged", "TrainingResult", "train_probes", "train_stitches"]
