"""Healing: a short training that repairs the joints of a path, by distillation from the dearest anchor.

A learning rate is found by short runs from the same start, so that the defaults work untouched on models of any size;
the weights that did best on held-out examples are kept, so that healing never returns a model worse than its start.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from klas_hf.anchors.classes import ImageClasses, WithClasses
from klas_hf.errors import TrainingDiverged
from klas_hf.training.checkpoints import Checkpoints
from klas_hf.training.config import TrainingConfig
from klas_hf.training.loop import TrainingResult, held_objective_of, held_out_loss, train_stitches
from klas_hf.training.rates import RATES, RateSweep, Start
from klas_hf.training.teachers import remember_answers

DISTILLATION_WEIGHT = 0.5  # share of the loss, where the settings give none
LEARNT = 0.95  # of the loss by chance: what a high rate has killed ends within some hundredths of it
HELD_OUT = 10  # every tenth example, where no validation examples are given


@dataclass(frozen=True)
class HealingResult:
    """What healing did.

    Attributes:
        training: the run at the rate that was chosen.
        learning_rate: that rate.
        distillation_weight: the share of the loss that was distillation.
        tried: rate → held-out loss of its short run, or of its whole one where that was no better than the start, in
            nats per label; infinite where it diverged.
        start, end: held-out loss before and after.

    Example:
        >>> model = StitchedModel.from_path([source, target], "1[:2] 1[3:]", calibration=batches)
        >>> config = TrainingConfig(trainable="full", max_steps=4, per_device_batch_size=2)
        >>> result = heal(model, examples, teacher=target, validation=examples, config=config)
        >>> result.end <= result.start, len(result.tried) >= 3
        (True, True)
    """

    training: TrainingResult
    learning_rate: float
    distillation_weight: float
    tried: Mapping[float, float]
    start: float
    end: float


def heal(
    model: PreTrainedModel,
    data: Any,
    *,
    teacher: PreTrainedModel | None = None,
    validation: Any = None,
    config: TrainingConfig | None = None,
    rates: Sequence[float] = RATES,
    output_dir: str | Path | None = None,
) -> HealingResult:
    """Train a model of a path in place, distilled from a teacher, at a rate found by short runs.

    A copy of the model's weights is kept on the CPU meanwhile.

    Args:
        model: the model.
        data: examples of text, or a dataset of images, as for `train_stitches`.
        teacher: the dearest anchor; the loss is half the labels' and half soft distillation then, which was best of
            labels alone, distillation alone and both (LOG.md). But a teacher that does not know these data holds its
            pupil back: from one that does no better than chance nothing is distilled, and since much is to be learnt
            then, Muon takes AdamW's place where everything learns (LOG.md); where short runs do better than the
            teacher, runs on the labels alone are tried too, which go on once they are ahead; once the whole run is
            ahead of it by .1 nats, the labels alone teach. A `distillation_weight` in the settings stays as it is.
            None: the labels alone; by Muon likewise where the model itself does no better than chance. What the teacher
            has answered is remembered meanwhile (`remember_answers`, up to 1 GiB).
        validation: held-out examples of the same form; None holds out every tenth of the data.
        config: settings; None takes `healing_config()`. Its `learning_rate` is not used unless `rates` is empty.
        rates: learning rates that may be tried, ascending, in runs of a tenth of the steps: the three about 0.09 /
            width of the head (1e-3 at 128, 3e-5 at 3072; ten times that for LoRA), and higher ones while they do
            better. What a high rate breaks at first a longer run makes good: for each e-fold of the rate 1.5 % of the
            loss in 100 steps, 3 % from 400 on (LoRA half of it; LOG.md) are taken off, and the whole run is at the
            least of a parabola through the rest; at lower ones of `rates` where it was no better than the start. Where
            no short run does better than chance, a third of that rate is taken. One alone is not tried, nor is what to
            learn from then.
        output_dir: where checkpoints of the run that was chosen go; it is resumed from there as it was.

    Returns:
        The held-out losses before and after, the rate, and the run.

    Raises:
        ValueError: too few examples to hold some out, or as `train_stitches`.
        TrainingDiverged: at every rate that was tried, or the lowest; the model is as it was.

    Example:
        >>> model = StitchedModel.from_path([source, target], "0[:2] 1[3:]", calibration=batches)
        >>> config = healing_config(4, per_device_batch_size=2, distillation_weight=0.5)
        >>> result = heal(model, examples, teacher=target, validation=examples, config=config)
        >>> model.config.training["teacher"], result.training.steps
        ('LlamaForCausalLM', 4)
    """
    config = config or healing_config()
    choose = not config.distillation_weight
    if choose and teacher is not None:
        config = replace(config, distillation_weight=DISTILLATION_WEIGHT, distillation_until_passed=True)
    train, held = (data, validation) if validation is not None else split(data)
    held_objective_of(model, held, config).batches(1)  # which refuses what makes no sense, before anything runs
    start = Start(model)
    tried: dict[float, float] = {}
    with remember_answers(teacher):
        if (begun := _begun(output_dir)) is not None:
            config = replace(config, **begun)
        elif len(rates) > 1:
            bar, chance = -math.inf, _chance(model, held, config)
            if choose:
                judged = held_out_loss(model if teacher is None else teacher, held, config)
                if judged >= chance:
                    muon = config.trainable == "full" and config.optimizer == "adamw"
                    config = replace(config, distillation_weight=0.0, optimizer="muon" if muon else config.optimizer)
                elif teacher is not None:
                    bar = judged
            sweep = RateSweep(model, train, held, teacher, config, start, bar=bar, chance=chance)
            config, tried = sweep.best_of(rates), sweep.losses
        elif rates:
            config = replace(config, learning_rate=rates[0])
        run = partial(train_stitches, model, train, teacher=teacher, validation=held, output_dir=output_dir)
        lower = [rate for rate in rates if rate < config.learning_rate]
        result, config = _whole(run, config, lower, tried, start, output_dir)
    assert result.kept is not None
    before, after = result.validation[0][1], result.kept[1]
    return HealingResult(result, config.learning_rate, config.distillation_weight, tried, before, after)


def healing_config(steps: int = 300, **changes: Any) -> TrainingConfig:
    """The settings that healing takes where none are given: everything learns, in one cosine of the learning rate.

    Args:
        steps: optimiser steps.
        changes: any fields of `TrainingConfig`.

    Returns:
        The settings.

    Raises:
        ValueError: as `TrainingConfig`.

    Example:
        >>> healing_config(300).trainable, healing_config(trainable="lora").max_steps
        ('full', 300)
    """
    settings: dict[str, Any] = {
        "trainable": "full", "max_steps": steps, "gradient_accumulation_steps": 1, "distillation_weight": 0.0,
    }  # fmt: skip
    return TrainingConfig(**settings | changes)


def knows_nothing(model: PreTrainedModel, held: Any, config: TrainingConfig) -> bool:
    """Whether a model does no better on held-out examples than who knows only how often each label occurs."""
    return held_out_loss(model, held, config) >= _chance(model, held, config)


def _chance(model: PreTrainedModel, held: Any, config: TrainingConfig) -> float:
    """The held-out loss that is no better than chance, in nats per label."""
    return LEARNT * held_objective_of(model, held, config).chance()


def _whole(
    run: Callable[[TrainingConfig], TrainingResult], config: TrainingConfig, lower: list[float],
    tried: dict[float, float], start: Start, output_dir: str | Path | None,
) -> tuple[TrainingResult, TrainingConfig]:  # fmt: skip
    """The whole run, at the next of the lower rates where it was no better than the start, and its settings."""
    while True:
        try:
            result = run(config)
            if (result.kept is not None and result.kept[1] < result.validation[0][1]) or not lower:
                return result, config
            tried[config.learning_rate] = result.validation[-1][1]
            start.put_back()
        except TrainingDiverged:
            start.put_back()
            if not lower:
                raise
            tried[config.learning_rate] = math.inf
        Checkpoints(output_dir, {}).remove()
        config = replace(config, learning_rate=lower.pop())


def _begun(folder: str | Path | None) -> dict[str, Any] | None:
    """What was chosen for a run that was interrupted, and is not looked for again."""
    latest = None if folder is None else Checkpoints(folder, {}).newest()
    if latest is None:
        return None
    run = json.loads((latest / "state.json").read_text())["run"]
    chosen = ("learning_rate", "distillation_weight", "distillation_until_passed", "optimizer")
    return {name: run[name] for name in chosen if name in run}


def split(data: Any) -> tuple[Any, Any]:
    """Data without every tenth example, and these."""
    held = list(range(HELD_OUT - 1, len(data), HELD_OUT))
    if not held:
        raise ValueError(
            f"got {len(data)} examples and no validation; expected at least {HELD_OUT}, of which every tenth is held "
            "out. Pass validation=examples, or more data"
        )
    kept = [number for number in range(len(data)) if number % HELD_OUT != HELD_OUT - 1]
    if isinstance(data, list | tuple):
        return [data[number] for number in kept], [data[number] for number in held]
    part = _SubsetWithClasses if isinstance(data, WithClasses) else _Subset
    return part(data, kept), part(data, held)


class _Subset(torch.utils.data.Subset):
    """Some of a dataset's examples, with their labels."""

    @property
    def labels(self) -> list[int]:
        return [self.dataset.labels[number] for number in self.indices]


class _SubsetWithClasses(_Subset, WithClasses):
    @property
    def classes(self) -> ImageClasses:
        return self.dataset.classes
