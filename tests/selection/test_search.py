"""The search over paths: what it finds against every path measured, what it spends, and how it goes on."""

import zlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, tiny_model, token_ids
from tiny_vision import images, tiny_classifier, tiny_pair
from torch.distributions import Categorical, kl_divergence

from klas_hf import (
    FunctionalScoring,
    Path,
    PathScores,
    SearchConfig,
    StitchedModel,
    measure_path_costs,
    search_paths,
)
from klas_hf.budgets import Budget, Cost
from klas_hf.data.images import ImageBatches, ImageSet, map_labels
from klas_hf.evaluation import evaluate_divergence
from klas_hf.rows import read_rows
from klas_hf.scores.path_scores import ends_of, kind_of
from klas_hf.scores.paths import PathScore
from klas_hf.selection import search
from klas_hf.selection.moves import Moves
from klas_hf.stitching.assembly import assemble_best

pytestmark = pytest.mark.filterwarnings("ignore:.*do not determine", "ignore:.*rows per")
WIDE = 10**12  # forwards without a bound


def anchors() -> list[Any]:
    return [tiny_model(seed=1), tiny_model(large=True, seed=2)]


def data(count: int = 4) -> list[torch.Tensor]:
    return [token_ids(12, 12, seed=seed) for seed in range(count)]


def grids(*depths: int) -> list[list[tuple[int, int, int]]]:
    return [[(0, 0, 0)] * (depth + 1) for depth in depths]


@given(st.integers(1, 6), st.integers(1, 6), st.booleans())
@settings(max_examples=30, deadline=None)
def test_paths_of_one_joint_are_all_there_are(m: int, n: int, repeated: bool) -> None:
    found = list(Moves(grids(m, n), joints=3, least_slice=1, repeated=repeated).single())
    expected = {f"{a}[:{i}] {b}[{j}:]" for a, b in ((0, 1), (1, 0)) for i in range(1, (m, n)[a] + 1)
                for j in range((m, n)[b] + 1)}  # fmt: skip
    for a, depth in enumerate((m, n)):
        starts = range(depth + 1) if repeated else range(2, depth + 1)
        ends = range(1, depth + 1)
        expected |= {f"{a}[:{i}] {a}[{j}:]" for i in ends for j in starts if i < j or (repeated and j < i)}
    assert sorted(map(str, found)) == sorted(str(Path.parse(text)) for text in expected)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_moves_lead_to_paths_that_can_be_made(draw: st.DataObject) -> None:
    depths = draw.draw(st.lists(st.integers(2, 7), min_size=1, max_size=3))
    sides = [draw.draw(st.lists(st.sampled_from([4, 8]), min_size=d + 1, max_size=d + 1)) for d in depths]
    laid = [[(side, side, 0) for side in of_one] for of_one in sides]
    moves = Moves(laid, 3, draw.draw(st.integers(1, 2)), repeated=draw.draw(st.booleans()))
    front = list(moves.single())
    for _ in range(2):
        if not front:
            return
        path = draw.draw(st.sampled_from(front))
        front = [one for _, one in moves.neighbours(path) if one.joints]
        for one in front:
            bounds = one.bounds(depths)
            assert 1 <= one.joints <= 3
            assert all(stop - start >= moves.least for _, start, stop in bounds[:-1])
            blocks = [(anchor, block) for anchor, start, stop in bounds for block in range(start, stop)]
            assert one.repeats == (len(blocks) > len(set(blocks)))
            assert moves.repeated or not one.repeats
            for (a, _, stop), (b, start, _) in pairwise(bounds):
                assert laid[a][stop] == laid[b][start] and (a, stop) != (b, start)


def test_class_tokens_can_be_left_out_and_not_made_up() -> None:
    laid = [[(2, 2, 1)] * 3, [(2, 2, 0)] * 3]
    kinds = {(path.slices[0].anchor, path.slices[1].anchor) for path in Moves(laid, 1, 1).single()}
    assert kinds == {(0, 0), (1, 1), (0, 1)}


