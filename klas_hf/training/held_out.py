"""The loss on held-out examples as a training goes on; at its end the weights are those that did best there.

The start is measured too, so that training never returns a model that is worse on them than the one it was given.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
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

    Attributes:
        history: (step, loss in nats per label) of every measurement.
        best_step: of the least loss.
        weights: the trained tensors of that step, on the CPU.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, objective: Objective, every: int):
        self.accelerator, self.model, self.objective, self.every = accelerator, model, objective, max(1, every)
        self.loader = accelerator.prepare_data_loader(objective.batches(accelerator.num_processes)[0])
        self.history: list[tuple[int, float]] = []
        self.best_step = 0
        self.weights: dict[str, Tensor] = {}

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
        loss = self.loss()
        if loss < self.best or not self.history:
            self.best_step = step
            found = get_model_state_dict(self.model, options=_EVERYWHERE)
            self.weights = {name: tensor.detach().cpu().clone() for name, tensor in found.items()}
        self.history.append((step, loss))

    def put_back(self) -> None:
        """Give the model the weights that did best."""
        if self.weights:
            set_model_state_dict(self.model, dict(self.weights), options=_EVERYWHERE)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the weights, as JSON values."""
        return {"history": self.history, "best_step": self.best_step}

    def load(self, state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.history = [(int(step), float(loss)) for step, loss in state["history"]]
        self.best_step, self.weights = state["best_step"], dict(weights)

    @torch.no_grad()
    def loss(self) -> float:
        """The model's loss now, in nats per label."""
        sums = torch.zeros(2, device=self.accelerator.device)
        with evaluating(self.model):
            for number, batch in enumerate(self.loader):
                # The same draws whenever it is measured, and none of the training's.
                sums[0] += self.objective.loss_sum(self.model, batch, (0, number, 0))
                sums[1] += self.objective.count(batch)
        total, count = self.accelerator.reduce(sums, "sum").tolist()
        return total / max(count, 1)
