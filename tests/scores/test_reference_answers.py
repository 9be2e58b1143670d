"""Divergences from a reference's answers: as torch.distributions has them, formed a few tokens at a time."""

from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, left_padded, tiny_model, token_ids
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from klas_hf.anchors.batches import token_batches
from klas_hf.anchors.language import LanguageAnchor
from klas_hf.scores.answers import ALIVE, Reference


class Watched(LanguageAnchor):
    """Remembers for how many tokens its head has answered at once."""

    most = calls = 0

    def answers(self, state: Tensor, batch: Any, units: slice = slice(None)) -> Tensor:
        found = super().answers(state, batch, units)
        self.most, self.calls = max(self.most, len(found)), self.calls + 1
        return found


@pytest.mark.parametrize("tokens, at_once, again", [(1, 1, 18), (4, 4, 5), (7, 7, 3), (13, 10, 0), (1000, 18, 0)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_memory_bounds_what_is_formed_at_once_and_changes_nothing(
    tokens: int, at_once: int, again: int, temperature: float
) -> None:
    """`again`: calls of the reference's head for every comparison, none where its answers to all are kept."""
    anchors = [Watched(tiny_model(seed=1)), Watched(tiny_model(large=True, seed=2))]
    (batch,) = token_batches([left_padded(token_ids(3, 9), [9, 5, 7])], bos_token_id=1)
    last = [anchor.states(batch)[-1] for anchor in anchors]
    reference = Reference(anchors[1], last[1], batch, temperature, 4 * ALIVE * VOCABULARY * tokens)
    labels = batch.unit_labels
    terms, picked = reference.compare([(anchors[0], last[0]), (anchors[1], last[1])], labels)
    assert len(labels) == 18 and {anchor.most for anchor in anchors} == {at_once}
    logits = [
        anchor.model(batch.input_ids, attention_mask=batch.attention_mask).logits[batch.counted] for anchor in anchors
    ]
    p, q = (Categorical(logits=one / temperature) for one in (logits[1], logits[0]))
    torch.testing.assert_close(terms[0], kl_divergence(p, q), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms[1], torch.zeros(len(labels)), rtol=0, atol=1e-6)
    for mine, one in zip(picked, logits, strict=True):
        expected = Categorical(logits=one).log_prob(labels.clamp_min(0))
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    before = anchors[1].calls
    assert reference.compare([(anchors[0], last[0])])[1] is None
    assert anchors[1].calls - before == again
