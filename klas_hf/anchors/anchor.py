"""An anchor: a pretrained model read by blocks. Text and images differ here, in their data and in their metrics alone.

The state before the first block is numbered 0 (what the embedding gives), the one after block i is numbered i.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from klas_hf.anchors.weights import check_whole_here, fingerprint

State = TypeVar("State")
Batch = TypeVar("Batch")


class Anchor(ABC, Generic[Batch, State]):
    """A pretrained model, read by blocks: a `LanguageAnchor` or a `VisionAnchor`.

    Args:
        model: the model; it is not changed.
        revision: its commit on the Hub, where known.

    Raises:
        ValueError: one of several processes holds a part of the weights.

    Attributes:
        unit: what a mean is taken over.
    """

    unit: ClassVar[str]

    def __init__(self, model: PreTrainedModel, revision: str | None = None):
        check_whole_here(model)
        self.model = model
        self.config = model.config
        self.revision = revision
        self.path: str | None = str(model.config.name_or_path) or None
        self.name = self.path or type(model).__name__

    @property
    @abstractmethod
    def num_blocks(self) -> int: ...

    @property
    @abstractmethod
    def widths(self) -> list[int]:
        """Of every state, `num_blocks + 1` numbers."""

    @property
    @abstractmethod
    def classes(self) -> int:
        """How many classes, or tokens of a vocabulary, the head tells apart."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where inputs go."""

    @cached_property
    def fingerprint(self) -> str:
        """What identifies the weights (see `fingerprint`)."""
        return fingerprint(self.model)

    @abstractmethod
    def writer(self, block: int) -> nn.Module | None:
        """The linear layer of a block whose output is the last to be added to the state, as it is, if there is one."""

    @abstractmethod
    def read(self, data: Iterable[Any], *, probed: bool = False) -> Iterator[Batch]:
        """Batches as they are given, checked.

        Args:
            probed: their units are those of probes, which of a dense model are images, not pixels.
        """

    @abstractmethod
    def meet(self, others: Sequence[Any], calibration: Iterable[Batch]) -> None:
        """Learn what the head has to know of other anchors before it answers for states that began in them."""

    @abstractmethod
    def check_like(self, other: Any) -> None:
        """Raise ValueError unless another anchor tells apart the same classes or tokens."""

    @abstractmethod
    def front(self, inputs: Mapping[str, Any], stop: int) -> State:
        """The state after `blocks[:stop]`; differentiable, in the mode that the model is in.

        Args:
            inputs: of the model's own forward.
        """

    @abstractmethod
    def run(self, state: State, inputs: Mapping[str, Any], start: int, stop: int) -> State:
        """The state after `blocks[start:stop]`; differentiable, in the mode that the model is in.

        Args:
            state: of the batch, or of several times the batch, stacked.
        """

    @abstractmethod
    def states(self, batch: Batch, stop: int | None = None) -> list[State]:
        """States 0 to `stop` (None: all) of a batch, without gradients; dropout and its like are off meanwhile."""

    @abstractmethod
    def logits(self, state: State) -> Tensor:
        """The model's own head on a last state: `(…, classes)`; differentiable, in the mode that the model is in."""

    @abstractmethod
    def answers(self, state: State, batch: Batch, units: slice = slice(None)) -> Tensor:
        """The same of the units that count, or of some: `(units, classes)`, without gradients and as evaluated."""

    @abstractmethod
    def rows(self, state: State, batch: Batch, into: Any = None) -> Tensor:
        """`(rows, width)` of a state at the positions that count, for least squares.

        Args:
            into: the anchor that a joint would lead to; what it cannot take is left out.
        """

    @abstractmethod
    def probed(self, state: State, batch: Batch, units: slice = slice(None)) -> Tensor:
        """`(units, width)` what a probe reads of a state."""

    @abstractmethod
    def grids(self, batch: Batch) -> list[tuple[int, int, int]]:
        """(height, width, class tokens) of every state for such a batch, zeros for text: joints lead between equal
        grids, where class tokens may be left out."""

    @abstractmethod
    def joint(self, stop: int, into: Any, start: int, bias: bool = True) -> nn.Module:
        """A stitching layer, of random weights, from state `stop` to state `start` of another anchor."""

    @abstractmethod
    def take(self, state: State) -> State:
        """A state, of any anchor, on this one's device and in its dtype."""

    @staticmethod
    @abstractmethod
    def stacked(states: Sequence[State]) -> State:
        """Several states of one batch as one of a larger batch."""

    @staticmethod
    @abstractmethod
    def split(state: State, count: int) -> list[State]:
        """The states that were stacked."""


def hidden_of(state: Any) -> Tensor:
    """The one tensor of a state."""
    return state if isinstance(state, Tensor) else state.hidden


def check_anchors(anchors: Sequence[Anchor], least: int = 2) -> None:
    """Raise ValueError unless there are so many anchors or more, all different, of the same classes or vocabulary."""
    if len(anchors) < least:
        raise ValueError(f"got {len(anchors)} anchors; expected at least {least}")
    seen: dict[str, str] = {}
    for anchor in anchors:
        if anchor.fingerprint in seen:
            raise ValueError(
                f"got the anchor {anchor.name} twice (as {seen[anchor.fingerprint]}); expected different anchors. "
                "List each one once"
            )
        seen[anchor.fingerprint] = anchor.name
    for anchor in anchors[1:]:
        anchors[0].check_like(anchor)