@pytest.mark.parametrize("kinds", [("pruned",), ("stitch",), ("pruned", "stitch")])
def test_the_best_of_every_bucket_is_found_where_all_is_measured(kinds: tuple[str, ...]) -> None:
    config = SearchConfig(buckets=4, beam=1, joints=1, kinds=kinds, screened=1.0, forwards=WIDE)
    found = search_paths(anchors(), data(), config, tokens=12)
    every = search_paths(
        anchors(), data(), SearchConfig(buckets=1, beam=10**6, joints=1, kinds=kinds, forwards=WIDE), tokens=12
    )
    assert len(every) > len(found) > 3
    costs = measure_path_costs(anchors(), tokens=12)
    dearest = costs.of("1[:]").macs
    edges = np.linspace(0.2, 1, 5) * dearest
    for low, high in pairwise(edges):
        inside = [p for p in every.paths if p.joints and low <= costs.of(p).macs < high]
        if inside:
            best = min(inside, key=lambda p: every.divergence[every.place(p)])
            assert best in found.paths


@pytest.mark.slow
def test_paths_of_several_joints_are_found_and_anchors_are_among_the_paths() -> None:
    config = SearchConfig(forwards=WIDE, beam=2, merged=False)
    found = search_paths(anchors(), data(), config, tokens=12)
    assert {path.joints for path in found.paths} >= {0, 1, 2}  # any number may be beaten by far
    assert {kind_of(path) for path in found.paths} >= {"anchor", "pruned"}
    one = search_paths(anchors(), data(), replace(config, joints=1), tokens=12)
    for share in (0.4, 0.6, 0.8):
        values = [scores.divergence[scores.place(scores.best(share))] for scores in (found, one)]
        assert values[0] <= values[1]
    assert found.divergence[found.place(Path.parse("1[:]"))] == 0


def test_the_best_of_each_number_of_joints_is_measured_on_all_items(
    tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "NEAR", 4.0)  # random anchors have few paths that are near each other
    config = SearchConfig(forwards=WIDE, beam=1, joints=2, buckets=3)
    found = search_paths(anchors(), data(), config, tokens=12, output=tmp_path / "search.jsonl")
    screened = [row for row in read_rows(tmp_path / "search.jsonl") if row.setting["batches"] is not None]
    low, dearest = 0.2 * found.dearest.macs, found.dearest.macs
    second = 0
    for start, stop in pairwise(low + n / 3 * (dearest - low) for n in range(4)):
        inside = sorted((r for r in screened if start <= r.macs < stop), key=lambda r: r.metrics["divergence"])
        for joints in (1, 2):
            best = next((row for row in inside if row.joints == joints), None)
            if best is not None:
                least = min(row.metrics["divergence"] for row in screened if row.macs <= best.macs)
                if best.metrics["divergence"] <= search.NEAR * least:
                    assert Path.parse(best.path) in found.paths
                    second += best is not inside[0]
    assert second


@pytest.mark.parametrize("count", [1, 3])
def test_one_anchor_or_three(count: int) -> None:
    models = [tiny_model(large=True, seed=2), tiny_model(seed=1), tiny_model(seed=7, num_hidden_layers=4)][:count]
    found = search_paths(models, data(), SearchConfig(buckets=5), tokens=12)
    assert {place for path in found.paths for place in path.anchors} == set(range(count))
    assert found.pareto()[-1] == Path.parse("0[:]")


