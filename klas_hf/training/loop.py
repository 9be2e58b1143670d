"""Fine-tuning of stitched models and supernets through Accelerate (KLAS Sec. 5.5 and App. H; SN-Net).

One loop for one process and many: what to run on is accelerate's business (its flags, its config file). The loss of
an optimiser step is a mean over all its labels, on whatever process and in whatever forward they are; what that loss
is, an `Objective` says.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import is_bf16_available
from torch import Tensor, nn
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from klas_hf.anchors.dense import is_dense
from klas_hf.errors import TrainingDiverged
from klas_hf.files import claim
from klas_hf.processes import ProgressBar, process_state
from klas_hf.training.checkpoints import Checkpoints, Progress
from klas_hf.training.config import TrainingConfig
from klas_hf.training.data import EpochOrder
from klas_hf.training.dense import DenseObjective
from klas_hf.training.held_out import HeldOut
from klas_hf.training.images import ImageData, ImageObjective
from klas_hf.training.language import LanguageObjective
from klas_hf.training.multilabel import MultiLabelObjective, is_multilabel
from klas_hf.training.objectives import Objective, on_device
from klas_hf.training.paths import takes
from klas_hf.training.trainables import made_trainable, optimizer_of

PASSED = 0.1  # nats that a model must be ahead of its teacher by: one that is about as good still teaches (LOG.md)


@dataclass(frozen=True, repr=False)
class TrainingResult:
    """What a run did; prints as its steps, time, first and last loss.

    Attributes:
        steps: optimiser steps.
        losses: mean loss of each step, in nats per label.
        validation: (step, held-out loss in nats per label) of every measurement, the start's first; empty without
            held-out examples.
        seconds: time of this call; of a resumed run, only what it added.
        processes: number of processes.
        kept: the step, and held-out loss, of the weights that the model has: those of the end, unless earlier ones did
            better by more than a standard error, or the end is worse than the start; None without held-out examples.
        examples: the held-out loss of each example then, summed over its labels, in nats.

    Example:
        >>> model = StitchedModel.from_anchors(source, target, stitch=(2, 1), calibration=batches)
        >>> result = train_stitches(model, examples, TrainingConfig(max_steps=2, per_device_batch_size=4))
        >>> result.steps, len(result.losses), result.processes
        (2, 2, 1)
    """

    steps: int
    losses: tuple[float, ...]
    seconds: float
    processes: int
    validation: tuple[tuple[int, float], ...] = ()
    kept: tuple[int, float] | None = None
    examples: tuple[float, ...] = field(default=(), compare=False)

    def __repr__(self) -> str:
        steps = f"{self.steps:,} step{'' if self.steps == 1 else 's'} in {self.seconds:.1f} s"
        return f"{steps}, loss {self.losses[0]:.4f} → {self.losses[-1]:.4f}" if self.losses else steps


def train_stitches(
    model: PreTrainedModel,
    data: Sequence[Mapping[str, Any]] | ImageData,
    config: TrainingConfig | None = None,
    *,
    teacher: PreTrainedModel | None = None,
    validation: Sequence[Mapping[str, Any]] | ImageData | None = None,
    output_dir: str | Path | None = None,
) -> TrainingResult:
    """Train a stitched model or a supernet in place. With trainable="full", any language, image or dense model.

    A supernet runs one of its paths per forward and process, drawn at random (SN-Net). For the losses see KLAS Sec. 5.5
    and App. H. What was done is kept in the model's config as `training`, for its model card: the settings, the amount
    of data, steps, first and last loss, the teacher; of a model trained before, what came `before`.

    Args:
        model: the model; LoRA updates are merged into it at the end.
        data: of a language model, examples with `input_ids` and `labels` (lists of one length; -100 where no loss is
            taken); of an image model, a map-style dataset of `(pixels (channels, height, width), label)` with
            `labels`, the list of all labels; of a dense model, of `(pixels, mask (height, width))`, where 255 in a mask
            is void. Pixels are uint8, or float and normalised.
        config: settings; None takes the defaults.
        teacher: for distillation, usually the dearest anchor.
        validation: held-out examples of the form of `data`; their loss (of the labels, not distilled) is measured at
            the start and every `eval_steps`, and at the end the model has the weights that did best, or those of the
            end where they are as good within a standard error. With `config.distillation_until_passed` nothing more is
            distilled from a teacher once its own loss is more than .1 nats above: it would hold the model back.
        output_dir: where checkpoints go. A run found there is resumed, to the same parameters as without a break.

    Returns:
        Steps and losses.

    Raises:
        ValueError: examples without labels, distillation without a teacher, settings that the model cannot take, a
            checkpoint of another run.
        TrainingDiverged: a loss or gradient is not finite; the last checkpoint stays.
        BlockingIOError: another run writes to `output_dir`.

    Example:
        >>> model = StitchedModel.from_anchors(source, target, stitch=(2, 1), calibration=batches)
        >>> before = evaluate(model, batches[:2]).metrics["loss"]  # the examples, in batches
        >>> config = TrainingConfig(trainable="stitch", epochs=20, gradient_accumulation_steps=1, learning_rate=0.01)
        >>> result = train_stitches(model, examples, config, output_dir=folder)
        >>> result.steps, evaluate(model, batches[:2]).metrics["loss"] < before
        (20, True)
    """
    config = config or TrainingConfig()
    config = with_precision(config, process_state().device)
    objective = _objective(model, data, config, teacher)
    held_objective = None if validation is None else held_objective_of(model, validation, config)
    to_pass = _loss_to_pass(objective, validation, config)
    parallel = DistributedDataParallelKwargs(find_unused_parameters=objective.may_skip_parameters)
    accelerator = Accelerator(kwargs_handlers=[parallel])
    multiple = accelerator.num_processes * config.gradient_accumulation_steps
    loader, order = objective.batches(multiple)
    steps_per_epoch = len(loader) // multiple
    total = max(1, math.ceil(steps_per_epoch * config.epochs)) if config.max_steps is None else config.max_steps
    described = asdict(config) | objective.description()
    checkpoints = Checkpoints(output_dir, described | {"examples": len(data), "batches_per_step": multiple})
    resumed = checkpoints.latest()
    begun = time.perf_counter()
    with (
        nullcontext() if output_dir is None or not accelerator.is_main_process else claim(output_dir),
        made_trainable(model, config) as trainable,
        torch.random.fork_rng(),
        objective.while_training(accelerator.device),
    ):
        prepared, optimizer, loader = accelerator.prepare(trainable, optimizer_of(trainable, config), loader)
        optimizer.zero_grad()  # what a run that diverged has left
        held = None
        if held_objective is not None:
            every = max(1, total // 10) if config.eval_steps is None else config.eval_steps
            held = HeldOut(accelerator, prepared, held_objective, every, to_pass)
        progress = checkpoints.load(resumed, prepared, optimizer.optimizer, held) if resumed else Progress()
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        warmup = math.ceil(total * config.warmup_ratio)
        schedule = get_cosine_schedule_with_warmup(optimizer.optimizer, warmup, total, last_epoch=progress.step - 1)
        run = _Run(accelerator, prepared, optimizer, schedule, config, objective, held)
        steps = _steps(loader, order, config.gradient_accumulation_steps, steps_per_epoch, progress.step, total)
        try:
            progress = run.train(steps, progress, total, checkpoints)
            if held is not None:
                held.finish()
        finally:
            accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    seconds = time.perf_counter() - begun
    result = TrainingResult(progress.step, progress.losses, seconds, accelerator.num_processes)
    if held is not None:
        kept = held.kept_step, dict(held.history)[held.kept_step]
        result = replace(result, validation=tuple(held.history), kept=kept, examples=held.examples)
    if result.steps:
        model.config.training = _record(result, config, objective, len(data), getattr(model.config, "training", None))
    return result


def _record(
    result: TrainingResult, config: TrainingConfig, objective: Objective, examples: int, before: Any
) -> dict[str, Any]:
    """What a model's config keeps of its training: plain JSON."""
    made = {
        "settings": asdict(config),
        "data": {"kind": objective.kind, "examples": examples},
        "teacher": objective.teacher_name(),
        "steps": result.steps,
        "processes": result.processes,
        "first_loss": result.losses[0],
        "last_loss": result.losses[-1],
    }
    if config.distillation_until_passed and objective.teacher is not None:
        made["passed_teacher"] = objective.has_passed
    if result.kept is not None:
        made |= dict(zip(("kept_step", "validation_loss"), result.kept, strict=True))
    return made if before is None else made | {"before": before}


