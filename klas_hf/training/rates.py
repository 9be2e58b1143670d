"""The learning rate that a model is healed at, found by short runs from the same start."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from klas_hf.errors import TrainingDiverged
from klas_hf.training.config import TrainingConfig
from klas_hf.training.loop import held_out_loss, train_stitches

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # that may be tried
MIDDLE = 0.09  # over the head's width: the middle of the rates tried (Adam's go with 1 / width, arXiv 2203.03466)
SWEEP_SHARE = 0.1  # of the steps, that each rate is tried for
# What a whole run of 100 steps gains on such a short one for each e-fold of the rate, as a share of the loss (LOG.md).
# It goes with the root of the steps, up to twice that; of LoRA, where rates that are too high break less, it is half.
GAIN = 0.015
CAUTION = 3  # what the rate found is divided by where no short run has learnt anything


class Start:
    """What a model was, to be put back."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        self.record = getattr(model.config, "training", None)

    def put_back(self) -> None:
        self.model.load_state_dict(self.state)
        if hasattr(self.model.config, "training"):
            self.model.config.training = self.record


class RateSweep:
    """Short runs of a model at several rates, the model put back after each.

    A run that does better than the teacher is done on the labels alone too, until these are ahead. Runs that do no
    better than chance count only where all are such, and then the rate is lowered: what first brings a model that is
    far off nearer may kill it before its end.

    Args:
        model, train, held, teacher: what is trained, on what, measured on what, and distilled from what.
        config: settings of the whole run.
        start: what the model is put back to.
        bar: the teacher's own held-out loss, in nats per label; −∞ where labels alone are not to be tried.
        chance: the held-out loss that is no better than chance.

    Attributes:
        config: the settings, with the share of distillation that did best.
        losses: rate → held-out loss of its short run; infinite where it diverged.
    """

    def __init__(
        self, model: PreTrainedModel, train: Any, held: Any, teacher: PreTrainedModel | None, config: TrainingConfig,
        start: Start, *, bar: float, chance: float,
    ):  # fmt: skip
        self.model, self.train, self.held, self.teacher = model, train, held, teacher
        self.config, self.start, self.bar, self.chance = config, start, bar, chance
        self.total = steps_of(config, train)
        self.losses: dict[float, float] = {}
        self._diverged: dict[float, TrainingDiverged] = {}

    def best_of(self, rates: Sequence[float]) -> TrainingConfig:
        """The settings of the whole run, with its rate.

        Three rates about the middle are tried, higher ones while they get better, and lower ones while all diverge.

        Raises:
            TrainingDiverged: at every rate.
        """
        middle = MIDDLE / _head_width(self.model) * (10 if self.config.trainable == "lora" else 1)
        place = min(range(len(rates)), key=lambda place: abs(math.log(rates[place] / middle)))
        low, high = max(0, place - 1), min(len(rates) - 1, place + 1)
        for rate in rates[low : high + 1]:
            self._try(rate)
        while high + 1 < len(rates) and rates[high] not in self._diverged and _least(self._foretold()) == rates[high]:
            high += 1
            self._try(rates[high])
        while low and len(self._diverged) == len(self.losses):
            low -= 1
            self._try(rates[low])
        if len(self._diverged) == len(self.losses):
            raise self._diverged[min(self._diverged)]
        lower = 1 if min(self.losses.values()) < self.chance else CAUTION
        return replace(self.config, learning_rate=max(rates[0], _vertex(self._foretold()) / lower))

    def _try(self, rate: float) -> None:
        """A run at a rate, and on the labels alone where it passes the teacher."""
        self._run(rate, self.config)
        if (both := self.losses[rate]) < self.bar:
            alone = replace(self.config, distillation_weight=0.0)
            self._run(rate, alone)
            if self.losses[rate] < both:
                self.config, self.bar = alone, -math.inf
            else:
                self.losses[rate] = both
                self._diverged.pop(rate, None)

    def _run(self, rate: float, config: TrainingConfig) -> None:
        steps = max(2, round(self.total * SWEEP_SHARE))  # the first of which is at a rate of 0
        trial = replace(config, learning_rate=rate, max_steps=steps, save_steps=10**9, distillation_until_passed=False)
        try:
            train_stitches(self.model, self.train, trial, teacher=self.teacher)
            self.losses[rate] = held_out_loss(self.model, self.held, trial)
            if not math.isfinite(self.losses[rate]):  # in the last step, whose loss nobody saw
                got = f"a held-out loss of {self.losses[rate]} at a rate of {rate:g}"
                raise TrainingDiverged(f"got {got}; expected a finite one. Lower the rates")
        except TrainingDiverged as error:
            self.losses[rate], self._diverged[rate] = math.inf, error
        self.start.put_back()

    def _foretold(self) -> dict[float, float]:
        """What whole runs would come to, but for a constant: short ones' losses, less what high rates gain later."""
        share = GAIN * (0.5 if self.config.trainable == "lora" else 1) * min(math.sqrt(self.total / 100), 2)
        learnt = [rate for rate, loss in self.losses.items() if loss < self.chance]
        counted = learnt or [rate for rate in self.losses if rate not in self._diverged]
        gain = share * min(self.losses.values())
        return {rate: self.losses[rate] - gain * math.log(rate) for rate in counted}


def steps_of(config: TrainingConfig, data: Any) -> int:
    """Steps of a run as settings have it; where they count epochs, of one."""
    return max(1, len(data) // config.per_device_batch_size) if config.max_steps is None else config.max_steps


def _least(losses: Mapping[float, float]) -> float:
    return min(losses, key=losses.__getitem__)


def _vertex(losses: Mapping[float, float]) -> float:
    """The rate of least loss, by a parabola in its logarithm through the best one and those beside it."""
    rates, best = sorted(losses), _least(losses)
    first = min(max(0, rates.index(best) - 1), max(0, len(rates) - 3))
    beside = rates[first : first + 3]
    if len(beside) < 3:
        return best
    logs = np.log(beside)
    curvature, slope, _ = np.polyfit(logs, [losses[rate] for rate in beside], 2)
    return float(np.exp(np.clip(-slope / (2 * curvature), logs[0], logs[-1]))) if curvature > 0 else best


def _head_width(model: PreTrainedModel) -> int:
    """Features that a language model's head, or a classifier's, reads."""
    head = model.get_output_embeddings()
    weights = [head.weight] if head is not None else [one for one in model.parameters() if one.ndim > 1]
    return int(weights[-1].shape[1])
