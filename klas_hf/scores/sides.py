"""Two anchors as scoring needs them: all that text and images differ in.

States between blocks, the probes' distributions on them, the rows that count, answers, and the rear part fed from
elsewhere.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from klas_hf.anchors.batches import TokenBatch, token_batches
from klas_hf.anchors.decoder_parts import decoder_rear
from klas_hf.anchors.images import ImageBatch, image_batches
from klas_hf.anchors.language import LanguageAnchor, load_anchor
from klas_hf.anchors.vision import VisionAnchor, check_labels, is_vision, load_vision_anchor
from klas_hf.anchors.vision_stitches import rows as image_rows
from klas_hf.anchors.vision_stitches import set_vision_stitch
from klas_hf.anchors.vocabularies import check_vocabularies
from klas_hf.anchors.weights import evaluating
from klas_hf.costs import measure_stitch_costs
from klas_hf.maths.divergences import SLICE
from klas_hf.maths.least_squares import LinearFit
from klas_hf.models.modeling_stitched_vision import StitchingLayer, dropped_prefix
from klas_hf.models.vision_features import Features
from klas_hf.paths import StitchCosts

State = TypeVar("State")
Batch = TypeVar("Batch")


class AnchorPair(ABC, Generic[Batch, State]):
    """Two anchors that are scored together. States are numbered from 0, the embedding's, to the last block's.

    Attributes:
        first, last: source and target.
        widths: of every state of the source and of the target.
        nothing: what there was none of where no batch had anything to score.
    """

    first: Any
    last: Any
    widths: tuple[list[int], list[int]]
    nothing: ClassVar[str]

    @abstractmethod
    def costs(self, batch: Batch | None, tokens: int, positions: tuple[int, int]) -> StitchCosts:
        """What all stitches cost, for text of so many `tokens` or for images of the first batch's size.

        Raises:
            ValueError: no batch of images.
        """

    @abstractmethod
    def read(self, data: Iterable[Any]) -> Iterator[Batch]:
        """Batches as they are given, checked."""

    @abstractmethod
    def states(self, batch: Batch) -> tuple[list[State], list[State]]:
        """What every block of both anchors gives for a batch."""

    @abstractmethod
    def log_probs(
        self, states: tuple[list[State], list[State]], batch: Batch, probes: Sequence[Any]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The probes' log-probabilities, a few units at a time, in memory that the next ones may overwrite.

        Yields:
            `(m, units, classes)` of the source's probes, `(n, units, classes)` of the target's, both fp32, and
            `(units,)` the image or sequence that each unit belongs to.
        """

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

        All states of one call run through the target together, in its dtype, as a stitched model does.
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
    """Two image classifiers; a unit is an image.

    Raises:
        ValueError: other classes, or class tokens that the source lacks.
    """

    nothing = "image to score on"

    def __init__(self, first: VisionAnchor, last: VisionAnchor):
        check_labels(first, last)
        self.first, self.last = first, last
        self.dropped = dropped_prefix(first.kind, last.kind)
        self.widths = tuple([shape.channels for shape in one.shapes()] for one in (first, last))  # type: ignore

    def costs(self, batch: ImageBatch | None, tokens: int, positions: tuple[int, int]) -> StitchCosts:
        if batch is None:
            raise ValueError(
                "got no images to score on; expected batches. Check that an iterator was not used up before"
            )
        height, width = batch.pixel_values.shape[-2:]
        return measure_stitch_costs(
            self.first.config, self.last.config, image_size=(height, width), positions=positions
        )

    def read(self, data: Iterable[Any]) -> Iterator[ImageBatch]:
        return image_batches(data)

    def states(self, batch: ImageBatch) -> tuple[list[Features], list[Features]]:
        return self.first.features(batch.pixel_values), self.last.features(batch.pixel_values)

    def log_probs(
        self, states: tuple[list[Features], list[Features]], batch: ImageBatch, probes: Sequence[Any]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        log_p, log_q = (probe.log_probs(pooled) for probe, pooled in zip(probes, self.pooled(states), strict=True))
        yield log_p, log_q, self.unit_items(batch)

    def pooled(self, states: tuple[list[Features], list[Features]]) -> list[list[Tensor]]:
        """`(images, width)` of every block of both anchors, fp32, on the source's device."""
        return [
            [anchor.kind.pooled(one).float().to(self.first.device) for one in found[1:]]
            for anchor, found in zip((self.first, self.last), states, strict=True)
        ]

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
        moved = [self._move(one, fit) for one, fit in zip(states, fits, strict=True)]
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

    def _move(self, features: Features, fit: LinearFit) -> Features:
        dtype = self.last.model.dtype
        layer = StitchingLayer(self.first.kind, self.last.kind, fit.weight.shape[1], fit.weight.shape[0])
        layer.to(device=self.first.device, dtype=dtype)
        set_vision_stitch(layer, fit)
        return layer(features._replace(hidden=features.hidden.to(dtype)))


class DecoderPair(AnchorPair[TokenBatch, Tensor]):
    """Two causal language models; a unit is a token that is neither padding nor BOS.

    Args:
        first, last: source and target.
        workspace_bytes: memory for the probes' distributions.

    Raises:
        ValueError: other vocabularies.
    """

    nothing = "token to score that is neither padding nor BOS"

    def __init__(self, first: LanguageAnchor, last: LanguageAnchor, workspace_bytes: int):
        check_vocabularies(first.path, first.config, last.path, last.config)
        self.first, self.last = first, last
        self.widths = ([first.width] * (first.num_blocks + 1), [last.width] * (last.num_blocks + 1))
        self._rears: dict[int, PreTrainedModel] = {}
        m, n, vocabulary = first.num_blocks, last.num_blocks, last.config.vocab_size
        # Alive at once: log-probabilities of both, and the logits of one or two slices for the divergences.
        either = (max(m, n) + 1) * max(vocabulary, 2 * min(SLICE, vocabulary))
        self.chunk = max(1, workspace_bytes // (4 * (vocabulary * (m + n) + either)))
        self._log_probs: tuple[Tensor, ...] = ()

    def costs(self, batch: TokenBatch | None, tokens: int, positions: tuple[int, int]) -> StitchCosts:
        return measure_stitch_costs(self.first.config, self.last.config, tokens=tokens)

    def read(self, data: Iterable[Any]) -> Iterator[TokenBatch]:
        return token_batches(data)

    def states(self, batch: TokenBatch) -> tuple[list[Tensor], list[Tensor]]:
        # The embedding's place stays empty: only blocks' outputs are stitched here.
        found = (self.first.hidden_states(batch), self.last.hidden_states(batch))
        return [found[0][0][:0], *found[0]], [found[1][0][:0], *found[1]]

    def log_probs(
        self, states: tuple[list[Tensor], list[Tensor]], batch: TokenBatch, probes: Sequence[Any]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        places = self._counted(batch).nonzero()
        for part in places.split(self.chunk):
            found = self._workspace(len(part))
            for probe, anchor, hidden, out in zip(probes, (self.first, self.last), states, found, strict=True):
                sequence, token = part.to(hidden[1].device).unbind(1)
                taken = torch.stack([one[sequence.to(one.device), token.to(one.device)].to(anchor.device)
                                     for one in hidden[1:]])  # fmt: skip
                probe.log_probs(anchor, taken, out=out)
            yield *found, part[:, 0]  # a part may hold the end of one sequence and the start of others

    def _workspace(self, tokens: int) -> tuple[Tensor, ...]:
        """Where the log-probabilities of so many tokens go, the same memory for every part."""
        if not self._log_probs or self._log_probs[0].shape[1] < tokens:
            self._log_probs = ()  # let go before taking more
            self._log_probs = tuple(
                torch.empty(anchor.num_blocks, tokens, self.last.config.vocab_size, device=self.first.device)
                for anchor in (self.first, self.last)
            )
        return tuple(log_probs[:, :tokens] for log_probs in self._log_probs)

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
        hidden = hidden.to(self.last.model.dtype)
        weight, bias = fit.weight.to(hidden), fit.bias.to(hidden)
        return torch.nn.functional.linear(hidden, weight, bias).to(self.last.device)


def check_different(source: Any, target: Any) -> None:
    """Raise ValueError where two anchors are one by their names, or one model; nothing is loaded."""
    named = all(isinstance(one, str | Path) for one in (source, target))
    if source is target or (named and Path(source) == Path(target)):
        raise ValueError(f"got the anchor {source if named else type(source).__name__} {_ONE_ANCHOR}")


def load_pair(source: Any, target: Any, workspace_bytes: int) -> AnchorPair:
    """Both anchors, loaded where they are not.

    Raises:
        ValueError: the same anchor twice, an unknown family, other classes or vocabularies.
    """
    pair: AnchorPair
    if is_vision(source):
        pair = ClassifierPair(load_vision_anchor(source), load_vision_anchor(target))
    else:
        pair = DecoderPair(load_anchor(source), load_anchor(target), workspace_bytes)
    if pair.first.fingerprint == pair.last.fingerprint:
        raise ValueError(f"got the anchor {pair.last.name} {_ONE_ANCHOR}")
    return pair


_ONE_ANCHOR = "as source and as target; expected two different anchors, the cheaper one as the source"