def with_precision(config: TrainingConfig, device: torch.device) -> TrainingConfig:
    """Settings that say what "auto" precision is on a device."""
    if config.mixed_precision != "auto":
        return config
    return replace(config, mixed_precision="bf16" if device.type != "cpu" and is_bf16_available() else "no")


def _objective(model: PreTrainedModel, data: Any, config: TrainingConfig, teacher: PreTrainedModel | None) -> Objective:
    """The loss of this kind of model."""
    if is_dense(model):
        return DenseObjective(model, data, config, teacher)
    if is_multilabel(model):
        return MultiLabelObjective(model, data, config, teacher)
    kind = ImageObjective if model.main_input_name == "pixel_values" else LanguageObjective
    return kind(model, data, config, teacher)


def held_objective_of(model: PreTrainedModel, validation: Any, config: TrainingConfig) -> Objective:
    """The loss of held-out examples: of their labels, undistilled and as they are."""
    if takes(model, "path"):
        raise ValueError("got validation for a supernet, of which each path has a loss of its own; leave it out")
    plain = replace(config, distillation_weight=0.0, augmentation=None, drop_path=None)
    return _objective(model, validation, plain, None)


def held_out_loss(model: PreTrainedModel, validation: Any, config: TrainingConfig) -> float:
    """The loss of a model on held-out examples, in nats per label, as `train_stitches` measures it."""
    accelerator = Accelerator()
    objective = held_objective_of(model, validation, with_precision(config, accelerator.device))
    with on_device(model, accelerator.device):
        examples, labels = HeldOut(accelerator, model, objective, 1).measure()
    return sum(examples) / max(labels, 1)


