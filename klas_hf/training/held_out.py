"""The loss on held-out examples as a training goes on; at its end the weights are those that did best there.

The start is measured too, so that training never returns a model that is worse on them than the one it was given. The
weights of the end, where the rate has fallen to nothing, are given up for earlier ones only where these did better by
more than a standard error: of few examples the least loss is one that chance has picked (LOG.md).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from klas_hf.anchors.weights import evaluating
from klas_hf.training.objectives import Objective

_EVERYWHERE = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)


class HeldOut:
    """Held-out losses, and the best weights so far.

    Args:
        accelerator: of the run.
        model: the prepared model.
        objective: the loss of the held-out examples, not distilled.
        every: steps between measurements.
        to_pass: the loss below which the model has passed its teacher.

    Attributes:
        history: (step, loss in nats per label) of every measurement.
        best_step: of the least loss.
        weights: the trained tensors of that step, on the CPU.
        kept_step: whose weights the model has after `finish`.
        examples: the loss of each example (of dense models: batch), summed over its labels, when last measured; after
            `finish`, of what is kept.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, objective: Objective, every: int, to_pass: float = -math.inf
    ):
        self.accelerator, self.model, self.objective, self.every = accelerator, model, objective, max(1, every)
        self.to_pass = to_pass
        self.loader = accelerator.prepare_data_loader(objective.batches(accelerator.num_processes)[0])
        self.history: list[tuple[int, float]] = []
        self.best_step = self.kept_step = 0
        self.weights: dict[str, Tensor] = {}
        self.examples: tuple[float, ...] = ()

    @property
    def best(self) -> float:
        """The least loss so far."""
        return min((loss for _, loss in self.history), default=math.inf)

    def look(self, step: int, last: int) -> None:
        """Measure, if it is time, and keep the weights if they are the best."""
        if step % self.every and step != last:
            return
        if any(done == step for done, _ in self.history):
            return  # a resumed run
        self.examples, labels = self.measure()
        loss = float(np.sum(self.examples)) / max(labels, 1)
        if loss < self.best or not self.history:
            self.best_step, self.weights = step, self._weights()
        self.history.append((step, loss))

    def finish(self) -> None:
        """Give the model the weights that did best, unless those of the end are as good within a standard error."""
        (_, start), (self.kept_step, end) = self.history[0], self.history[-1]
        if not self.examples:  # of a run that was whole when it was resumed
            self.examples, _ = self.measure()
        if self.best_step == self.kept_step:
            return
        last = self._weights()
        self._give(self.weights)
        best, _ = self.measure()
        if not end <= start or is_less(best, self.examples):
            self.kept_step, self.examples = self.best_step, best
        else:
            self._give(last)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the weights, as JSON values."""
        return {"history": self.history, "best_step": self.best_step}

    def load(self, state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.history = [(int(step), float(loss)) for step, loss in state["history"]]
        self.best_step, self.weights = state["best_step"], dict(weights)

    @torch.no_grad()
    def measure(self) -> tuple[tuple[float, ...], int]:
        """The loss now of each example of all processes, summed over its labels, in nats, and the number of labels."""
        losses, labels = [torch.zeros(0)], 0
        with evaluating(self.model):
            for number, batch in enumerate(self.loader):
                # The same draws whenever it is measured, and none of the training's.
                losses.append(self.objective.example_losses(self.model, batch, (0, number, 0)).cpu())
                labels += int(self.objective.count(batch))
        everyone = gather_object([(torch.cat(losses).tolist(), labels)])
        return tuple(loss for some, _ in everyone for loss in some), sum(count for _, count in everyone)

    def _weights(self) -> dict[str, Tensor]:
        found = get_model_state_dict(self.model, options=_EVERYWHERE)
        return {name: tensor.detach().cpu().clone() for name, tensor in found.items()}

    def _give(self, weights: Mapping[str, Tensor]) -> None:
        set_model_state_dict(self.model, dict(weights), options=_EVERYWHERE)


def is_less(losses: Sequence[float], others: Sequence[float]) -> bool:
    """Whether losses of some examples are less in sum than others of the same ones by more than a standard error.

    The error is of the sum of the differences, example by example; of a single one none is known, and any less counts.
    """
    less = np.subtract(others, losses)
    error = math.sqrt(len(less)) * less.std(ddof=1) if len(less) > 1 else 0.0
    return bool(less.sum() > error)