@pytest.mark.parametrize("merged", [True, False])
def test_blocks_are_repeated_where_that_is_asked_for(merged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted, scored, models = data(3), data(3), anchors()
    scoring = FunctionalScoring(calibration=fitted, temperature=1.0)
    kinds = ("pruned", "repeated")
    config = SearchConfig(beam=99, joints=2, kinds=kinds, forwards=WIDE, merged=merged, scoring=scoring)
    monkeypatch.setattr(search, "NEAR", 1e9)  # all that was screened is measured in full
    found = search_paths(models, scored, config, tokens=12)
    path = next(path for path in found.paths if kind_of(path) == "repeated")
    model = assemble_best(models, found, "99%", path, calibration=fitted)
    divergence = evaluate_divergence(model, models[1], scored)
    assert divergence == pytest.approx(found.divergence[found.place(path)], rel=1e-4)


@pytest.mark.parametrize("pair", [("swin", None), ("resnet", "swin"), ("dinov2", "swin")])
def test_images(pair: tuple[str, str | None]) -> None:
    models = tiny_pair(*pair)
    batches = [images(pair[0], 6, seed=seed) for seed in range(4)]
    found = search_paths(models, batches, SearchConfig(buckets=4, forwards=WIDE))
    assert found.dearest.image_height == batches[0].shape[-1]
    costs = measure_path_costs(models, image_size=batches[0].shape[-1])
    assert any(found.seamless) and found.seamless == tuple(map(costs.seamless, found.paths))
    assert any(path.joints for path in found.pareto())


def test_what_is_spent_is_bounded_and_told() -> None:
    spent = []
    for forwards in (6_000, 20_000, None):
        found = search_paths(anchors(), data(), SearchConfig(forwards=forwards), tokens=12)
        limit = found.provenance["limit"]
        assert found.provenance["spent"] <= limit and limit == (forwards or limit)
        assert len(found) > 2
        spent.append(found.provenance["spent"])
    assert spent[0] < spent[1]


def test_an_interrupted_search_goes_on_to_the_same_result(tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SearchConfig(buckets=4, beam=2)
    whole = search_paths(anchors(), data(), config, tokens=12)
    score, calls = search.PathScorer.score, []

    def failing(self: Any, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, *args)

    file = tmp_path / "search.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(search.PathScorer, "score", failing)
        with pytest.raises(KeyboardInterrupt):
            search_paths(anchors(), data(), config, tokens=12, output=file)
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-5]) + '\n{"rule": "sea')  # cut short as by a kill
    again = search_paths(anchors(), data(), config, tokens=12, output=file)
    assert again.paths == whole.paths and again.provenance["spent"] == whole.provenance["spent"]
    np.testing.assert_allclose(again.divergence, whole.divergence, rtol=1e-5, atol=1e-9)
    with pytest.raises(ValueError, match="differs in search"):
        search_paths(anchors(), data(), SearchConfig(buckets=5, beam=2), tokens=12, output=file)
    with pytest.raises(ValueError, match="differs in search"):
        search_paths(anchors(), data()[1:], config, tokens=12, output=file)


def test_the_best_between_any_two_ends_is_measured_in_full_however_far_behind() -> None:
    found = search_paths(anchors(), data(), SearchConfig(buckets=2, beam=1), tokens=12)
    depths = tuple(one.config.num_hidden_layers for one in anchors())
    assert found.depths == depths
    ends = {ends_of(path, depths, tails=True) for path in found.paths if path.joints}
    assert ends >= {(0, 1, 1), (1, 0, 1), (1, 1, 1), (1, 1, 0)}


def test_the_best_of_a_size_is_measured_beside_a_cheaper_one_where_both_are_far_behind(
    tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(_: Any, paths: list[Path], *__: Any) -> list[PathScore]:
        far = [1 + zlib.crc32(str(path).encode()) % 1000 / 2000 if 1 in path.anchors else 0.1 for path in paths]
        return [PathScore(one, 0.01, 12) for one in far]

    monkeypatch.setattr(search.PathScorer, "score", score)
    config = SearchConfig(forwards=WIDE, cheapest=0.05)
    found = search_paths(anchors(), data(), config, tokens=12, output=tmp_path / "search.jsonl")
    depths, small = found.depths, found.costs[found.place(Path.parse("0[:]"))].macs
    rows = [row for row in read_rows(tmp_path / "search.jsonl") if row.setting["batches"] and row.joints == 1]
    low, dearest = 0.05 * found.dearest.macs, found.dearest.macs
    least: dict[Any, float] = {}
    farther = 0
    for start, stop in pairwise(low + n / 20 * (dearest - low) for n in range(21)):
        best: dict[Any, Any] = {}
        for row in sorted(rows, key=lambda row: (row.metrics["divergence"], row.path)):
            ends = ends_of(Path.parse(row.path), depths, tails=True)
            if start <= row.macs < stop and ends is not None and ends.last == 1:
                best.setdefault(ends, row)
        for ends, row in best.items():
            own = row.metrics["divergence"]
            if start > small and own < search.NEAR * least.get(ends, np.inf):
                assert Path.parse(row.path) in found.paths
                farther += own > least.get(ends, np.inf)
            least[ends] = min(own, least.get(ends, np.inf))
    assert farther


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (0.6, Budget(share=0.6, text="0.6")),
        ("60%", Budget(share=0.6, text="60%")),
        ("2B", Budget(parameters=2 * 10**9, text="2B")),
        ("350 M", Budget(parameters=350 * 10**6, text="350 M")),
        ("4 GB", Budget(weight_bytes=4 * 10**9, text="4 GB")),
        ("1.5GiB", Budget(weight_bytes=3 * 2**29, text="1.5GiB")),
        (Cost(10, 20), Budget(macs=10, parameters=20, text="10 MACs")),
    ],
)
def test_budgets(budget: Any, expected: Budget) -> None:
    assert Budget.of(budget) == expected