def _loss_to_pass(objective: Objective, validation: Any, config: TrainingConfig) -> float:
    """The held-out loss below which nothing more is distilled; −∞ where that goes on to the end."""
    if objective.teacher is None or not config.distillation_until_passed:
        return -math.inf
    if validation is None:
        raise ValueError(
            "got distillation_until_passed and no validation; expected held-out examples, on which the model and its "
            "teacher are compared: validation=examples"
        )
    return held_out_loss(objective.teacher, validation, config) - PASSED


class _Run:
    """The state that the steps of one run share."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        schedule: Any,
        config: TrainingConfig,
        objective: Objective,
        held: HeldOut | None,
    ):
        self.accelerator, self.model, self.optimizer, self.schedule = accelerator, model, optimizer, schedule
        self.config, self.objective, self.held = config, objective, held

    def train(
        self, steps: Iterator[list[dict[str, Tensor]]], progress: Progress, total: int, checkpoints: Checkpoints
    ) -> Progress:
        """Take optimiser steps until `total`, writing checkpoints."""
        losses = list(progress.losses)
        self._look(progress.step, total)
        with ProgressBar("training", "step", total, done=progress.step) as bar:
            for batches in steps:
                loss = self._step(batches, seed=self.config.seed * 1_000_003 + len(losses))
                losses.append(loss)
                progress = Progress(len(losses), tuple(losses))
                bar.update(f"loss={loss:.3f}")
                self._look(progress.step, total)
                if progress.step % self.config.save_steps == 0 or progress.step == total:
                    checkpoints.save(self.accelerator, self.model, self.optimizer.optimizer, progress, self.held)
        return progress

    def _look(self, step: int, total: int) -> None:
        """Measure on held-out examples, and leave a teacher that does worse."""
        if self.held is not None:
            self.held.look(step, total)
            self.objective.has_passed = self.held.best < self.held.to_pass

    def _step(self, batches: list[dict[str, Tensor]], seed: int) -> float:
        # Reseeding at each step makes dropout independent of what ran before: a resumed run draws the same.
        torch.manual_seed(seed * self.accelerator.num_processes + self.accelerator.process_index)
        labels = self.accelerator.reduce(sum(self.objective.count(batch).float() for batch in batches), "sum")
        process = self.accelerator.process_index
        loss_sum = torch.zeros((), device=self.accelerator.device)
        for number, batch in enumerate(batches):
            with self._synchronised(is_last=number == len(batches) - 1):
                loss = self.objective.loss_sum(self.model, batch, (seed, number, process)) / labels
                # DistributedDataParallel averages gradients over processes; the loss is a sum over them.
                self.accelerator.backward(loss * self.accelerator.num_processes)
            loss_sum += loss.detach()
        loss_value = float(self.accelerator.reduce(loss_sum, "sum"))
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        if not (math.isfinite(loss_value) and math.isfinite(float(norm))):
            raise TrainingDiverged(
                f"got a loss of {loss_value} with a gradient norm of {float(norm)}; expected finite numbers. The last "
                "checkpoint is kept. Lower the learning rate, or train with mixed_precision='no'"
            )
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss_value

    def _synchronised(self, is_last: bool) -> Any:
        return nullcontext() if is_last else self.accelerator.no_sync(self.model)


def _steps(
    loader: Any, order: EpochOrder, accumulated: int, steps_per_epoch: int, done: int, total: int
) -> Iterator[list[dict[str, Tensor]]]:
    """The batches of each remaining optimiser step, in order, over epochs."""
    for step in range(done, total):
        if step == done or step % steps_per_epoch == 0:
            order.epoch, order.step = divmod(step, steps_per_epoch)
            batches = iter(loader)
        yield [next(batches) for _ in range(accumulated)]
