"""Batches of token ids, and which of their tokens count in a fit or an average."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """Whole sequences of token ids.

    Attributes:
        input_ids: `(batch, tokens)`.
        attention_mask: `(batch, tokens)`, 1 at tokens and 0 at padding.
    """

    input_ids: Tensor
    attention_mask: Tensor

    def counted(self, bos_token_id: int | None) -> Tensor:
        """`(batch, tokens)` bool: tokens that count in fits and averages.

        Padding does not, nor does BOS, nor the first token of a sequence where a model has no BOS: attention sinks
        there, and its activations are unlike all others.
        """
        present = self.attention_mask.bool()
        first = present & (present.cumsum(1) == 1)
        counted = present & ~first
        return counted if bos_token_id is None else counted & (self.input_ids != bos_token_id)

    def to(self, device: torch.device | str) -> "TokenBatch":
        return TokenBatch(self.input_ids.to(device), self.attention_mask.to(device))


def token_batches(data: Iterable[Any]) -> Iterator[TokenBatch]:
    """Read batches: mappings with `input_ids` and perhaps `attention_mask`, or plain tensors of ids.

    Raises:
        TypeError, ValueError: a batch is of neither form, or is not `(batch, tokens)`.
    """
    for batch in data:
        if isinstance(batch, TokenBatch):
            yield batch
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
        yield TokenBatch(input_ids, mask)
