"""What a kind of data brings to the training loop: its batches, its loss, and what holds while it trains."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig

from klas_hf.training.data import EpochOrder


class Objective(ABC):
    """A loss over data, as sums, so that any split into batches and processes adds up to the same.

    Attributes:
        may_skip_parameters: whether a forward can leave trained parameters unused, as a supernet's does.
    """

    may_skip_parameters: bool

    @abstractmethod
    def batches(self, multiple: int) -> tuple[DataLoader, EpochOrder]:
        """A loader whose number of batches is a multiple of `multiple`, and the order that it follows."""

    @abstractmethod
    def count(self, batch: dict[str, Tensor]) -> Tensor:
        """What the loss sum is divided by: the labels of a batch, as a scalar tensor on its device."""

    @abstractmethod
    def loss_sum(self, model: nn.Module, batch: dict[str, Tensor], seed: tuple[int, ...]) -> Tensor:
        """The loss of a batch summed over its labels, in nats.

        Args:
            model: the prepared model, which may be wrapped for several processes.
            batch: what the loader gives, on the model's device.
            seed: of this forward: the step's, the number of the forward in the step, the process's number.
        """

    @abstractmethod
    def while_training(self, device: torch.device) -> AbstractContextManager[None]:
        """What holds from the first step to the last; the teacher is on `device` meanwhile."""

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be resumed, beside the settings."""


def stitched_from(config: PreTrainedConfig) -> dict[str, Any]:
    """What a stitched model's configuration says of its anchors and stitch; None each for other models."""
    names = ("source_name", "target_name", "source_stop", "target_start")
    return {name: getattr(config, name, None) for name in names}
