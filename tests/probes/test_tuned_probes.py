"""Tuned probes (the tuned lens): they come closer to the anchor's output than what they start from."""

import copy
import math

import pytest
import torch
from tiny_models import tiny_model, token_ids
from torch.distributions import Categorical, kl_divergence

from klas_hf import ProbeConfig, ProbeNet, train_probes
from klas_hf.anchors import LanguageAnchor, TokenBatch

TRAIN = [{"input_ids": token_ids(16, 20, seed=seed)} for seed in range(8)]


def distance_to_output(probes: ProbeNet, anchor: LanguageAnchor, batches: list[dict]) -> torch.Tensor:
    """Mean KL from the anchor's own distribution to each probe's, in nats: `(blocks,)`."""
    sums, count = torch.zeros(anchor.num_blocks), 0
    for batch in batches:
        ids = batch["input_ids"]
        with torch.no_grad():
            hidden = anchor.states(TokenBatch(ids, torch.ones_like(ids)))[1:]
            own = Categorical(logits=anchor.model(ids).logits[:, 1:].flatten(0, 1))
            stacked = torch.stack([h[:, 1:].flatten(0, 1) for h in hidden])
            for block, log_q in enumerate(probes.log_probs(stacked, anchor)):
                sums[block] += kl_divergence(own, Categorical(logits=log_q)).sum()
        count += ids[:, 1:].numel()
    return sums / count


@pytest.mark.parametrize("start", ["ridge", "zero"])
def test_tuning_lowers_the_divergence(start: str) -> None:
    model = tiny_model(seed=3)
    anchor, before = LanguageAnchor(model), copy.deepcopy(model)
    begun = train_probes(model, TRAIN, ProbeConfig(kind="ridge" if start == "ridge" else "logit"))
    tuned = train_probes(model, TRAIN, ProbeConfig(kind="tuned", tuned_start=start, epochs=12, learning_rate=3e-3))
    first, last = (distance_to_output(probes, anchor, TRAIN) for probes in (begun, tuned))
    assert (last[:-1] < 0.9 * first[:-1]).all(), (first, last)
    assert last[-1] == pytest.approx(0, abs=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_cross_entropy_tuning_learns_the_next_token() -> None:
    # Each token's next one is fixed, so a probe of the first block can learn it from the embedding.
    rows = torch.arange(3, 63).repeat(8, 1)
    shifts = torch.randint(0, 60, (8, 1), generator=torch.Generator().manual_seed(1))
    ids = (rows - 3 + shifts) % 60 + 3
    model = tiny_model(seed=3)
    anchor = LanguageAnchor(model)

    def next_token_loss(probes: ProbeNet) -> float:
        with torch.no_grad():
            hidden = anchor.states(TokenBatch(ids, torch.ones_like(ids)))[1][:, :-1].flatten(0, 1)
            log_q = anchor.logits(probes.translate(0, hidden)).log_softmax(-1)
        return float(-log_q.gather(1, ids[:, 1:].reshape(-1, 1)).mean())

    config = ProbeConfig(kind="tuned", tuned_loss="ce", tuned_start="zero", epochs=60, learning_rate=1e-2)
    tuned = train_probes(model, [{"input_ids": ids}], config)
    untuned = train_probes(model, [{"input_ids": ids}], ProbeConfig(kind="logit"))
    assert next_token_loss(tuned) < math.log(60) < next_token_loss(untuned)  # 60 tokens, all as frequent
