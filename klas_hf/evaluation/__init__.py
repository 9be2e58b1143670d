"""Evaluation: loss and generations on text, accuracy on images, and rows of whatever is measured.

Work is shared out over the processes of an `accelerate launch`; every process gets the same result, and the main
process writes it.
"""

from klas_hf.evaluation.images import (
    evaluate_accuracy,
    evaluate_divergence,
    predict_probabilities,
)
from klas_hf.evaluation.language import evaluate_loss, evaluate_token_divergence, generate_greedily
from klas_hf.evaluation.models import Measurement, evaluate_anchor, evaluate_stitches
from klas_hf.evaluation.supernets import evaluate_supernet

__all__ = [
    "Measurement",
    "evaluate_accuracy",
    "evaluate_anchor",
    "evaluate_divergence",
    "evaluate_loss",
    "evaluate_stitches",
    "evaluate_supernet",
    "evaluate_token_divergence",
    "generate_greedily",
    "predict_probabilities",
]
