"""Loss, accuracy and divergence of any model, with counts and standard errors: one way for text and images.

A sequence, or an image, is the sampling unit: tokens of one sequence are not independent (`maths.estimates`).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import exp, isnan
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from klas_hf.anchors.batches import TokenBatch, token_batches
from klas_hf.anchors.classes import check_classes
from klas_hf.anchors.dense import is_dense
from klas_hf.anchors.images import ImageBatch, image_batches
from klas_hf.anchors.weights import check_whole_here, evaluating
from klas_hf.evaluation.models import Measurement
from klas_hf.evaluation.multilabel import evaluate_multilabel
from klas_hf.evaluation.segmentation import evaluate_segmentation
from klas_hf.maths.divergences import kl_divergence
from klas_hf.maths.estimates import RatioSums
from klas_hf.processes import progress, shared_out, sum_array_over_processes
from klas_hf.training.data import IGNORED
from klas_hf.training.multilabel import is_multilabel


@torch.no_grad()
def evaluate(model: PreTrainedModel, batches: Iterable[object], *, classes: Sequence[int] | None = None) -> Measurement:
    """Loss and perplexity of a language model, loss and accuracy of an image classifier, mean IoU of a dense model.

    Args:
        model: any of transformers' or ours; it is put back in the mode it was in.
        batches: of text, `input_ids`, perhaps `attention_mask`, and `labels`, each `(batch, tokens)`, -100 where no
            loss is taken; of images, `pixel_values` `(batch, channels, height, width)` and `labels` `(batch,)`, or, for
            dense models, masks `(batch, height, width)`, 255 where there is no class.
        classes: of images, measure among these classes only too (`accuracy_among`): the highest logit of these counts.

    Returns:
        Metrics `loss` (nats per label; of images, per image) and `perplexity` (its exponential) or `accuracy` (0 to 1)
        and perhaps `accuracy_among`; in the details the number of `labels` or `images` in all processes, and the
        `standard_errors` of the metrics, None where there is but one sequence or image. Of a dense model `mean_iou`,
        `pixel_accuracy` and `loss` (nats per pixel), and in the details the `iou` of every class, None of those that
        do not occur, without standard errors. Of a classifier whose `problem_type` is "multi_label_classification"
        `mean_average_precision` and `loss`, and in the details the `average_precision` of every class, likewise; labels
        are `(batch, classes)`, 1 at the classes of an image and 0 elsewhere.

    Raises:
        ValueError, TypeError: nothing to measure on, no labels, labels that the model does not have, or classes for
            text; or a model that several processes share out.

    Example:
        >>> measured = evaluate(target, batches)
        >>> bool(abs(measured.metrics["loss"] - np.log(64)) < 0.1)  # a random model of 64 words knows nothing
        True
        >>> measured = evaluate(large, images, classes=[0, 2])
        >>> sorted(measured.metrics), measured.details["images"]
        (['accuracy', 'accuracy_among', 'loss'], 20)
    """
    check_whole_here(model)
    check_classes(batches, model.config)
    if is_dense(model):
        if classes is not None:
            raise ValueError("got classes for a dense model; leave them out")
        return evaluate_segmentation(model, batches)
    if is_multilabel(model):
        if classes is not None:
            raise ValueError("got classes for a model of any number of labels per image; leave them out")
        return evaluate_multilabel(model, batches)
    task = task_of(model)
    sums = Sums(task, classes)
    with evaluating(model):
        for batch, labels in progress(task.labelled(shared_out(batches)), "measuring"):
            sums.add(task.logits(model, batch), labels)
    return sums.measured()


@torch.no_grad()
def evaluate_divergence(
    model: PreTrainedModel, target: PreTrainedModel, batches: Iterable[object], *, classes: Sequence[int] | None = None
) -> float:
    """Mean KL(target ‖ model) of two models' outputs, in nats per token or image.

    Args:
        batches: as for `evaluate`, with or without labels; padding and BOS of text are left out.
        classes: of images, compare the answers among these only.

    Raises:
        ValueError: nothing to compare on, or a model that several processes share out.
    """
    for one in (model, target):
        check_whole_here(one)
    task, sums, among = task_of(target), RatioSums(()), slice(None) if classes is None else list(classes)
    with evaluating(model), evaluating(target):
        for batch in progress(task.read(shared_out(batches)), "comparing outputs"):
            counted = task.counted(target, batch)
            logits = (task.logits(one, batch)[..., among].float() for one in (target, model))
            log_p, log_q = (one.log_softmax(-1).cpu()[counted] for one in logits)
            sums.update(kl_divergence(log_p, log_q).double().numpy(), torch.ones(len(log_p)).numpy())
    sums.set_moments(sum_array_over_processes(sums.moments()))
    if not sums.sequences:
        raise ValueError("got nothing to compare outputs on; expected batches of text or images")
    return float(sums.value)


class Task(ABC):
    """What differs between measuring text and measuring images.

    Attributes:
        unit: what a mean is taken over.
        metrics: the means.
    """

    unit: str
    metrics: tuple[str, ...]

    @abstractmethod
    def read(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Batches in one form."""

    @abstractmethod
    def labelled(self, batches: Iterable[Any]) -> Iterator[tuple[Any, Tensor]]:
        """The same with their labels."""

    @abstractmethod
    def logits(self, model: PreTrainedModel, batch: Any) -> Tensor:
        """What a model answers, `(batch, …, classes)`."""

    @abstractmethod
    def counted(self, model: PreTrainedModel, batch: Any) -> Tensor:
        """Which of the answers count in a mean, a mask of their shape without the classes."""

    @abstractmethod
    def terms(self, logits: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Each metric's sum over a sequence or image, `(batch,)`, and how many labels it is over, `(batch,)`."""


class TextTask(Task):
    """Next-token cross-entropy, in nats per label."""

    unit, metrics = "labels", ("loss",)

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary

    def read(self, batches: Iterable[Any]) -> Iterator[TokenBatch]:
        return token_batches(batches, vocabulary=self.vocabulary)

    def labelled(self, batches: Iterable[Any]) -> Iterator[tuple[TokenBatch, Tensor]]:
        for batch in batches:
            (tokens,) = self.read([batch])
            if not isinstance(batch, Mapping) or "labels" not in batch:
                raise ValueError(
                    "got a batch of text without 'labels'; expected token ids of shape (batch, tokens), -100 where no "
                    "loss is taken, as TextBatches gives them"
                )
            yield tokens, torch.as_tensor(batch["labels"])

    def logits(self, model: PreTrainedModel, batch: TokenBatch) -> Tensor:
        batch = batch.to(model.get_input_embeddings().weight.device)
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits

    def counted(self, model: PreTrainedModel, batch: TokenBatch) -> Tensor:
        return replace(batch, bos_token_id=model.config.bos_token_id).counted

    def terms(self, logits: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        predicted = labels[:, 1:]
        _check(predicted[predicted != IGNORED], logits)
        losses = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), predicted.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return {"loss": losses.view_as(predicted).cpu().double().sum(1)}, (predicted != IGNORED).sum(1)


class ImageTask(Task):
    """Top-1 accuracy, and cross-entropy in nats per image."""

    unit, metrics = "images", ("accuracy", "loss")

    def read(self, batches: Iterable[Any]) -> Iterator[ImageBatch]:
        return image_batches(batches)

    def labelled(self, batches: Iterable[Any]) -> Iterator[tuple[ImageBatch, Tensor]]:
        return ((batch, batch.labelled()[1]) for batch in image_batches(batches))

    def logits(self, model: PreTrainedModel, batch: ImageBatch) -> Tensor:
        return model(pixel_values=batch.pixel_values.to(model.device, model.dtype)).logits

    def counted(self, model: PreTrainedModel, batch: ImageBatch) -> Tensor:
        return torch.ones(len(batch), dtype=torch.bool)

    def terms(self, logits: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        _check(labels, logits)
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        return {"accuracy": logits.argmax(-1) == labels, "loss": losses}, torch.ones_like(labels)


def task_of(model: PreTrainedModel) -> Task:
    """By what the model reads."""
    if model.main_input_name == "pixel_values":
        return ImageTask()
    return TextTask(model.config.get_text_config().vocab_size)


class Sums:
    """Statistics of one model, from batch after batch of its logits.

    Raises:
        ValueError: classes for text.
    """

    def __init__(self, task: Task, classes: Sequence[int] | None = None):
        if classes is not None and "accuracy" not in task.metrics:
            raise ValueError("got classes for a language model; leave them out")
        self.task, self.classes = task, classes
        self.names = (() if classes is None else ("accuracy_among",)) + task.metrics  # what curves are of comes first
        self.ratios = RatioSums((len(self.names),))

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add one batch.

        Raises:
            TypeError, ValueError: labels that are no whole numbers, or none of the model's.
        """
        labels = labels.to(logits.device)
        terms, counts = self.task.terms(logits, labels)
        if self.classes is not None:
            chosen = torch.tensor(list(self.classes), device=logits.device)
            terms["accuracy_among"] = chosen[logits[:, chosen].argmax(-1)] == labels
        values = torch.stack([terms[name].cpu().double() for name in self.names], 1)
        self.ratios.update(values.numpy(), counts[:, None].cpu().numpy())

    def measured(self) -> Measurement:
        """What was added, by all processes.

        Raises:
            ValueError: there was nothing.
        """
        self.ratios.set_moments(sum_array_over_processes(self.ratios.moments()))
        count = int(self.ratios.denominator[0])
        if not count:
            raise ValueError(f"got no {self.task.unit} to measure on; expected batches with labels")
        metrics = dict(zip(self.names, self.ratios.value.tolist(), strict=True))
        errors = dict(zip(self.names, self.ratios.standard_error.tolist(), strict=True))
        if isinstance(self.task, TextTask):
            metrics["perplexity"] = exp(metrics["loss"])
            errors["perplexity"] = metrics["perplexity"] * errors["loss"]  # to first order
        known = {name: None if isnan(error) else error for name, error in errors.items()}
        return Measurement(metrics, {self.task.unit: count, "standard_errors": known})


def _check(labels: Tensor, logits: Tensor) -> None:
    if labels.is_floating_point():
        raise TypeError(f"got labels of {labels.dtype}; expected whole numbers: token ids, or numbers of classes")
    classes = logits.shape[-1]
    unknown = labels[(labels < 0) | (labels >= classes)]
    if len(unknown):
        raise ValueError(
            f"got the label {int(unknown[0])} for a model of {classes} classes; expected 0 to {classes - 1}"
        )
