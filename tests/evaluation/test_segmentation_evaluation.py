"""Mean IoU of dense models against counting by hand, and against transformers' own post-processing."""

import numpy as np
import pytest
import torch
from tiny_dense import CLASSES, NAMES, dense_images, outputs, tiny_dense
from transformers import Mask2FormerImageProcessorPil

from klas_hf import evaluate
from klas_hf.evaluation.segmentation import evaluate_segmentation, segmentation_scores


def counted(predicted: np.ndarray, masks: np.ndarray) -> list[float | None]:
    """IoU of every class, pixel by pixel; None where it does not occur."""
    found: list[float | None] = []
    for number in range(CLASSES):
        kept = masks != 255
        both = ((predicted == number) & (masks == number) & kept).sum()
        either = (((predicted == number) | (masks == number)) & kept).sum()
        found.append(both / either if either else None)
    return found


@pytest.mark.parametrize("head", ["upernet", "mask2former"])
def test_iou_is_as_counted_by_hand(head: str) -> None:
    model, data = tiny_dense(head), dense_images(3)
    for batch in data:
        batch["labels"].masked_fill_(batch["labels"] == 2, 255)  # a class that no label has
    measured = evaluate(model, data)
    predicted, masks = [], []
    for batch in data:
        scores = segmentation_scores(model, batch["pixel_values"], (64, 64))
        predicted.append(scores.argmax(1).numpy())
        masks.append(batch["labels"].numpy())
    by_hand = counted(np.concatenate(predicted), np.concatenate(masks))
    assert list(measured.details["iou"]) == NAMES
    for one, other in zip(measured.details["iou"].values(), by_hand, strict=True):
        assert one == (None if other is None else pytest.approx(other, abs=1e-6))
    assert measured.metrics["mean_iou"] == pytest.approx(np.mean([one for one in by_hand if one is not None]), abs=1e-6)
    kept = np.concatenate(masks) != 255
    right = (np.concatenate(predicted) == np.concatenate(masks))[kept].mean()
    assert measured.metrics["pixel_accuracy"] == pytest.approx(right, abs=1e-9)
    assert measured.details["images"] == 12
    assert measured.details["pixels"] == kept.sum()


def test_the_loss_is_the_cross_entropy_of_labelled_pixels() -> None:
    model, data = tiny_dense("upernet"), dense_images(2)
    log_p = [outputs(model, batch["pixel_values"])[0].log_softmax(1).movedim(1, -1) for batch in data]
    kept = [batch["labels"] != 255 for batch in data]
    picked = [
        one[mask].gather(1, batch["labels"][mask][:, None])[:, 0]
        for one, mask, batch in zip(log_p, kept, data, strict=True)
    ]
    assert evaluate(model, data).metrics["loss"] == pytest.approx(float(-torch.cat(picked).mean()), rel=1e-5)


def test_mask2former_answers_as_transformers_post_processing_does() -> None:
    model, (batch,) = tiny_dense("mask2former"), dense_images(1)
    with torch.no_grad():
        output = model(batch["pixel_values"])
    size = tuple(output.masks_queries_logits.shape[-2:])
    theirs = Mask2FormerImageProcessorPil().post_process_semantic_segmentation(output, target_sizes=[(64, 64)] * 4)
    ours = segmentation_scores(model, batch["pixel_values"], (64, 64)).argmax(1)
    # theirs are resized by way of 384×384 pixels, so that borders may lie a pixel elsewhere
    assert (torch.stack(theirs) == ours).float().mean() > 0.97
    shares = torch.einsum(
        "bqc,bqhw->bchw", output.class_queries_logits.softmax(-1)[..., :-1], output.masks_queries_logits.sigmoid()
    )
    found = segmentation_scores(model, batch["pixel_values"], size)
    torch.testing.assert_close(found.exp(), shares, rtol=1e-4, atol=1e-6)


def test_nothing_to_measure_on_is_refused() -> None:
    model = tiny_dense("upernet")
    with pytest.raises(ValueError, match="got no labelled pixels"):
        evaluate_segmentation(model, [])
    with pytest.raises(ValueError, match="without 'labels'"):
        evaluate(model, [torch.zeros(1, 3, 64, 64)])
    with pytest.raises(ValueError, match="got classes for a dense model"):
        evaluate(model, dense_images(1), classes=[0])
