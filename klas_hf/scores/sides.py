"""Anchors as functional scoring needs them: states between blocks, answers, and the rear part fed from elsewhere."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from klas_hf.anchors.batches import TokenBatch, token_batches
from klas_hf.anchors.decoder_parts import decoder_rear
from klas_hf.anchors.images import ImageBatch, image_batches
from klas_hf.anchors.language import LanguageAnchor
from klas_hf.anchors.vision import VisionAnchor
from klas_hf.anchors.vision_stitches import rows as image_rows
from klas_hf.anchors.vision_stitches import set_vision_stitch
from klas_hf.anchors.weights import evaluating
from klas_hf.maths.least_squares import LinearFit
from klas_hf.models.modeling_stitched_vision import StitchingLayer, dropped_prefix
from klas_hf.models.vision_features import Features

State = TypeVar("State")
Batch = TypeVar("Batch")


class AnchorPair(ABC, Generic[Batch, State]):
    """Two anchors that are stitched on trial. States are numbered from 0, the embedding's, to the last block's.

    Attributes:
        widths: of every state of the source and of the target.
        dtype: of the source's states.
    """

    widths: tuple[list[int], list[int]]
    dtype: torch.dtype

    @abstractmethod
    def read(self, data: Iterable[Any]) -> Iterator[Batch]:
        """Batches as they are given, checked."""

    @abstractmethod
    def states(self, batch: Batch) -> tuple[list[State], list[State]]:
        """What every block of both anchors gives for a batch."""

    @abstractmethod
    def rows(self, states: tuple[list[State], list[State]], batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """`(rows, width)` of every state at the positions that count, for least squares."""

    @abstractmethod
    def answer(self, last: State, batch: Batch) -> Tensor:
        """The target's logits `(units, classes)` from its last block's state, at the positions that count."""

    @abstractmethod
    def stitched_answers(
        self, states: Sequence[State], fits: Sequence[LinearFit], start: int, batch: Batch
    ) -> Iterator[Tensor]:
        """Logits `(units, classes)` for each source state, mapped by its fit into `target.blocks[start:]`.

        All states of one call run through the target together.
        """

    @abstractmethod
    def labels(self, batch: Batch) -> Tensor | None:
        """`(units,)` true classes, -1 where a unit has none; None where the data have none."""

    @abstractmethod
    def unit_items(self, batch: Batch) -> Tensor:
        """`(units,)` the image or sequence that each unit belongs to, for standard errors."""

    @abstractmethod
    def items(self, batch: Batch) -> int:
        """Number of images or sequences."""


class ClassifierPair(AnchorPair[ImageBatch, Features]):
    """Two image classifiers; a unit is an image."""

    def __init__(self, first: VisionAnchor, last: VisionAnchor):
        self.first, self.last = first, last
        self.dtype = first.model.dtype
        self.dropped = dropped_prefix(first.kind, last.kind)
        self.widths = tuple([shape.channels for shape in one.shapes()] for one in (first, last))  # type: ignore

    def read(self, data: Iterable[Any]) -> Iterator[ImageBatch]:
        return image_batches(data)

    def states(self, batch: ImageBatch) -> tuple[list[Features], list[Features]]:
        return self.first.features(batch.pixel_values), self.last.features(batch.pixel_values)

    def rows(
        self, states: tuple[list[Features], list[Features]], batch: ImageBatch
    ) -> tuple[list[Tensor], list[Tensor]]:
        device = self.first.device
        return (
            [image_rows(one, self.first.kind, self.dropped) for one in states[0]],
            [image_rows(one, self.last.kind).to(device) for one in states[1]],
        )

    def answer(self, last: Features, batch: ImageBatch) -> Tensor:
        return self.last.logits(last)

    def stitched_answers(
        self, states: Sequence[Features], fits: Sequence[LinearFit], start: int, batch: ImageBatch
    ) -> Iterator[Tensor]:
        moved = [self._layer(fit)(one) for one, fit in zip(states, fits, strict=True)]
        features = moved[0]._replace(hidden=torch.cat([one.hidden.to(self.last.device) for one in moved]))
        with evaluating(self.last.model):
            for block in self.last.blocks[start:]:
                features = self.last.kind.run_block(self.last.model, block, features)
        yield from self.last.logits(features).chunk(len(states))

    def labels(self, batch: ImageBatch) -> Tensor | None:
        return batch.labels

    def unit_items(self, batch: ImageBatch) -> Tensor:
        return torch.arange(len(batch))

    def items(self, batch: ImageBatch) -> int:
        return len(batch)

    def _layer(self, fit: LinearFit) -> StitchingLayer:
        layer = StitchingLayer(self.first.kind, self.last.kind, fit.weight.shape[1], fit.weight.shape[0])
        layer.to(device=self.first.device, dtype=self.first.model.dtype)
        set_vision_stitch(layer, fit)
        return layer


class DecoderPair(AnchorPair[TokenBatch, Tensor]):
    """Two causal language models; a unit is a token that is neither padding nor BOS."""

    def __init__(self, first: LanguageAnchor, last: LanguageAnchor):
        self.first, self.last, self.dtype = first, last, first.model.dtype
        self.widths = ([first.width] * (first.num_blocks + 1), [last.width] * (last.num_blocks + 1))
        self._rears: dict[int, PreTrainedModel] = {}

    def read(self, data: Iterable[Any]) -> Iterator[TokenBatch]:
        return token_batches(data)

    def states(self, batch: TokenBatch) -> tuple[list[Tensor], list[Tensor]]:
        # The embedding's place stays empty: only blocks' outputs are stitched here.
        found = (self.first.hidden_states(batch), self.last.hidden_states(batch))
        return [found[0][0][:0], *found[0]], [found[1][0][:0], *found[1]]

    def rows(self, states: tuple[list[Tensor], list[Tensor]], batch: TokenBatch) -> tuple[list[Tensor], list[Tensor]]:
        device, counted = self.first.device, self._counted(batch)

        def one_side(hidden: list[Tensor]) -> list[Tensor]:
            return [hidden[0][:, 0], *(h[counted.to(h.device)].to(device) for h in hidden[1:])]

        return one_side(states[0]), one_side(states[1])

    def answer(self, last: Tensor, batch: TokenBatch) -> Tensor:
        return self.last.logits(last[self._counted(batch).to(last.device)])

    def stitched_answers(
        self, states: Sequence[Tensor], fits: Sequence[LinearFit], start: int, batch: TokenBatch
    ) -> Iterator[Tensor]:
        moved = torch.cat([self._move(one, fit) for one, fit in zip(states, fits, strict=True)])
        mask = batch.attention_mask.to(moved.device).repeat(len(states), 1)
        rear = self._rear(start)
        with evaluating(rear):
            hidden = rear(inputs_embeds=moved, attention_mask=mask, use_cache=False).last_hidden_state
        counted = self._counted(batch).to(hidden.device)
        for one in hidden.chunk(len(states)):
            yield self.last.head(one[counted])

    def labels(self, batch: TokenBatch) -> Tensor | None:
        following = torch.full_like(batch.input_ids, -1)
        known = batch.attention_mask[:, 1:].bool()
        following[:, :-1] = torch.where(known, batch.input_ids[:, 1:], -1)
        return following[self._counted(batch)]

    def unit_items(self, batch: TokenBatch) -> Tensor:
        return self._counted(batch).nonzero()[:, 0]

    def items(self, batch: TokenBatch) -> int:
        return len(batch.input_ids)

    def _counted(self, batch: TokenBatch) -> Tensor:
        return batch.counted(self.last.config.bos_token_id).cpu()

    def _rear(self, start: int) -> PreTrainedModel:
        if start not in self._rears:
            self._rears = {start: decoder_rear(self.last, start)}  # it shares the anchor's weights
        return self._rears[start]

    def _move(self, hidden: Tensor, fit: LinearFit) -> Tensor:
        weight, bias = fit.weight.to(hidden), fit.bias.to(hidden)
        return torch.nn.functional.linear(hidden, weight, bias).to(self.last.device)