@pytest.mark.parametrize("budget", ["", "fast", "-3", "0%", "140%", "12 parsecs", 0, 1.5, -1, "1.2.3 GB"])
def test_budgets_that_say_nothing_are_refused(budget: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        Budget.of(budget)
    with pytest.raises(TypeError, match="expected a share"):
        Budget.of([1])


def test_mistakes_are_told(tmp_path: FilePath) -> None:
    small, large = anchors()
    with pytest.raises(ValueError, match="twice"):
        search_paths([small, small], data(), tokens=12)
    with pytest.raises(ValueError, match="entries"):
        search_paths([small, tiny_model(large=True, vocab_size=VOCABULARY + 1)], data(), tokens=12)
    with pytest.raises(ValueError, match="one kind"):
        search_paths([small, tiny_classifier("vit")], data(), tokens=12)
    with pytest.raises(ValueError, match="got 1 batches; expected at least two"):
        search_paths([large], data(1), tokens=12)
    for wrong in ({"kinds": ("fast",)}, {"kinds": ()}, {"beam": 0}, {"cheapest": 0.0}, {"screened": 1.5}):
        with pytest.raises(ValueError, match="expected"):
            SearchConfig(**wrong)
    (tmp_path / "other.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        PathScores.load(tmp_path / "other.safetensors")


def test_images_of_some_of_the_classes_are_compared_among_these() -> None:
    small, large = (tiny_classifier("vit", large=one, seed=int(one), num_labels=6).float() for one in (False, True))
    pixels = torch.randint(256, (48, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    named = ImageSet(list(pixels), [n % 3 for n in range(48)], "abc")
    batches = ImageBatches(map_labels(named, {"a": 4, "b": 1, "c": 5}), 8, (0.5,) * 3, (0.25,) * 3)
    config = SearchConfig(buckets=4, joints=1, forwards=WIDE)
    found = search_paths([small, large], batches, config)
    assert found.provenance["classes"] == [1, 4, 5]
    fitted, scored = list(batches)[:3], torch.cat([one["pixel_values"] for one in list(batches)[3:]])
    for path, divergence in zip(found.paths, found.divergence, strict=True):
        about = {"joint": found.joint(path), "calibration": fitted} if path.joints else {}
        model = StitchedModel.from_path([small, large], path, **about).eval()
        with torch.no_grad():
            p, q = (Categorical(logits=one(scored).logits[:, [1, 4, 5]]) for one in (large, model))
        expected = float(kl_divergence(p, q).mean())
        assert divergence == pytest.approx(expected, rel=1e-3, abs=1e-7)
        loader = [{"pixel_values": scored}]
        assert evaluate_divergence(model, large, loader, classes=[5, 1, 4]) == pytest.approx(expected, abs=1e-6)
    among, every = (search_paths([small, large], list(batches), config, classes=one) for one in ((1, 4, 5), None))
    np.testing.assert_array_equal(among.divergence, found.divergence)
    assert "classes" not in every.provenance and not np.allclose(every.divergence[:2], found.divergence[:2], rtol=0.05)
    made = StitchedModel.from_anchors(small, large, budget="70%", calibration=batches, search=config)
    assert made.config.path == str(found.best("70%"))
    assert made.config.search["divergence"] == pytest.approx(found.divergence[found.place(found.best("70%"))], rel=1e-5)
    for wrong in ((1, 6), (4,), ()):
        with pytest.raises(ValueError, match="expected at least two of the anchors' 6, from 0"):
            search_paths([small, large], list(batches), config, classes=wrong)
