"""Muon for the matrices of hidden layers, AdamW for everything else, as one optimiser.

Muon (Jordan et al. 2024) makes each update of a matrix orthogonal, so that no direction of it is left behind; that
suits no embeddings, heads, vectors or convolutions. Its updates are scaled as AdamW's (arXiv 2502.16982, Eq. 4), so
that one rate serves both.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers.pytorch_utils import Conv1D


class MuonWithAdamW(Optimizer):
    """torch's Muon and AdamW, each for its own groups; schedules, checkpoints and clipping see one optimiser.

    Args:
        groups: of parameters, each with `is_hidden`: whether Muon takes its steps.
        lr: of groups that have none.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float):
        groups = list(groups)
        self._steppers = {}
        for is_hidden, kind, options in ((True, Muon, {"adjust_lr_fn": "match_rms_adamw"}), (False, AdamW, {})):
            stepper = kind([nn.Parameter(torch.zeros(1, 1))], lr=lr, weight_decay=0.0, **options)
            self._steppers[is_hidden] = stepper
        super().__init__([self._steppers[group["is_hidden"]].defaults | group for group in groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for is_hidden, stepper in self._steppers.items():
            # Anew at each step: loading a checkpoint replaces both.
            stepper.param_groups = [group for group in self.param_groups if group["is_hidden"] == is_hidden]
            stepper.state = self.state
            stepper.step()
        return loss


def hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """The weights of linear layers whose outputs are features: not of those that give tokens or classes.

    Args:
        model: a language model, or one of `config.num_labels` classes.
    """
    head = model.get_output_embeddings()
    labels = model.config.num_labels
    classes = (labels, labels + 1) if head is None else ()  # Mask2Former tells a class that is none too
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    return {layer.weight for layer in layers if layer is not head and len(layer.weight) not in classes}
