"""Routing between two paths against a loop over sequences, with costs of extracted models."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_model, token_ids

from klas_hf import Path, StitchedSupernet, StitchedSupernetForCausalLM, measure_costs
from klas_hf.curves.tradeoff import TradeoffCurve
from klas_hf.serving.routing import route_paths, shared_macs

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer", "ignore:.*do not determine")

PATHS = ["0[:2] 1[4:]", "0[:2] 1[2:]", "1[:2] 1[4:]", "0[:1] 1[1:3] 1[4:]", "0[:1] 1[1:2] 1[3:]"]


@pytest.fixture(scope="module")
def supernet() -> StitchedSupernetForCausalLM:
    anchors = [tiny_model(large=large, seed=1 + large) for large in (False, True)]
    return StitchedSupernet.from_anchors(anchors, PATHS, calibration=[token_ids(16, 12, seed=3)], tokens=10)


def test_the_curve_is_what_a_loop_over_sequences_gives(supernet: StitchedSupernetForCausalLM) -> None:
    ids = token_ids(7, 10, seed=5)
    rows = route_paths(supernet, [{"input_ids": ids, "labels": ids}], PATHS[0], PATHS[1], buckets=1000)
    small, large = (supernet.extract(path) for path in PATHS[:2])
    with torch.no_grad():
        read = []
        for model in (small, large):
            logits = model(ids).logits[:, :-1]
            losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
            read.append((losses.numpy(), logits.softmax(-1).amax(-1).mean(1).numpy()))
    costs = [measure_costs(model, tokens=10).macs for model in (small, large)]
    beginning = shared_macs(supernet, Path.parse(PATHS[0]), Path.parse(PATHS[1]))
    for row in rows:
        sent = read[0][1] < row.setting["threshold"]
        assert row.metrics["loss"] == pytest.approx(float(np.where(sent, read[1][0], read[0][0]).mean()), rel=1e-5)
        assert row.details["sent"] == pytest.approx(sent.mean())
        assert row.macs == pytest.approx(costs[0] + sent.mean() * (costs[1] - beginning), abs=1)
        assert row.rule == "routing" and row.parameters < small.num_parameters() + large.num_parameters()
    assert (rows[0].macs, rows[-1].details["sent"]) == (costs[0], 1.0)
    assert TradeoffCurve(rows, "loss", higher_is_better=False).pareto().macs[0] == costs[0]


@pytest.mark.parametrize(
    ("first", "second", "blocks"),
    [
        (PATHS[0], PATHS[1], [("0", 2)]),
        ("0[:]", PATHS[1], [("0", 2)]),
        ("1[:]", PATHS[2], [("1", 2)]),
        ("0[:]", "1[:]", []),
        (PATHS[2], PATHS[1], []),
        (PATHS[3], PATHS[4], [("0", 1)]),  # each path has a joint of its own there
    ],
)
def test_what_two_paths_do_alike(
    supernet: StitchedSupernetForCausalLM, first: str, second: str, blocks: list[tuple[str, int]]
) -> None:
    """A block's MACs are what the anchor costs with it, less what it costs without."""
    whole = {place: measure_costs(supernet.extract(f"{place}[:]"), tokens=10).macs for place in "01"}
    heads = {place: 10 * supernet.anchors[int(place)].lm_head.weight.numel() for place in "01"}
    depth = {"0": 3, "1": 5}
    expected = sum((whole[place] - heads[place]) // depth[place] * count for place, count in blocks)
    assert shared_macs(supernet, Path.parse(first), Path.parse(second)) == expected


def test_paths_in_the_wrong_order_are_refused(supernet: StitchedSupernetForCausalLM) -> None:
    ids = token_ids(2, 10)
    with pytest.raises(ValueError, match="swap them"):
        route_paths(supernet, [{"input_ids": ids, "labels": ids}], "1[:]", "0[:]")
