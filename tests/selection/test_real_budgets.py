"""Budgets in seconds, bytes and rates, one or several: read, met by a search, refused with what is nearest."""

from dataclasses import replace
from pathlib import Path as Folder
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from tiny_models import tiny_config, tiny_model, token_ids

from klas_hf import (
    Path,
    PathScores,
    SearchConfig,
    Stitch,
    StitchedModel,
    StitchScores,
    Usage,
    measure_stitch_costs,
    search_paths,
    select_stitches,
)
from klas_hf.budgets import Budget, Cost

QUICK = SearchConfig(buckets=4, beam=1, joints=1)
PATHS = ("0[:]", "0[:1] 1[2:]", "1[:1] 1[2:]", "1[:]")


@pytest.mark.parametrize(
    ("budget", "limits"),
    [
        ("20 ms", {"latency": 0.02}),
        ("1.5 s per token", {"latency": 1.5}),
        ("300ms to the first token", {"seconds": 0.3}),
        ("40 tokens/s", {"per_second": 40}),
        ("120 images per second", {"per_second": 120}),
        ("96 KiB per token", {"kv_bytes_per_token": 96 * 1024}),
        ("1 GB of activations", {"peak_bytes": 10**9}),
        ("4 GB, 20 ms", {"weight_bytes": 4 * 10**9, "latency": 0.02}),
        (
            "60% and 4 GB of weights and 300 ms to first token",
            {"share": 0.6, "weight_bytes": 4 * 10**9, "seconds": 0.3},
        ),
    ],
)
def test_budgets_are_read(budget: str, limits: dict[str, Any]) -> None:
    found = Budget.of(budget)
    assert {name: pytest.approx(value) for name, value in limits.items()} == {
        name: value for name, value in vars(found).items() if value is not None and name != "text"
    }
    assert found.text == budget
    assert found.timed == any(name in ("seconds", "latency", "per_second", "peak_bytes") for name in limits)


@pytest.mark.parametrize(
    ("budget", "cost"),
    [
        ("20 ms, 4 GB", "latency"),
        ("4 GB and 20 ms", "weight_bytes"),
        ("40 tokens/s, 60%", "latency"),
        ("60%, 40 tokens/s", "macs"),
        ("1 GB of activations", "peak_bytes"),
        (0.5, "macs"),
        (Cost(macs=1_000_000, parameters=9), "macs"),
    ],
)
def test_what_a_budget_names_first(budget: str | float | Cost, cost: str) -> None:
    assert Budget.of(budget).cost == cost


def test_limits_that_are_given_by_name_have_a_first_cost_too() -> None:
    assert Budget(parameters=5, weight_bytes=20).cost == "parameters" and Budget(share=0.5, latency=0.02).cost == "macs"


@pytest.mark.parametrize("budget", ["20 ms per mile", "4 GB,", "4 GB, 5 GB", "0 ms", "40 tokens", "60% per token"])
def test_budgets_that_mean_nothing_are_refused(budget: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        Budget.of(budget)


def scores(**changes: Any) -> PathScores:
    """Of four paths: each takes 1, 2, 3 and 4 of everything, and says more the more it takes."""
    costs = [
        Cost(
            macs=100 * n, parameters=10 * n, kv_bytes_per_token=n, weight_bytes=40 * n, seconds=float(n),
            token_seconds=n / 10, peak_bytes=1000 * n, batch=2,
        )
        for n in (1, 2, 3, 4)
    ]  # fmt: skip
    paths = tuple(map(Path.parse, PATHS))
    found = PathScores(paths, np.array([4.0, 3, 2, 0]), np.zeros(4), tuple(costs), ("small", "large"), 4)
    return replace(found, costs=tuple(replace(cost, **changes) for cost in costs)) if changes else found


@pytest.mark.parametrize(
    ("budget", "place"),
    [
        ("300 ms", 2),
        ("299 ms", 1),
        ("2 s to the first token", 1),
        ("10 tokens/s", 1),
        ("3.5 KB of activations", 2),
        ("80%, 200 ms", 1),
        ("0.125 KB, 3.5 s", 2),
        ("60%, 0.05 KB, 3.5 s", 0),
    ],
)
def test_the_best_path_within_all_limits(budget: str, place: int) -> None:
    assert str(scores().best(budget)) == PATHS[place]


def test_what_no_path_meets_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"below what any path.*The nearest: 25\.0%.*100 ms.*2\.00 times the budget"):
        scores().best("50 ms")
    with pytest.raises(ValueError, match="above the dearest anchor itself"):
        scores().best("500 ms, 2B")
    with pytest.raises(ValueError, match="not measured on a device; expected a search with usage"):
        scores(seconds=None, token_seconds=None).best("20 ms")


