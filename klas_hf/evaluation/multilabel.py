"""How good a model of images with any number of labels is: mean average precision, by torchmetrics."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from klas_hf.anchors.weights import evaluating
from klas_hf.evaluation.models import Measurement
from klas_hf.processes import progress
from klas_hf.training.multilabel import check_present


@torch.no_grad()
def evaluate_multilabel(model: PreTrainedModel, batches: Iterable[Any]) -> Measurement:
    """Mean average precision and loss; see `evaluate`. Every process runs all images, as precision needs them sorted.

    Raises:
        ImportError: torchmetrics is missing.
        ValueError: nothing to measure on, labels that are not `(batch, classes)`, or no class that occurs.
    """
    found, labels = [], []
    with evaluating(model):
        for batch in progress(batches, "measuring"):
            pixels, present = (torch.as_tensor(batch[name]) for name in ("pixel_values", "labels"))
            check_present(present, model.config.num_labels)
            found.append(model(pixel_values=pixels.to(model.device, model.dtype)).logits.float().cpu())
            labels.append(present.long().cpu())
    if not found:
        raise ValueError("got no images to measure on; expected batches with labels")
    logits, truth = torch.cat(found), torch.cat(labels)
    each = average_precisions(logits, truth)
    names = [str(model.config.id2label[number]) for number in range(len(each))]
    known = {name: None if one.isnan() else float(one) for name, one in zip(names, each, strict=True)}
    loss = F.binary_cross_entropy_with_logits(logits.double(), truth.double())
    metrics = {"mean_average_precision": mean_average_precision(logits, truth), "loss": float(loss)}
    return Measurement(metrics, {"images": len(truth), "average_precision": known})


def average_precisions(logits: Tensor, labels: Tensor) -> Tensor:
    """Average precision of every class, `(classes,)`: the area under its steps; not a number where none occurs.

    Args:
        logits: `(images, classes)`.
        labels: the same shape, 1 at the classes of an image and 0 elsewhere.

    Raises:
        ImportError: torchmetrics is missing.
    """
    try:
        from torchmetrics.functional.classification import binary_average_precision
    except ImportError as error:
        raise ImportError('average precision needs torchmetrics: pip install "klas_hf[vision]"') from error
    each = torch.full((labels.shape[1],), torch.nan, dtype=torch.float64)
    for number in labels.any(0).nonzero().flatten().tolist():
        each[number] = binary_average_precision(logits[:, number].double().sigmoid(), labels[:, number])
    return each


def mean_average_precision(logits: Tensor, labels: Tensor) -> float:
    """Mean of the classes that occur (VOC 2010 and later; VOC 2007's own takes eleven points of recall).

    Raises:
        ValueError: no class occurs.
    """
    if not labels.any():
        raise ValueError("got images without a label; expected some class to occur")
    return float(average_precisions(logits, labels).nanmean())
