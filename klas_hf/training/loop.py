"""Fine-tuning of stitched models through Accelerate (KLAS Sec. 5.5 and App. H).

One loop for one process and many: what to run on is accelerate's business (its flags, its config file). The loss of
an optimiser step is a mean over all its labels, on whatever process and in whatever forward they are.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from klas_hf.anchors.language import evaluating
from klas_hf.processes import process_state
from klas_hf.training.checkpoints import Checkpoints, Progress
from klas_hf.training.config import TrainingConfig
from klas_hf.training.data import batches_of
from klas_hf.training.losses import cross_entropy_sum, distillation_sum, label_count
from klas_hf.training.trainables import made_trainable, parameter_groups


class TrainingDiverged(RuntimeError):
    """The loss or a gradient became NaN or infinite."""


@dataclass(frozen=True)
class TrainingResult:
    """What a run did.

    Attributes:
        steps: optimiser steps.
        losses: mean loss of each step, in nats per label.
        seconds: time of this call; of a resumed run, only what it added.
        processes: number of processes.
    """

    steps: int
    losses: tuple[float, ...]
    seconds: float
    processes: int


def train_stitches(
    model: PreTrainedModel,
    data: Sequence[Mapping[str, Any]],
    config: TrainingConfig | None = None,
    *,
    teacher: PreTrainedModel | None = None,
    output_dir: str | Path | None = None,
) -> TrainingResult:
    """Train a stitched model in place. With trainable="full", any causal language model.

    Args:
        model: the model; LoRA updates are merged into it at the end.
        data: examples with `input_ids` and `labels` (lists of one length; -100 where no loss is taken).
        config: settings; None takes the defaults.
        teacher: for distillation, usually the target anchor.
        output_dir: where checkpoints go. A run found there is resumed, to the same parameters as without a break.

    Returns:
        Steps and losses.

    Raises:
        ValueError: examples without labels, distillation without a teacher, a checkpoint of another run.
        TrainingDiverged: a loss or gradient is not finite; the last checkpoint stays.
    """
    config = config or TrainingConfig()
    if config.distillation_weight and teacher is None:
        raise ValueError("got distillation_weight > 0 and no teacher; expected teacher=the target anchor")
    process_state()  # before the Accelerator, which would not see CPU processes
    accelerator = Accelerator()
    multiple = accelerator.num_processes * config.gradient_accumulation_steps
    loader, order = batches_of(data, config.per_device_batch_size, multiple, config.seed)
    steps_per_epoch = len(loader) // multiple
    total = config.max_steps or max(1, math.ceil(steps_per_epoch * config.epochs))
    checkpoints = Checkpoints(output_dir, _run(model, data, config, multiple))
    resumed = checkpoints.latest()
    begun = time.perf_counter()
    with made_trainable(model, config) as trainable, torch.random.fork_rng():
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = AdamW(parameter_groups(trainable, config), lr=config.learning_rate)
        prepared, optimizer, loader = accelerator.prepare(trainable, optimizer, loader)
        progress = checkpoints.load(resumed, prepared, optimizer.optimizer) if resumed else Progress()
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        warmup = math.ceil(total * config.warmup_ratio)
        schedule = get_cosine_schedule_with_warmup(optimizer.optimizer, warmup, total, last_epoch=progress.step - 1)
        run = _Run(accelerator, prepared, optimizer, schedule, config, teacher)
        try:
            progress = run.train(
                _steps(loader, order, config, steps_per_epoch, progress.step, total), progress, total, checkpoints
            )
        finally:
            accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
            if config.gradient_checkpointing:
                model.gradient_checkpointing_disable()
    return TrainingResult(progress.step, progress.losses, time.perf_counter() - begun, accelerator.num_processes)


class _Run:
    """The state that the steps of one run share."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        schedule: Any,
        config: TrainingConfig,
        teacher: PreTrainedModel | None,
    ):
        self.accelerator, self.model, self.optimizer, self.schedule = accelerator, model, optimizer, schedule
        self.config = config
        self.teacher = teacher.to(accelerator.device) if teacher is not None and config.distillation_weight else None

    def train(
        self, steps: Iterator[list[dict[str, Tensor]]], progress: Progress, total: int, checkpoints: Checkpoints
    ) -> Progress:
        """Take optimiser steps until `total`, writing checkpoints."""
        bar = tqdm(
            total=total, initial=progress.step, desc="training", unit="step", leave=False,
            disable=not self.accelerator.is_main_process,
        )  # fmt: skip
        losses = list(progress.losses)
        for batches in steps:
            loss = self._step(batches, seed=self.config.seed * 1_000_003 + len(losses))
            losses.append(loss)
            progress = Progress(len(losses), tuple(losses))
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}")
            if progress.step % self.config.save_steps == 0 or progress.step == total:
                checkpoints.save(self.accelerator, self.model, self.optimizer.optimizer, progress)
        bar.close()
        return progress

    def _step(self, batches: list[dict[str, Tensor]], seed: int) -> float:
        # Reseeding at each step makes dropout independent of what ran before: a resumed run draws the same.
        torch.manual_seed(seed * self.accelerator.num_processes + self.accelerator.process_index)
        labels = self.accelerator.reduce(sum(label_count(batch["labels"]).float() for batch in batches), "sum")
        loss_sum = torch.zeros((), device=self.accelerator.device)
        for number, batch in enumerate(batches):
            with self._synchronised(is_last=number == len(batches) - 1):
                loss = self._loss_sum(batch) / labels
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

    def _loss_sum(self, batch: dict[str, Tensor]) -> Tensor:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        # Not left to the Accelerator, whose precision is one for the life of the process.
        is_bf16 = self.config.mixed_precision == "bf16"
        with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=is_bf16):
            logits = self.model(**inputs).logits
        loss = cross_entropy_sum(logits, batch["labels"])
        weight = self.config.distillation_weight
        if self.teacher is None:
            return loss
        with torch.no_grad(), evaluating(self.teacher):
            teacher_logits = self.teacher(**inputs).logits
        distance = distillation_sum(logits, teacher_logits, batch["labels"], self.config.distillation_temperature)
        return (1 - weight) * loss + weight * distance


def _steps(
    loader: Any, order: Any, config: TrainingConfig, steps_per_epoch: int, done: int, total: int
) -> Iterator[list[dict[str, Tensor]]]:
    """The batches of each remaining optimiser step, in order, over epochs."""
    accumulated = config.gradient_accumulation_steps
    for step in range(done, total):
        if step == done or step % steps_per_epoch == 0:
            order.epoch = step // steps_per_epoch
            batches = iter(loader)
            for _ in range(step % steps_per_epoch * accumulated):
                next(batches)
        yield [next(batches) for _ in range(accumulated)]


def _run(model: PreTrainedModel, data: Sequence[Any], config: TrainingConfig, multiple: int) -> dict[str, Any]:
    """What must be the same for a checkpoint to be resumed."""
    names = ("source_name", "target_name", "source_stop", "target_start", "num_hidden_layers", "hidden_size")
    described = {name: getattr(model.config, name, None) for name in names}
    return asdict(config) | described | {"examples": len(data), "batches_per_step": multiple}
