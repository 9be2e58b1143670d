"""Image classifiers' probabilities, and BatchNorm statistics of a supernet's paths."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from klas_hf.anchors.classes import check_classes
from klas_hf.anchors.images import image_batches
from klas_hf.anchors.weights import evaluating
from klas_hf.paths import Path
from klas_hf.processes import progress
from klas_hf.stitching import StitchedSupernet
from klas_hf.training.batch_norm import batch_norms, recalibrate_batch_norm


@torch.no_grad()
def predict_probabilities(
    model: PreTrainedModel, batches: Iterable[object], *, classes: Sequence[int] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Class probabilities `(images, classes)` and labels `(images,)`, for cascades; every process runs all images.

    Args:
        classes: of these labels only, renormalised; labels are then positions in it.

    Raises:
        ValueError: no images, or a label that is not among `classes`.
    """
    check_classes(batches, model.config)
    columns = slice(None) if classes is None else torch.tensor(list(classes))
    found, labels = [], []
    with evaluating(model):
        for batch in progress(image_batches(batches), "predicting"):
            pixels, of_batch = batch.labelled()
            logits = model(pixel_values=pixels.to(model.device, model.dtype)).logits.float().cpu()[:, columns]
            found.append(logits.softmax(-1).double())
            labels.append(of_batch)
    if not found:
        raise ValueError("got no images to predict; expected batches with labels")
    truth = torch.cat(labels)
    if classes is not None:
        truth = _positions(truth, classes)
    return torch.cat(found).numpy(), truth.numpy()


def classification_metrics(
    probabilities: NDArray[np.float64], labels: NDArray[np.int64], *, bins: int = 15
) -> dict[str, float]:
    """Top-1 and top-5 accuracy, cross-entropy and calibration error, as classifiers are reported.

    Args:
        probabilities: `(images, classes)`, as `predict_probabilities` gives them.
        labels: `(images,)`.
        bins: of equal width, for the calibration error: the mean distance of confidence and accuracy, weighted by the
            images in each (Guo et al., "On calibration of modern neural networks", 2017; 15 bins there).

    Returns:
        `top1`, `loss` in nats per image, `calibration_error`, and `top5` where there are more than five classes; all
        but the loss are shares.

    Raises:
        ImportError: torchmetrics is not installed.

    Example:
        >>> certain = np.eye(3)[[0, 1, 2, 2]]
        >>> found = classification_metrics(certain, np.array([0, 1, 2, 0]))
        >>> found["top1"], round(found["calibration_error"], 6)
        (0.75, 0.25)
    """
    try:
        from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error
    except ImportError as error:
        raise ImportError('image metrics need torchmetrics: pip install "klas_hf[vision]"') from error
    given, truth, classes = torch.from_numpy(probabilities), torch.from_numpy(labels), probabilities.shape[1]
    of_truth = probabilities[np.arange(len(labels)), labels]
    found = {
        "top1": multiclass_accuracy(given, truth, classes, average="micro"),
        "calibration_error": multiclass_calibration_error(given, truth, classes, n_bins=bins, norm="l1"),
    }
    if classes > 5:
        found["top5"] = multiclass_accuracy(given, truth, classes, average="micro", top_k=5)
    return {name: float(value) for name, value in found.items()} | {
        "loss": float(-np.log(np.maximum(of_truth, np.finfo(float).tiny)).mean())
    }


def _positions(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Where each label stands in `classes`."""
    is_it = labels[:, None] == torch.tensor(list(classes))
    missing = labels[~is_it.any(1)]
    if len(missing):
        raise ValueError(
            f"got label {int(missing[0])}, which is not among the {len(classes)} classes to predict; expected images "
            "of these only"
        )
    return is_it.int().argmax(1)


@contextmanager
def recalibrated(supernet: StitchedSupernet, path: Path, batches: Iterable[object]) -> Iterator[None]:
    """A path's own BatchNorm statistics, for a while."""
    layers = batch_norms(supernet)
    before = [{name: buffer.clone() for name, buffer in layer.named_buffers()} for layer in layers]
    recalibrate_batch_norm(
        supernet, ({"pixel_values": batch.pixel_values} for batch in image_batches(batches)), path=path
    )
    try:
        yield
    finally:
        for layer, buffers in zip(layers, before, strict=True):
            for name, buffer in layer.named_buffers():
                buffer.copy_(buffers[name])
