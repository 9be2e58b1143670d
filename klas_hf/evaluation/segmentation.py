"""How good a dense model's semantic segmentation is: mean intersection over union, by torchmetrics."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from klas_hf.anchors.dense import dense_head
from klas_hf.anchors.images import VOID, image_batches
from klas_hf.anchors.weights import evaluating
from klas_hf.evaluation.models import Measurement
from klas_hf.processes import progress, shared_out, sum_over_processes
from klas_hf.training.dense import check_masks


@torch.no_grad()
def evaluate_segmentation(model: PreTrainedModel, batches: Iterable[object]) -> Measurement:
    """Mean IoU, pixel accuracy and loss of a dense model; see `evaluate`.

    Intersections and unions are summed over all images before they are divided; the mean is over the classes that
    occur in labels or predictions. Void pixels (255) count nowhere.

    Raises:
        ImportError: torchmetrics is missing.
        ValueError: nothing to measure on, no masks, or class numbers that the model does not have.
    """
    classes = model.config.num_labels
    metric = _jaccard(classes).to(model.device)
    sums = torch.zeros(3, dtype=torch.float64)  # right pixels, nats, pixels
    images = 0
    with evaluating(model):
        for batch in progress(image_batches(shared_out(batches)), "measuring"):
            pixels, masks = batch.labelled()
            check_masks(masks, classes)
            masks = masks.to(model.device)
            scores = segmentation_scores(model, pixels, (masks.shape[-2], masks.shape[-1]))
            metric.update(scores.argmax(1), masks)
            counted = masks != VOID
            loss = F.cross_entropy(scores, masks, ignore_index=VOID, reduction="sum")
            right = (scores.argmax(1) == masks)[counted].sum()
            sums += torch.stack([right.double(), loss.double(), counted.sum().double()]).cpu()
            images += len(masks)
    sums, confusion = sum_over_processes(sums), sum_over_processes(metric.confmat.double())
    if not sums[2]:
        raise ValueError("got no labelled pixels to measure on; expected batches of images with masks as labels")
    metric.confmat = confusion.to(metric.confmat)
    metric.sync_on_compute = False
    occurs = (confusion.sum(0) + confusion.sum(1) > 0).cpu()
    shares = metric.compute().cpu()
    each = {
        str(model.config.id2label[number]): float(shares[number]) if occurs[number] else None
        for number in range(classes)
    }
    total = int(sum_over_processes(torch.tensor(float(images))))
    metrics = {
        "mean_iou": float(shares[occurs].mean()), "pixel_accuracy": float(sums[0] / sums[2]),
        "loss": float(sums[1] / sums[2]),
    }  # fmt: skip
    return Measurement(metrics, {"images": total, "pixels": int(sums[2]), "iou": each})


@torch.no_grad()
def segmentation_scores(model: PreTrainedModel, pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Scores of the classes, `(batch, classes, height, width)`, whose softmax is a dense model's segmentation.

    Args:
        pixels: `(batch, channels, height, width)`, normalised.
        size: (height, width) of the answer, in pixels.
    """
    output = model(pixel_values=pixels.to(model.device, model.dtype))
    return dense_head(model.config).scores(output, size)


def _jaccard(classes: int) -> Any:
    try:
        from torchmetrics.classification import MulticlassJaccardIndex
    except ImportError as error:
        raise ImportError('mean IoU needs torchmetrics: pip install "klas_hf[vision]"') from error
    return MulticlassJaccardIndex(classes, average="none", ignore_index=VOID, validate_args=False)