def test_the_curve_can_be_drawn_over_any_cost(tmp_path: Folder) -> None:
    found = scores()
    other = replace(found, costs=tuple(replace(cost, token_seconds=1 / cost.macs) for cost in found.costs))
    assert other.pareto() == found.paths and other.pareto("latency") == found.paths[-1:]
    for over, unit in (("latency", 1e-3), ("peak_bytes", 1e6), ("weight_bytes", 1e6)):  # milliseconds, MB
        figure = other.plot(tmp_path / over, over=over)
        drawn = [float(x) for line in figure.axes[0].lines for x in line.get_xdata()]
        assert all(pytest.approx(getattr(cost, over) / unit) in drawn for cost in other.costs)
    with pytest.raises(ValueError, match="got the cost 'joy'; expected one of"):
        found.pareto("joy")
    with pytest.raises(ValueError, match="was not measured; expected a search with usage"):
        scores(peak_bytes=None).plot(over="peak_bytes")
    assert scores(weight_bytes=0).pareto("weight_bytes") == found.paths  # then as many as the dtype has


def test_stitches_may_be_kept_within_a_budget() -> None:
    """Of those that the rule keeps: of equal scores, the best of the dearest bucket may be too slow."""
    costs = measure_stitch_costs(tiny_config("llama"), tiny_config("llama", large=True))
    cross, capacity = np.ones((3, 5)), np.ones(4)
    given = StitchScores("klas", cross, capacity, cross, capacity, cross[:, :-1], sequences=1, tokens=1, costs=costs)
    every = select_stitches(given, buckets=3)
    kept = select_stitches(given, buckets=3, budget="60%")
    assert list(kept) == [one for one in every if costs.of(one)[0] <= 0.6 * costs.target_total]
    assert 0 < len(kept) < len(every)

    def seconds(stitch: Stitch) -> Cost:
        return Cost(*costs.of(stitch), seconds=1.0, token_seconds=stitch.target_start / 10, peak_bytes=1)

    kept = select_stitches(given, buckets=3, budget="250 ms", costs=seconds)
    assert list(kept) == [one for one in every if one.target_start <= 2]
    assert list(select_stitches([given], buckets=3, budget="250 ms", costs=seconds)) == list(kept)
    with pytest.raises(ValueError, match="none of the .* stitches kept is within.*the nearest takes"):
        select_stitches(given, buckets=3, budget="1 ms", costs=seconds)
    with pytest.raises(ValueError, match="count no cached bytes; expected costs=measure_path_costs"):
        select_stitches(given, buckets=3, budget="1 KB per token")
    kept = select_stitches(
        given,
        buckets=3,
        budget="0.2 KB per token",
        costs=lambda stitch: Cost(*costs.of(stitch), stitch.target_start * 100),
    )
    assert list(kept) == [one for one in every if one.target_start <= 2]


def test_a_search_knows_seconds(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    anchors = [tiny_model(seed=0), tiny_model(large=True, seed=1)]
    data = [token_ids(8, 12, seed=seed) for seed in range(4)]
    usage = Usage(prompt=5, batch=2)
    found = search_paths(anchors, data, QUICK, tokens=12, usage=usage)
    latencies = sorted(cost.latency for cost in found.costs if cost.latency is not None)
    assert len(latencies) == len(found) and found.provenance["usage"]["prompt"] == 5
    limit = (latencies[0] + found.dearest.latency) / 2
    budget = f"{1e3 * limit} ms, {4 * anchors[1].num_parameters() / 1e3} KB"
    path = found.best(budget)
    assert found.costs[found.place(path)].latency <= limit
    model = StitchedModel.from_anchors(*anchors, budget=budget, calibration=data, search=QUICK, usage=usage)
    assert model.config.search["budget"] == budget
    with pytest.raises(ValueError, match="got usage=… with a stitch"):
        StitchedModel.from_anchors(*anchors, (1, 2), usage=usage)
