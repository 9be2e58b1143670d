"""Training through Accelerate: stitched models, supernets and tuned probes. The only place that drives an optimiser.

Names load on first use: the settings alone need neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from klas_hf.training.batch_norm import recalibrate_batch_norm
    from klas_hf.training.config import Augmentation, TrainingConfig
    from klas_hf.training.contest import Contest, heal_best
    from klas_hf.training.healing import HealingResult, heal, healing_config
    from klas_hf.training.loop import TrainingResult, train_stitches
    from klas_hf.training.teachers import remember_answers

_MODULE_OF = {
    "Augmentation": "config",
    "Contest": "contest",
    "HealingResult": "healing",
    "TrainingConfig": "config",
    "TrainingResult": "loop",
    "heal": "healing",
    "heal_best": "contest",
    "healing_config": "healing",
    "recalibrate_batch_norm": "batch_norm",
    "remember_answers": "teachers",
    "train_stitches": "loop",
}

__all__ = [
    "Augmentation",
    "Contest",
    "HealingResult",
    "TrainingConfig",
    "TrainingResult",
    "heal",
    "heal_best",
    "healing_config",
    "recalibrate_batch_norm",
    "remember_answers",
    "train_stitches",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'klas_hf.training' has no attribute {name!r}")
    return getattr(import_module(f"klas_hf.training.{_MODULE_OF[name]}"), name)
