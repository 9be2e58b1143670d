"""Paths of a supernet as drafts: against extracted models, and a loop that drafts and checks token by token."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import left_padded, tiny_model, token_ids
from torch import Tensor

from klas_hf import Path, StitchedSupernet, StitchedSupernetForCausalLM, Usage
from klas_hf.evaluation.drafting import Draft, draft_table, measure_draft, score_drafts
from klas_hf.maths.drafting import speed_up

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer", "ignore:.*do not determine")

PATHS = ["0[:2] 1[2:]", "1[:3] 1[4:]"]


@pytest.fixture(scope="module")
def supernet() -> StitchedSupernetForCausalLM:
    anchors = [tiny_model(large=large, seed=1 + large) for large in (False, True)]
    for anchor in anchors:
        anchor.generation_config.eos_token_id = None
        with torch.no_grad():  # heads that say nearly nothing, so that drafts are taken now and then
            anchor.get_output_embeddings().weight.mul_(0.15)
    return StitchedSupernet.from_anchors(anchors, PATHS, calibration=[token_ids(16, 12, seed=3)]).double()


def test_acceptance_is_that_of_the_extracted_models(supernet: StitchedSupernetForCausalLM) -> None:
    batches = [left_padded(token_ids(3, 10, seed=7), [10, 6, 8]), {"input_ids": token_ids(2, 9, seed=8)}]
    drafts = {str(one.path): one for one in score_drafts(supernet, batches, target="1[:]")}
    assert set(drafts) == {"0[:]", *PATHS}
    macs = {str(path): cost.macs for path, cost in zip(supernet.paths, supernet.path_costs, strict=True)}
    with torch.no_grad():
        for path, draft in drafts.items():
            overlap, agree = [], []
            for batch in batches:
                given = {"attention_mask": torch.ones_like(batch["input_ids"])} | batch
                p, q = (supernet.extract(one)(**given).logits.softmax(-1) for one in ("1[:]", path))
                real = given["attention_mask"].bool()
                kept = real & (real.cumsum(1) != 1)  # neither padding nor where attention sinks
                overlap += torch.minimum(p, q).sum(-1)[kept].tolist()
                agree += (p.argmax(-1) == q.argmax(-1))[kept].tolist()
            assert draft.sampled == pytest.approx(np.mean(overlap), abs=1e-6)
            assert draft.greedy == pytest.approx(np.mean(agree))
            assert draft.cost_ratio == macs[path] / macs["1[:]"]
            assert 0 < draft.error < 0.2
    assert score_drafts(supernet, batches, target="0[:]")[0].path != Path.parse("0[:]")


@torch.no_grad()
def by_hand(
    supernet: StitchedSupernetForCausalLM, path: str, ids: Tensor, drafted: int, tokens: int
) -> tuple[int, int]:
    """Greedy speculative decoding without a cache: tokens taken, and refused, but for those of the last run."""
    target, draft = supernet.extract("1[:]"), supernet.extract(path)
    taken = refused = 0
    length = ids.shape[1] + tokens
    while ids.shape[1] < length:
        guess = ids
        for _ in range(min(drafted, length - ids.shape[1] - 1)):
            guess = torch.cat([guess, draft(guess).logits[:, -1:].argmax(-1)], 1)
        own = target(guess).logits.argmax(-1)
        count = 0
        while (
            ids.shape[1] + count < guess.shape[1] and guess[0, ids.shape[1] + count] == own[0, ids.shape[1] + count - 1]
        ):
            count += 1
        stopped = ids.shape[1] + count < guess.shape[1]
        ids = torch.cat([guess[:, : ids.shape[1] + count], own[:, ids.shape[1] + count - 1, None]], 1)
        taken, refused = taken + count, refused + (stopped and ids.shape[1] < length)
    return taken, refused


@pytest.mark.parametrize("path", [PATHS[0], pytest.param(PATHS[1], marks=pytest.mark.slow)])
def test_what_is_measured_is_what_a_loop_counts(supernet: StitchedSupernetForCausalLM, path: str) -> None:
    prompts = token_ids(3, 6, seed=9)
    draft = Draft(Path.parse(path), 0.5, 0.1, 0.5, 0.5)
    found = measure_draft(supernet, draft, prompts.tolist(), target="1[:]", drafted=3, tokens=20)
    counts = np.array([by_hand(supernet, path, prompt[None], 3, 20) for prompt in prompts]).sum(0)
    assert counts.min() > 0
    assert found.measured == counts[0] / counts.sum()
    settings: Any = supernet.path_model(path).generation_config
    assert settings.num_assistant_tokens != 3  # as it was


def test_what_cannot_be_compared_is_refused(supernet: StitchedSupernetForCausalLM) -> None:
    draft = Draft(Path.parse(PATHS[0]), 0.5, 0.1, 0.5, 0.5)
    assert 0 <= measure_draft(supernet, draft, [[5, 6, 7]], target="1[:]", tokens=12, sampling=True).measured <= 1
    with pytest.raises(ValueError, match="no token was drafted"):
        measure_draft(supernet, draft, [], target="1[:]")
    with pytest.raises(ValueError, match=r"got 0\[:2\] 1\[2:\] as draft and target; expected two paths"):
        measure_draft(supernet, draft, [[5, 6, 7]], target=PATHS[0])
    with pytest.raises(ValueError, match="got no tokens to compare drafts on"):
        score_drafts(supernet, [{"input_ids": token_ids(1, 1)}])


def test_seconds_count_where_they_are_known(
    supernet: StitchedSupernetForCausalLM, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    usage = Usage(prompt=4)
    found = score_drafts(supernet, [{"input_ids": token_ids(2, 9)}], target="1[:]", usage=usage)
    for draft in found:
        costs, _ = supernet.kept_costs[usage]
        assert draft.cost_ratio == costs[draft.path].latency / costs[Path.parse("1[:]")].latency
        assert len(draft.checking) == 9 and draft.checking[0] == 1 and min(draft.checking) > 0
        assert draft.speed_up() == max(speed_up(draft.greedy, draft.cost_ratio, n, draft.checking[n]) for n in range(9))
    assert [one.speed_up() for one in found] == sorted((one.speed_up() for one in found), reverse=True)
    assert draft_table(found).count("\n") == 1 + len(found)
