"""Image classifiers' probabilities, and the logits of their supernets' paths.

The paths of a supernet share their work: on each batch every anchor runs once, and a stitch then costs only its
stitching layer and the target's blocks behind it.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from klas_hf.anchors.classes import check_classes
from klas_hf.anchors.images import ImageBatch, image_batches
from klas_hf.anchors.vision import VisionAnchor
from klas_hf.anchors.weights import evaluating
from klas_hf.models.vision_features import Features
from klas_hf.paths import Stitch
from klas_hf.processes import progress
from klas_hf.stitching.supernet import Path
from klas_hf.stitching.supernet_images import StitchedSupernetForImageClassification
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


def image_path_logits(
    supernet: StitchedSupernetForImageClassification,
    paths: Sequence[Path],
    batch: ImageBatch,
) -> Iterator[Tensor]:
    """Logits of each path; each anchor's front runs once for all paths that begin with it."""
    anchors = [VisionAnchor(model) for model in supernet.anchors]
    needed: dict[int, int] = {}
    for path in paths:
        place, stop = (path.source, path.source_stop) if isinstance(path, Stitch) else (path, anchors[path].num_blocks)
        needed[place] = max(stop, needed.get(place, 0))
    fronts = {place: anchors[place].features(batch.pixel_values, stop) for place, stop in needed.items()}
    for path in paths:
        if isinstance(path, Stitch):
            target = anchors[path.target]
            target.kind.check_size(batch.pixel_values, target.config)
            yield _rear(target, supernet.layer_of(path)(fronts[path.source][path.source_stop]), path)
        else:
            yield anchors[path].logits(fronts[path][-1])


def _rear(anchor: VisionAnchor, features: Features, stitch: Stitch) -> Tensor:
    for block in anchor.blocks[stitch.target_start :]:
        features = anchor.kind.run_block(anchor.model, block, features)
    return anchor.logits(features)


@contextmanager
def recalibrated(
    supernet: StitchedSupernetForImageClassification, path: Path, batches: Iterable[object]
) -> Iterator[None]:
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
