"""What training makes smaller: the loss of a kind of data, distilled or not; text and images differ here alone."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from klas_hf.anchors.weights import evaluating
from klas_hf.processes import process_state
from klas_hf.training.batch_norm import batch_norms
from klas_hf.training.config import TrainingConfig
from klas_hf.training.data import EpochOrder
from klas_hf.training.losses import hard_distillation_sum, soft_distillation_sum
from klas_hf.training.paths import path_sampler, takes
from klas_hf.training.teachers import ask

# The older name warns where there is the newer one.
_IS_NEW = hasattr(PreTrainedModel, "activation_checkpointing_enable")
_CHECKPOINTING = "activation_checkpointing" if _IS_NEW else "gradient_checkpointing"
# What a stitched model's configuration calls its anchors and the path through them.
_MADE_OF = ("path", "anchor_names", "paths")


class Objective(ABC):
    """A loss over data, as sums, so that any split into batches and processes adds up to the same.

    Args:
        model: the model that is trained, not wrapped.
        config: settings.
        teacher: for distillation; unused without a `distillation_weight`.

    Raises:
        ValueError: the teacher or the settings do not fit the model.

    Attributes:
        may_skip_parameters: whether a forward can leave trained parameters unused, as a supernet's does.
        kind: of the data.
        has_passed: whether the model has passed its teacher, from which nothing is distilled then.
    """

    may_skip_parameters: bool
    kind: str

    def __init__(self, model: PreTrainedModel, config: TrainingConfig, teacher: PreTrainedModel | None):
        if config.distillation_weight and teacher is None:
            raise ValueError("got distillation_weight > 0 and no teacher; expected teacher=the target anchor")
        if config.drop_path is not None and not takes(model, "drop_path"):
            raise ValueError(
                f"got drop_path={config.drop_path} for {type(model).__name__}, whose forward has no drop_path; "
                "expected drop_path=None, and the rate in the model's config"
            )
        self.model, self.config = model, config
        self.teacher = teacher if config.distillation_weight else None
        if self.teacher is not None:
            self._check_teacher(self.teacher)
        self.has_passed = False
        self.paths = path_sampler(model, config)
        self.size = sum(parameter.numel() for parameter in model.parameters())

    @abstractmethod
    def batches(self, multiple: int) -> tuple[DataLoader, EpochOrder]:
        """A loader whose number of batches is a multiple of `multiple`, and the order that it follows."""

    @abstractmethod
    def count(self, batch: dict[str, Tensor]) -> Tensor:
        """What the loss sum is divided by: the labels of a batch, as a scalar tensor on its device."""

    @abstractmethod
    def inputs(self, batch: dict[str, Tensor]) -> tuple[dict[str, Any], Tensor]:
        """What the forward takes, and the targets: numbers `(labels,)` of classes, or their probabilities."""

    @abstractmethod
    def labelled(self, output: Any, batch: dict[str, Tensor]) -> Tensor:
        """The logits that have a label, `(labels, classes)`, of those that the forward gives."""

    @abstractmethod
    def own_losses(self, output: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of each label, undistilled, `(labels,)`; `(1,)`, their sum, where the model gives no more.

        Args:
            output: of the forward.
            logits: those that have a label.
            targets: as `inputs` gives them.
        """

    def by_example(self, losses: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """What `own_losses` gives, summed over each example of a batch that has labels; here, each label is one."""
        return losses

    def chance(self) -> float:
        """The loss of who knows only how often each class is a label, in nats per label; infinite where unknown.

        Each label is foretold from all others, with one more of every class (Laplace's rule): of few labels among many
        classes little is known, and their entropy alone would be beyond any model.
        """
        counts = torch.zeros(())
        for batch in self.batches(1)[0]:
            targets = self.inputs(batch)[1]
            of_batch = targets.sum(0) if targets.ndim > 1 else targets.bincount(minlength=self.classes(self.model))
            counts = counts + of_batch.double()
        return laplace_loss(counts)

    @abstractmethod
    def classes(self, model: PreTrainedModel) -> int:
        """Classes that a model of this kind tells apart."""

    def loss_sum(self, model: nn.Module, batch: dict[str, Tensor], seed: tuple[int, ...]) -> Tensor:
        """The loss of a batch summed over its labels, in nats.

        Args:
            model: the prepared model, which may be wrapped for several processes.
            batch: what the loader gives, on the model's device.
            seed: of this forward: the step's, the number of the forward in the step, the process's number.
        """
        config = self.config
        inputs, targets = self.inputs(batch)
        output, logits = self._answers(model, batch, inputs, seed)
        loss = self.own_losses(output, logits, targets).sum()
        if self.teacher is None or self.has_passed:
            return loss
        with torch.no_grad():
            teacher_logits = self.labelled(ask(self.teacher, self._teachers(inputs)), batch).to(logits.dtype)
        if config.distillation == "hard":
            distance = hard_distillation_sum(logits, teacher_logits)
        else:
            distance = soft_distillation_sum(logits, teacher_logits, config.distillation_temperature)
        distance = distance * (self.count(batch) / max(len(logits), 1))  # pixels are more than labels are counted
        return (1 - config.distillation_weight) * loss + config.distillation_weight * distance

    def example_losses(self, model: nn.Module, batch: dict[str, Tensor], seed: tuple[int, ...]) -> Tensor:
        """The undistilled loss of each labelled example of a batch, summed over its labels, in nats, `(examples,)`."""
        inputs, targets = self.inputs(batch)
        output, logits = self._answers(model, batch, inputs, seed)
        return self.by_example(self.own_losses(output, logits, targets), batch)

    def _answers(
        self, model: nn.Module, batch: dict[str, Tensor], inputs: dict[str, Any], seed: tuple[int, ...]
    ) -> tuple[Any, Tensor]:
        """What the forward gives, and the logits that have a label."""
        device, fast = batch["labels"].device.type, self.config.mixed_precision == "bf16"
        # Not left to the Accelerator, whose precision is one for the life of the process.
        autocast = torch.autocast(device, torch.bfloat16, enabled=fast)
        # Of fillers alone statistics must not be taken; other processes wait for this one's forward all the same.
        with autocast, nullcontext() if batch["labels"].numel() else evaluating(model):
            precise = _cast(inputs, partial(torch.promote_types, self.model.dtype))
            output = ask(model, precise | self._options(seed))
            logits = self.labelled(output, batch)
            return output, logits.to(torch.promote_types(logits.dtype, torch.float32))

    @contextmanager
    def while_training(self, device: torch.device) -> Iterator[None]:
        """What holds from the first step to the last; the teacher is on `device` meanwhile."""
        with on_device(self.teacher, device), _checkpointing(self.model, self.config.gradient_checkpointing):
            if self.config.batch_norm == "frozen":
                for layer in batch_norms(self.model):
                    layer.eval()
            yield
            if self.config.batch_norm == "train" and process_state().num_processes > 1:
                # Each process took statistics of its own batches; the main one's are what checkpoints hold.
                for layer in batch_norms(self.model):
                    for buffer in layer.buffers():
                        buffer.copy_(broadcast(buffer))

    def description(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be resumed, beside the settings and the number of examples."""
        known = self.model.config.to_dict()
        known = known.get("backbone_config", known)
        made_of = {name: known[name] for name in _MADE_OF if name in known}
        paths = None if self.paths is None else [str(path) for path in self.model.paths]
        return made_of | {"model": self.model.config.model_type, "parameters": self.size, "paths": paths}

    def teacher_name(self) -> str | None:
        """The teacher's Hub id, or the name of its folder or class; None without a teacher."""
        if self.teacher is None:
            return None
        name = self.teacher.name_or_path
        return (Path(name).name if Path(name).is_dir() else name) or type(self.teacher).__name__

    def _options(self, seed: tuple[int, ...]) -> dict[str, Any]:
        options = {} if self.config.drop_path is None else {"drop_path": self.config.drop_path}
        return options if self.paths is None else options | {"path": self.model.paths[self.paths.draw(seed)]}

    def _teachers(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs without labels, with floats in the teacher's dtype."""
        assert self.teacher is not None
        dtype = self.teacher.dtype
        return _cast({name: one for name, one in inputs.items() if not name.endswith("labels")}, lambda _: dtype)

    def _check_teacher(self, teacher: PreTrainedModel) -> None:
        given, expected = self.classes(teacher), self.classes(self.model)
        if given != expected:
            raise ValueError(
                f"got a teacher of {given} classes for a model of {expected}; expected as many, in the same order"
            )
        trained = {id(parameter) for parameter in self.model.parameters()}
        if any(id(parameter) in trained for parameter in teacher.parameters()):
            raise ValueError(
                "got a teacher that shares parameters with the model; expected a copy: copy.deepcopy(teacher)"
            )


def laplace_loss(counts: Tensor) -> float:
    """Mean of −log((others of its class + 1) / (others + classes)) over labels, in nats; `counts` of the classes."""
    total = counts.sum()
    return float(torch.special.entr(counts / total).sum() + ((total - 1 + len(counts)) / total).log())


@contextmanager
def on_device(teacher: PreTrainedModel | None, device: torch.device) -> Iterator[None]:
    """The teacher on a device and in eval mode, and afterwards as it was."""
    if teacher is None:
        yield
        return
    home = teacher.device
    if home != device:
        teacher.to(device)
    try:
        with evaluating(teacher):
            yield
    finally:
        if home != device:
            teacher.to(home)


def _cast(inputs: Mapping[str, Any], to: Callable[[torch.dtype], torch.dtype]) -> dict[str, Any]:
    """Inputs with each float tensor in the dtype that `to` makes of its own."""
    return {
        name: value.to(to(value.dtype)) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


@contextmanager
def _checkpointing(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Activations are recomputed meanwhile, where that is wanted."""
    if not wanted:
        yield
        return
    getattr(model, f"{_CHECKPOINTING}_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(model, f"{_CHECKPOINTING}_disable")()
