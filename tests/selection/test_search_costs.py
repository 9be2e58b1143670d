"""The search over bytes and seconds: against every path of one joint measured, and what a budget makes of it."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path as Folder
from typing import Any

import numpy as np
import pytest
from tiny_models import tiny_model, token_ids
from tiny_vision import images, tiny_pair

from klas_hf import FunctionalScoring, Path, PathScores, SearchConfig, Usage, measure_path_costs, search_paths
from klas_hf.anchors.loading import load_anchors
from klas_hf.budgets import Budget, Cost
from klas_hf.costs.measured import PathTimes
from klas_hf.costs.timing import PartTimes
from klas_hf.scores.functional_settings import calibration_and_scored
from klas_hf.scores.path_scores import kind_of
from klas_hf.scores.paths import PathScorer

pytestmark = pytest.mark.filterwarnings("ignore:.*do not determine", "ignore:.*rows per")
USAGE = Usage(prompt=5)
DATA = [token_ids(12, 12, seed=seed) for seed in range(4)]
SIZES = (16, 48)  # widths of the two
QUICK = SearchConfig(buckets=4, beam=1, joints=1, screened=1.0, forwards=10**12, merged=False)


def anchors() -> list[Any]:
    return [tiny_model(seed=1), tiny_model(large=True, seed=2)]


def times(*args: Any) -> PathTimes:
    """Of blocks that take what they like: in the large one 5 alike in MACs, of 10 to 90 ms."""
    small = PartTimes([1, 10, 20, 30, 2], [0.001, 0.04, 0.02, 0.06, 0.002], [1] * 5)
    large = PartTimes([1, 30, 90, 10, 50, 70, 2], [0.001, 0.05, 0.01, 0.09, 0.07, 0.03, 0.002], [1] * 7)
    return PathTimes(USAGE, 4, [small, large], {(a, b, 5): (1, 0.001) for a in SIZES for b in SIZES}, False)


@pytest.fixture(autouse=True)
def _timed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("klas_hf.costs.measure_times", times)
    yield


@pytest.fixture(scope="module")
def every() -> dict[Path, float]:
    """The divergence of every path of one joint, measured by itself."""
    loaded = load_anchors(anchors())
    fitted, scored = map(list, calibration_and_scored(loaded[0], DATA, FunctionalScoring(temperature=1.0)))
    joined = [f"{a}[:{i}] {b}[{j}:]" for a, b in ((0, 1), (1, 0)) for i in range(1, (3, 5)[a] + 1)
              for j in range((3, 5)[b] + 1)]  # fmt: skip
    joined += [f"{a}[:{i}] {a}[{j}:]" for a in (0, 1) for i in range(1, (3, 5)[a]) for j in range(i + 1, (4, 6)[a])]
    paths = list(map(Path.parse, joined))
    scores = PathScorer(loaded, 1, fitted, scored).score(paths)
    return {path: score.divergence for path, score in zip(paths, scores, strict=True)}


def costs() -> dict[str, Any]:
    found = measure_path_costs(anchors(), tokens=12, usage=USAGE)
    return {
        "latency": lambda path: found.of(path).token_seconds,
        "seconds": lambda path: found.of(path).seconds,
        "kv_bytes_per_token": lambda path: found.of(path).kv_bytes_per_token,
        "weight_bytes": lambda path: 4 * found.of(path).parameters,
    }


@pytest.mark.parametrize("cost", ["latency", "seconds", "kv_bytes_per_token", "weight_bytes"])
def test_the_best_of_every_size_of_a_cost_is_found(cost: str, every: dict[Path, float]) -> None:
    found = search_paths(anchors(), DATA, replace(QUICK, cost=cost), tokens=12, usage=USAGE)
    of, best = costs()[cost], []
    for edge in np.linspace(0.2, 1, 5)[1:] * of("1[:]"):
        below = [path for path in every if 0.2 * of("1[:]") <= of(path) < edge]
        if below:
            best.append(min(below, key=every.__getitem__))
            assert best[-1] == min((path for path in found.paths if path in below), key=every.__getitem__)
    assert len(set(best)) > 2 and found.cost == found.provenance["cost"] == cost
    assert list(map(of, found.paths)) == sorted(map(of, found.paths))
    front = [(of(path), found.divergence[found.place(path)]) for path in found.pareto()]
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(front))
    assert found.pareto() == found.pareto(cost) and f"100% of the {cost}: 1[:]" in str(found)


def test_of_several_limits_the_narrowest_is_searched_over_and_the_others_hold(every: dict[Path, float]) -> None:
    latency, size = (costs()[name] for name in ("latency", "weight_bytes"))
    budget = f"{1e3 * 0.5 * latency('1[:]')} ms, {0.75 * size('1[:]') / 1e3} KB"
    found = search_paths(anchors(), DATA, replace(QUICK, buckets=99), tokens=12, usage=USAGE, budget=budget)
    assert found.cost == "latency" and found.provenance["budget"] == budget
    within = [path for path in every if latency(path) < latency("1[:]") and size(path) <= 0.75 * size("1[:]")]
    joined = [path for path in found.paths if path.joints]
    assert set(joined) <= set(within) and max(map(latency, joined)) > 0.5 * latency("1[:]")
    fast = [path for path in within if latency(path) <= 0.5 * latency("1[:]")]
    assert found.best(budget) == min(fast, key=every.__getitem__)
    assert len(fast) < len(within) < len(every)


def test_a_narrow_budget_is_searched_below_too() -> None:
    budget = f"{1e3 * 0.19 * costs()['latency']('1[:]')} ms"
    found = search_paths(anchors(), DATA, tokens=12, usage=USAGE, budget=budget)
    assert found.cost == "latency" and found.provenance["cheapest"] == pytest.approx(0.8 * 0.19)
    assert found.best(budget).joints


def test_macs_are_searched_over_where_nothing_else_is_said() -> None:
    plain = search_paths(anchors(), DATA, QUICK, tokens=12)
    share = search_paths(anchors(), DATA, QUICK, tokens=12, budget="60%")
    assert plain.cost == share.cost == "macs" and "100% of the MACs" in str(plain)
    assert plain.paths == share.paths and (plain.divergence == share.divergence).all()


def test_it_is_saved_drawn_and_not_gone_on_with_over_another_cost(tmp_path: Folder) -> None:
    file = tmp_path / "search.jsonl"
    found = search_paths(anchors(), DATA, replace(QUICK, cost="latency"), tokens=12, usage=USAGE, output=file)
    again = PathScores.load(found.save(tmp_path / "paths.safetensors"))
    assert again.cost == "latency" and again.pareto() == found.pareto() and again.costs == found.costs
    figure = again.plot(tmp_path / "picture")
    assert figure.axes[0].get_xlabel().startswith("ms per token")
    with pytest.raises(ValueError, match="differs in search"):
        search_paths(anchors(), DATA, QUICK, tokens=12, usage=USAGE, output=file)


def test_costs_that_nothing_is_known_of_are_refused() -> None:
    with pytest.raises(ValueError, match="got cost='joy'; expected one of macs, parameters"):
        SearchConfig(cost="joy")
    for about in ({"config": replace(QUICK, cost="latency")}, {"budget": "20 ms"}):
        with pytest.raises(ValueError, match=r"not measured.*expected a search with usage"):
            search_paths(anchors(), DATA, tokens=12, **about)
    models, seen = tiny_pair("swin"), [images("swin", 6, seed=seed) for seed in range(4)]
    with pytest.raises(ValueError, match="got cost='kv_bytes_per_token', of which these anchors take nothing"):
        search_paths(models, seen, replace(QUICK, cost="kv_bytes_per_token"))


def test_what_a_budget_limits_most() -> None:
    whole = Cost(1000, 50, 8, seconds=2.0, token_seconds=0.1, weight_bytes=400, peak_bytes=10, batch=4)
    for budget, cost, share in (
        ("60%", "macs", 0.6), ("60%, 20 ms", "latency", 0.2), ("100 tokens/s, 90%", "latency", 0.4),
        ("0.1 KB, 50 ms", "weight_bytes", 0.25), ("1 s to the first token", "seconds", 0.5),
        ("0.001 KB of activations, 0.001 KB per token", "peak_bytes", 0.1), (Cost(900, 10), "parameters", 0.2),
    ):  # fmt: skip
        assert Budget.of(budget).binding(whole, 2) == (cost, pytest.approx(share))


def test_kinds_are_as_without_a_budget(every: dict[Path, float]) -> None:
    found = search_paths(anchors(), DATA, replace(QUICK, kinds=("stitch",)), tokens=12, usage=USAGE, budget="50 ms")
    assert {kind_of(path) for path in found.paths} == {"anchor", "stitch"}
