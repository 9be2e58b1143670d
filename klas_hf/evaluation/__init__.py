"""Evaluation: loss and generations on text, accuracy on images, and rows of whatever is measured.

Work is shared out over the processes of an `accelerate launch`; every process gets the same result, and the main
process writes it.
"""

from klas_hf.evaluation.images import classification_metrics, predict_probabilities
from klas_hf.evaluation.language import generate_greedily, predict_sequences
from klas_hf.evaluation.measuring import evaluate, evaluate_divergence
from klas_hf.evaluation.models import Measurement, evaluate_anchor, evaluate_stitches
from klas_hf.evaluation.supernets import evaluate_supernet

__all__ = [
    "Measurement",
    "classification_metrics",
    "evaluate",
    "evaluate_anchor",
    "evaluate_divergence",
    "evaluate_stitches",
    "evaluate_supernet",
    "generate_greedily",
    "predict_probabilities",
    "predict_sequences",
]
