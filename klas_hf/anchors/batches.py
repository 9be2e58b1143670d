"""Batches of token ids, and which of their tokens count in a fit or an average."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """Whole sequences of token ids; a unit is a token that counts.

    Attributes:
        input_ids: `(batch, tokens)`.
        attention_mask: `(batch, tokens)`, 1 at tokens and 0 at padding.
        bos_token_id: of the model that reads them, where it has one.
    """

    input_ids: Tensor
    attention_mask: Tensor
    bos_token_id: int | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @cached_property
    def counted(self) -> Tensor:
        """`(batch, tokens)` bool on the CPU: tokens that count in fits and averages.

        Padding does not, nor does BOS, nor the first token of a sequence where a model has no BOS: attention sinks
        there, and its activations are unlike all others.
        """
        present = self.attention_mask.bool().cpu()
        counted = present & (present.cumsum(1) != 1)
        return counted if self.bos_token_id is None else counted & (self.input_ids.cpu() != self.bos_token_id)

    @cached_property
    def unit_items(self) -> Tensor:
        """`(units,)` the sequence that each unit belongs to, for standard errors."""
        return self.counted.nonzero()[:, 0]

    @cached_property
    def unit_labels(self) -> Tensor:
        """`(units,)` the token that follows each unit, -1 where none does."""
        following = torch.full(self.input_ids.shape, -1)
        known = self.attention_mask[:, 1:].bool()
        following[:, :-1] = torch.where(known, self.input_ids[:, 1:], -1).cpu()
        return following[self.counted]

    @property
    def fewest_rows(self) -> int:
        """How many rows of any state there are at least, for least squares."""
        return len(self.unit_items)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a causal language model's forward takes."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def check(self, vocabulary: int | None) -> None:
        """Raise TypeError unless the ids are whole numbers, ValueError unless a model of so many ids knows them."""
        if self.input_ids.is_floating_point():
            raise TypeError(f"got input_ids of {self.input_ids.dtype}; expected whole numbers: token ids")
        if vocabulary is not None and self.input_ids.numel():
            lowest, highest = self.input_ids.aminmax()
            check_ids(int(lowest), int(highest), vocabulary)

    def to(self, device: torch.device | str) -> "TokenBatch":
        """The same on a device."""
        return replace(self, input_ids=self.input_ids.to(device), attention_mask=self.attention_mask.to(device))


def token_batches(
    data: Iterable[Any], bos_token_id: int | None = None, vocabulary: int | None = None
) -> Iterator[TokenBatch]:
    """Read batches: mappings with `input_ids` and perhaps `attention_mask`, or plain tensors of ids.

    Args:
        bos_token_id: of the model that reads them.
        vocabulary: how many ids that model knows; None: not known here.

    Raises:
        TypeError, ValueError: a batch is of neither form, is not `(batch, tokens)`, or holds no ids of the model.
    """
    for batch in data:
        if isinstance(batch, TokenBatch):
            batch.check(vocabulary)
            yield batch if bos_token_id is None else replace(batch, bos_token_id=bos_token_id)
            continue
        if not isinstance(batch, Tensor | Mapping):
            raise TypeError(
                f"got a batch of type {type(batch).__name__}; expected a mapping with 'input_ids' of shape "
                "(batch, tokens), as a tokenizer returns with return_tensors='pt', or a tensor of ids"
            )
        fields = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        if "input_ids" not in fields:
            raise ValueError(f"got a batch with the fields {sorted(fields)}; expected 'input_ids' among them")
        input_ids = torch.as_tensor(fields["input_ids"])
        mask = fields.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else torch.as_tensor(mask)
        if input_ids.ndim != 2 or mask.shape != input_ids.shape:
            raise ValueError(
                f"got input_ids of shape {tuple(input_ids.shape)} and attention_mask of shape {tuple(mask.shape)}; "
                "expected both as (batch, tokens)"
            )
        read = TokenBatch(input_ids, mask, bos_token_id)
        read.check(vocabulary)
        yield read


def check_ids(lowest: int, highest: int, vocabulary: int) -> None:
    """Raise ValueError for token ids that a model of so many does not have."""
    if lowest < 0 or highest >= vocabulary:
        raise ValueError(
            f"got the token id {lowest if lowest < 0 else highest} for a model with a vocabulary of {vocabulary}; "
            f"expected ids from 0 to {vocabulary - 1}: use the tokenizer that the model was trained with"
        )
