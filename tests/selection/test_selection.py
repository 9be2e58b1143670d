"""Selection rules against Alg. 3 and Eq. 3 written out candidate by candidate."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klas_hf.maths.buckets import Spacing, bucket_of
from klas_hf.paths import Stitch
from klas_hf.scores.values import StitchScores
from klas_hf.selection.choice import Overlap, StitchSelection, merge_selections, overlap, recovery
from klas_hf.selection.klas import best_stitches, match_stitches, near_bucket_minimum, select_stitches
from klas_hf.selection.rivals import esta_stitches, min_kl_stitches, random_stitches
from klas_hf.stitch_costs import StitchCosts


def costs(m: int, n: int, *, source_block: int = 100, target_block: int = 300, head: int = 50) -> StitchCosts:
    """Blocks of one size per anchor, and a stitching layer of 7."""
    return StitchCosts(
        tokens=1,
        source_blocks=np.full(m, source_block),
        target_blocks=np.full(n, target_block),
        stitch=7,
        source_total=m * source_block + head,
        target_total=n * target_block + head,
        ends=head,
        source_parameters=np.full(m, source_block),
        target_parameters=np.full(n, target_block),
        stitch_parameters=7,
        ends_parameters=head,
    )


def scores(m: int = 6, n: int = 9, seed: int = 0, **changes: object) -> StitchScores:
    generator = np.random.default_rng(seed)
    nothing = np.zeros((m, n))
    made = StitchScores(
        score="klas",
        cross=generator.gamma(2.0, size=(m, n)),
        capacity=generator.gamma(2.0, size=n - 1) + 0.1,
        cross_error=nothing,
        capacity_error=nothing[0, :-1],
        gamma_error=nothing[:, :-1],
        sequences=2,
        tokens=9,
        costs=costs(m, n),
    )
    return dataclasses.replace(made, **changes)


def naive_selection(
    given_scores: StitchScores, buckets: int, threshold: float, spacing: Spacing, absolute: bool
) -> tuple[set[tuple[int, int]], int, int]:
    """Alg. 3: the chosen pairs, the number of candidates in range, and of those outside."""
    low, high = given_scores.costs.source_total, given_scores.costs.target_total
    m, n = given_scores.cross.shape
    inside, outside = {}, 0
    for i in range(1, m + 1):
        for j in range(1, n):
            kl, capacity = given_scores.cross[i - 1, j - 1], given_scores.capacity[j - 1]
            value = kl if given_scores.score == "theta" else kl / capacity
            macs, _ = given_scores.costs.of(Stitch(i, j))
            if low <= macs <= high:
                inside[i, j] = (macs, value)
            else:
                outside += 1
    members: dict[int, list[tuple[int, int]]] = {}
    for pair, (macs, _) in inside.items():
        if spacing == "width":
            number = (macs - low) * buckets // (high - low)
        else:
            number = sum(other < macs for other, _ in inside.values()) * buckets // len(inside)
        members.setdefault(min(number, buckets - 1), []).append(pair)
    chosen = set()
    for pairs in members.values():
        lowest = min(inside[pair][1] for pair in pairs)
        limit = lowest + threshold if absolute else (1 + threshold) * lowest
        chosen |= {pair for pair in pairs if inside[pair][1] <= limit}
    return chosen, len(inside), outside


def pairs_of(selection: StitchSelection) -> list[tuple[int, int]]:
    return [(stitch.source_stop, stitch.target_start) for stitch in selection]


@given(
    st.integers(2, 8),
    st.integers(2, 8),
    st.integers(0, 1000),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.05, 0.5]),
    st.sampled_from(["width", "quantile"]),
    st.booleans(),
    st.sampled_from(["klas", "theta"]),
)
@settings(max_examples=120, deadline=None)
def test_selection_is_algorithm_3(
    m: int, extra: int, seed: int, buckets: int, threshold: float, spacing: Spacing, absolute: bool, score: str
) -> None:
    made = scores(m, m + extra, seed, score=score)
    got = select_stitches(made, buckets=buckets, threshold=threshold, spacing=spacing, absolute=absolute)
    chosen, candidates, outside = naive_selection(made, buckets, threshold, spacing, absolute)
    assert set(pairs_of(got)) == chosen and len(got) == len(chosen)
    assert (got.candidates, got.outside, got.rule) == (candidates, outside, score)
    assert list(got.macs) == sorted(got.macs) == [made.costs.of(stitch)[0] for stitch in got]
    assert list(got.values) == [made.value_of(stitch) for stitch in got]


def test_the_options_matter() -> None:
    """Relative or absolute, width or quantile, few or many buckets: none is ignored."""
    uneven = dataclasses.replace(costs(10, 16), target_blocks=np.arange(16) ** 2, target_total=1290)
    made = scores(10, 16, costs=dataclasses.replace(uneven, source_total=100))
    usual = {"buckets": 5, "threshold": 1.5}
    default = pairs_of(select_stitches(made, **usual))
    for other in (
        {"absolute": True},
        {"spacing": "quantile"},
        {"buckets": 20},
        {"threshold": 0.0},
        {"threshold": 4.0},
    ):
        assert pairs_of(select_stitches(made, **(usual | other))) != default
    assert pairs_of(select_stitches(dataclasses.replace(made, score="theta"), **usual)) != default


def test_a_larger_threshold_only_adds() -> None:
    made = scores()
    kept: set[tuple[int, int]] = set()
    for threshold in (0.0, 0.01, 0.05, 0.3, 1.0):
        now = set(pairs_of(select_stitches(made, threshold=threshold)))
        assert kept <= now
        kept = now


def test_selection_is_a_sequence_of_stitches() -> None:
    got = select_stitches(scores(), buckets=4)
    assert got[0] == list(got)[0] and isinstance(got[0], Stitch) and len(list(got)) == len(got)
    assert len(got.stitches) == len(got.macs) == len(got.values) == len(got.buckets) == len(got)
    assert set(got.buckets) <= set(range(4))


@given(st.integers(0, 500), st.integers(1, 30))
@settings(max_examples=30, deadline=None)
def test_best_per_bucket_keeps_the_lowest_of_each(seed: int, buckets: int) -> None:
    wide = select_stitches(scores(seed=seed), buckets=buckets, threshold=3.0)
    best = wide.best_per_bucket()
    assert pairs_of(best) == pairs_of(select_stitches(scores(seed=seed), buckets=buckets, threshold=0.0))
    assert list(best.buckets) == sorted(set(wide.buckets))
    for bucket, value in zip(best.buckets, best.values, strict=True):
        assert value == min(v for b, v in zip(wide.buckets, wide.values, strict=True) if b == bucket)
    assert (best.candidates, best.outside, best.rule) == (wide.candidates, wide.outside, wide.rule)


@pytest.mark.parametrize(
    ("count", "ranks"), [(1, [0]), (2, [0, 9]), (4, [0, 3, 6, 9]), (10, list(range(10))), (99, list(range(10)))]
)
def test_spread_keeps_so_many_from_cheapest_to_dearest(count: int, ranks: list[int]) -> None:
    ten = min_kl_stitches(scores(), 10)
    assert pairs_of(ten.spread(count)) == [pairs_of(ten)[rank] for rank in ranks]


@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.3])
def test_matches_are_the_best_scored_of_about_the_same_cost(tolerance: float) -> None:
    made = scores(8, 14)
    esta = esta_stitches(made.costs, mapping="index")
    got = match_stitches(made, esta, tolerance=tolerance)
    low, high = made.costs.source_total, made.costs.target_total
    everything = {s: (made.costs.of(s)[0], made.value_of(s)) for s in made.stitches}
    expected = []
    for macs in esta.macs:
        near = {s: v for s, (m, v) in everything.items() if (1 - tolerance) * macs <= m <= macs and low <= m <= high}
        expected.append(min(near, key=near.__getitem__))
    assert sorted(got) == sorted(expected) and len(got) == len(esta)
    assert got.rule == "klas" and list(got.macs) == sorted(got.macs)
    assert (got.macs == esta.macs) == (tolerance == 0.0)


def test_more_buckets_than_candidates_keep_every_candidate_of_a_cost_of_its_own() -> None:
    got = select_stitches(scores(3, 4), buckets=10_000, threshold=0.0)
    assert got.candidates == len(got) == len(set(got.macs))


def test_stitches_without_a_finite_score_are_no_candidates() -> None:
    made = scores(6, 9)
    capacity = made.capacity.copy()
    capacity[3] = 0.0
    got = select_stitches(dataclasses.replace(made, capacity=capacity), threshold=1e9)
    assert {j for _, j in pairs_of(got)} == {1, 2, 3, 5, 6, 7, 8}
    macs = made.costs.macs[:, 4]
    in_range = (macs >= made.costs.source_total) & (macs <= made.costs.target_total)
    assert got.candidates == select_stitches(made).candidates - in_range.sum()


@pytest.mark.parametrize("buckets", [1, 7, 20, 100])
def test_buckets_of_equal_width_have_exact_edges(buckets: int) -> None:
    """Every hundredth lies on an edge for some of these counts; floats put 29 % into the 28th of a hundred."""
    macs = np.arange(0, 101) * 1_000_003 + 5
    got = bucket_of(macs, 5, 100 * 1_000_003 + 5, buckets)
    assert got.tolist() == [min(k * buckets // 100, buckets - 1) for k in range(101)]


def test_quantile_buckets_hold_equal_counts_and_keep_equal_costs_together() -> None:
    generator = np.random.default_rng(0)
    distinct = generator.permutation(100) ** 3
    assert np.bincount(bucket_of(distinct, 0, 10**6, 100, "quantile")).tolist() == [1] * 100
    assert np.bincount(bucket_of(distinct, 0, 10**6, 5, "quantile")).tolist() == [20] * 5
    order = np.argsort(distinct)
    assert (np.diff(bucket_of(distinct, 0, 10**6, 5, "quantile")[order]) >= 0).all()
    assert len(set(bucket_of(np.array([4, 4, 4, 4]), 4, 4, 3, "quantile").tolist())) == 1


def test_huge_costs_do_not_overflow() -> None:
    macs = np.array([10**12, 10**15, 10**16])
    assert bucket_of(macs, 10**12, 10**16, 100).tolist() == [0, 9, 99]


def test_anchors_of_one_cost_have_one_bucket() -> None:
    assert bucket_of(np.array([9, 9]), 9, 9, 20).tolist() == [0, 0]


@pytest.mark.parametrize("absolute", [False, True])
def test_eq_3_is_inclusive_and_holds_for_zero_and_negative_scores(absolute: bool) -> None:
    values, bucket = np.array([1.0, 1.5, 1.51, 0.0, 0.0, 0.4, -2.0, -1.0, -0.9]), np.repeat([0, 2, 3], 3)
    kept = near_bucket_minimum(values, bucket, 0.5, absolute).tolist()
    assert kept == ([0, 1, 3, 4, 5] + [6] if absolute else [0, 1, 3, 4, 6, 7])


def test_a_million_candidates() -> None:
    m, n = 1000, 1001
    made = scores(m, n)
    got = select_stitches(made, buckets=50)
    low, high = made.costs.source_total, made.costs.target_total
    macs, values = made.costs.macs, made.values
    inside = (macs >= low) & (macs <= high) & np.isfinite(values)
    assert got.candidates + got.outside == m * (n - 1) and got.candidates == inside.sum() > 500_000
    for bucket in (0, 17, 49):
        members = inside & (np.minimum((macs - low) * 50 // (high - low), 49) == bucket)
        lowest = values[members].min()
        chosen = [value for value, b in zip(got.values, got.buckets, strict=True) if b == bucket]
        assert min(chosen) == lowest and len(chosen) == (values[members] <= 1.05 * lowest).sum()


def test_min_kl_takes_the_lowest_divergences_whatever_they_cost() -> None:
    made = scores()
    got = min_kl_stitches(made, 5)
    inside = {}
    for i in range(1, 7):
        for j in range(1, 9):
            if made.costs.source_total <= made.costs.of(Stitch(i, j))[0] <= made.costs.target_total:
                inside[i, j] = made.cross[i - 1, j - 1]
    expected = sorted(inside, key=inside.__getitem__)[:5]
    assert set(pairs_of(got)) == set(expected) and list(got.macs) == sorted(got.macs)
    assert sorted(got.values) == sorted(inside[pair] for pair in expected)
    assert (got.rule, got.buckets, got.candidates) == ("min_kl", (-1,) * 5, len(inside))
    assert got.candidates + got.outside == 6 * 8
    assert len(min_kl_stitches(made, 10_000)) == len(inside)


def test_min_kl_needs_no_capacity() -> None:
    made = scores()
    without = dataclasses.replace(made, capacity=np.zeros_like(made.capacity))
    assert pairs_of(min_kl_stitches(without, 7)) == pairs_of(min_kl_stitches(made, 7))


# A 16-block anchor and one of 28, as Llama 3.2 1B and 3B: i · 28 / 16 = 1.75 i; halves go to the even neighbour.
_INDEX = [(i, i) for i in range(1, 17)]
_PROPORTIONAL = [
    (1, 2), (2, 4), (3, 5), (4, 7), (5, 9), (6, 10), (7, 12), (8, 14),
    (9, 16), (10, 18), (11, 19), (12, 21), (13, 23), (14, 24), (15, 26),
]  # fmt: skip


@pytest.mark.parametrize(("mapping", "expected"), [("index", _INDEX), ("proportional", _PROPORTIONAL)])
def test_esta_by_layer_count(mapping: str, expected: list[tuple[int, int]]) -> None:
    made = costs(16, 28)
    got = esta_stitches(made, mapping=mapping)
    assert sorted(pairs_of(got)) == expected
    assert (got.rule, got.candidates, got.outside) == (f"esta_{mapping}", len(expected), 0)
    assert all(math.isnan(value) for value in got.values) and set(got.buckets) == {-1}
    assert list(got.macs) == sorted(got.macs)


def test_esta_maps_proportionally_unless_told_otherwise() -> None:
    assert pairs_of(esta_stitches(costs(16, 28))) == pairs_of(esta_stitches(costs(16, 28), mapping="proportional"))


def test_esta_drops_and_counts_what_is_outside_the_anchors_costs() -> None:
    """A dear stitching layer puts stitches near either end beyond the target's cost."""
    dear = dataclasses.replace(costs(16, 28), stitch=1_000)
    got = esta_stitches(dear, mapping="index")
    assert pairs_of(got) == [(i, i) for i in range(16, 4, -1)]  # 200 i >= 1,000
    assert (got.candidates, got.outside) == (12, 4)


def test_esta_of_equal_depths_is_the_diagonal() -> None:
    for mapping in ("index", "proportional"):
        assert sorted(pairs_of(esta_stitches(costs(5, 5), mapping=mapping))) == [(i, i) for i in range(1, 5)]


def test_random_choice_takes_so_many_of_each_bucket() -> None:
    made = costs(9, 14)
    got = random_stitches(made, buckets=6, per_bucket=4, seed=3)
    everything = random_stitches(made, buckets=6, per_bucket=10_000)
    available = np.bincount(everything.buckets, minlength=6)
    assert np.bincount(got.buckets, minlength=6).tolist() == np.minimum(available, 4).tolist()
    assert set(got) <= set(everything) and len(set(got)) == len(got)
    assert all(stitch.target_start >= 1 for stitch in everything)
    assert everything.candidates == len(everything) and everything.candidates + everything.outside == 9 * 13
    assert (got.rule, got.candidates, got.outside) == ("random", everything.candidates, everything.outside)
    expected = bucket_of(np.array(got.macs), made.source_total, made.target_total, 6)
    assert list(got.buckets) == expected.tolist()


def test_random_choice_depends_on_its_seed_alone() -> None:
    made = costs(9, 14)
    draws = [tuple(random_stitches(made, seed=seed)) for seed in (0, 0, 1, 2)]
    assert draws[0] == draws[1] and len(set(draws)) == 3


def test_random_choice_is_even() -> None:
    """Every candidate of a bucket is drawn about equally often."""
    made = costs(4, 6)
    counts: dict[Stitch, int] = {}
    for seed in range(600):
        for stitch in random_stitches(made, buckets=1, seed=seed):
            counts[stitch] = counts.get(stitch, 0) + 1
    candidates = random_stitches(made, buckets=1, per_bucket=100)
    drawn = np.array([counts.get(stitch, 0) for stitch in candidates])
    expected = 600 / len(candidates)
    assert ((drawn - expected) ** 2 / expected).sum() < 2.5 * len(candidates)  # chi-squared, mean len - 1


def test_wrong_options_are_refused() -> None:
    made = scores()
    for call, message in (
        (lambda: select_stitches(made, buckets=0), "got buckets=0; expected at least 1"),
        (lambda: select_stitches(made, threshold=-0.1), "got threshold=-0.1"),
        (lambda: select_stitches(made, threshold=float("nan")), "got threshold=nan"),
        (lambda: select_stitches(made, spacing="log"), "got spacing='log'; expected 'width' or 'quantile'"),
        (lambda: min_kl_stitches(made, 0), "got count=0"),
        (lambda: min_kl_stitches(made, -1), "got count=-1"),
        (lambda: esta_stitches(made.costs, mapping="depth"), r"got mapping='depth'.*\['index', 'proportional'\]"),
        (lambda: random_stitches(made.costs, buckets=0), "got buckets=0"),
        (lambda: random_stitches(made.costs, per_bucket=0), "got per_bucket=0"),
        (lambda: random_stitches(made.costs, spacing="log"), "got spacing='log'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_reversed_anchors_are_refused() -> None:
    reversed_costs = costs(6, 9, source_block=900)
    for call in (
        lambda: select_stitches(scores(costs=reversed_costs)),
        lambda: min_kl_stitches(scores(costs=reversed_costs), 3),
        lambda: esta_stitches(reversed_costs),
        lambda: random_stitches(reversed_costs),
    ):
        with pytest.raises(ValueError, match="reversed"):
            call()


def test_nothing_between_the_anchors_is_refused() -> None:
    """A stitching layer dearer than what stitching saves: every stitched model costs more than the target."""
    hopeless = dataclasses.replace(costs(6, 9), stitch=10**6)
    with pytest.raises(ValueError, match="got no stitch between the anchors' costs, 650 and 2,750 MACs, among 48"):
        select_stitches(scores(costs=hopeless))


def pair_of_anchors(source: int, target: int, seed: int = 0, **changes: object) -> StitchScores:
    """Scores of two anchors of three, of other sizes than the usual ones."""
    made = scores(4 + source, 6 + target, seed + 7 * source + target, **changes)
    return dataclasses.replace(made, costs=dataclasses.replace(made.costs, source=source, target=target))


def test_several_pairs_of_anchors_are_bucketed_each_by_itself() -> None:
    pairs = [pair_of_anchors(0, 1), pair_of_anchors(1, 2), pair_of_anchors(0, 2)]
    options = {"buckets": 6, "threshold": 0.7}
    got = select_stitches(pairs, **options)
    each = [select_stitches(one, **options) for one in pairs]
    expected = {
        Stitch(i, j, one.costs.source, one.costs.target)
        for one in pairs
        for i, j in naive_selection(one, 6, 0.7, "width", False)[0]
    }
    assert set(got) == expected and len(got) == len(expected) == sum(map(len, each))
    assert list(got.macs) == sorted(got.macs)
    values = {stitch: value for one in each for stitch, value in zip(one, one.values, strict=True)}
    buckets = {stitch: bucket for one in each for stitch, bucket in zip(one, one.buckets, strict=True)}
    assert list(got.values) == [values[stitch] for stitch in got]
    assert list(got.buckets) == [buckets[stitch] for stitch in got]
    assert (got.rule, got.candidates, got.outside) == (
        "klas",
        sum(one.candidates for one in each),
        sum(one.outside for one in each),
    )
    best = got.best_per_bucket()
    assert set(best) == {stitch for one in each for stitch in one.best_per_bucket()}
    assert select_stitches(pairs[:1], **options) == each[0]


def test_options_reach_every_pair() -> None:
    pairs = [pair_of_anchors(0, 1), pair_of_anchors(1, 2)]
    for options in ({"spacing": "quantile"}, {"absolute": True}, {"buckets": 3}, {"threshold": 2.0}):
        options = {"threshold": 0.5, "buckets": 7} | options
        got = select_stitches(pairs, **options)
        assert set(got) == {stitch for one in pairs for stitch in select_stitches(one, **options)}


def test_a_union_has_each_stitch_once_as_it_first_came() -> None:
    made = scores()
    one, other = select_stitches(made, buckets=4, threshold=0.5), min_kl_stitches(made, 12)
    assert set(one) & set(other)
    got = merge_selections([one, other], rule="both")
    assert set(got) == set(one) | set(other) and len(set(got)) == len(got) and got.rule == "both"
    assert list(got.macs) == sorted(got.macs) == [made.costs.of(stitch)[0] for stitch in got]
    for stitch, value, bucket in zip(got, got.values, got.buckets, strict=True):
        first = one if stitch in one else other
        place = first.stitches.index(stitch)
        assert (value, bucket) == (first.values[place], first.buckets[place])
    assert (got.candidates, got.outside) == (one.candidates + other.candidates, one.outside + other.outside)
    assert merge_selections([one, one]).stitches == one.stitches and merge_selections([one]) == one
    with pytest.raises(ValueError, match=r"got 2 selections of the rules \['klas', 'min_kl'\].*rule=…"):
        merge_selections([one, other])
    with pytest.raises(ValueError, match="got 0 selections"):
        merge_selections([])


def test_stitches_that_cannot_be_made_are_no_candidates_of_any_rule() -> None:
    usual = scores(6, 9)
    allowed = np.random.default_rng(3).random((6, 9)) < 0.5
    allowed[0, 1] = allowed[5, 8] = True
    staged_costs = dataclasses.replace(usual.costs, allowed=allowed)
    made = dataclasses.replace(usual, costs=staged_costs)
    inside = (staged_costs.macs >= staged_costs.source_total) & (staged_costs.macs <= staged_costs.target_total)
    probed = allowed & (np.arange(9) > 0)
    expected = {(i + 1, j) for i, j in np.argwhere(inside & probed).tolist()}
    everything = (
        select_stitches(made, threshold=1e9),
        random_stitches(staged_costs, per_bucket=10_000),
        min_kl_stitches(made, 10_000),
        best_stitches(made, count=10_000),
    )
    for got in everything:
        assert set(pairs_of(got)) == expected
        assert (got.candidates, got.outside) == (len(expected), (probed & ~inside).sum())
    esta = esta_stitches(staged_costs, mapping="index")
    assert set(pairs_of(esta)) == expected & {(i, i) for i in range(1, 7)} != {(i, i) for i in range(1, 7)}
    assert set(pairs_of(match_stitches(made, esta_stitches(usual.costs), tolerance=0.5))) <= expected


def test_the_best_are_the_lowest_of_any_score_over_all_pairs() -> None:
    statistics = [{"mse": np.random.default_rng(k).random((4 + k, 6 + k + 1))} for k in (0, 1)]
    pairs = [pair_of_anchors(k, k + 1, statistics=statistics[k]).with_score("mse") for k in (0, 1)]
    values = {}
    for one in pairs:
        for stitch in one.stitches:
            if one.costs.source_total <= one.costs.of(stitch)[0] <= one.costs.target_total:
                values[stitch] = one.value_of(stitch)
    for count in (1, 5, 1_000):
        got = best_stitches(pairs, count=count)
        assert set(got) == set(sorted(values, key=values.__getitem__)[:count])
        assert list(got.values) == [values[stitch] for stitch in got]
        assert list(got.macs) == sorted(got.macs) and set(got.buckets) == {-1}
        assert (got.rule, got.candidates) == ("mse", len(values))
    theta = [one.with_score("theta") for one in pairs]
    lowest = min_kl_stitches(pairs, 6)
    assert dataclasses.replace(best_stitches(theta, count=6), rule="min_kl") == lowest
    assert {stitch.source for stitch in min_kl_stitches(pairs, 1_000)} == {0, 1}


def test_random_choice_is_made_in_each_pair_of_anchors() -> None:
    pairs = [pair_of_anchors(0, 1).costs, pair_of_anchors(1, 2).costs]
    got = random_stitches(pairs, buckets=5, per_bucket=2, seed=4)
    everything = [random_stitches(one, buckets=5, per_bucket=1_000) for one in pairs]
    for one, possible in zip(pairs, everything, strict=True):
        chosen = [(s, b) for s, b in zip(got, got.buckets, strict=True) if s.source == one.source]
        assert {s for s, _ in chosen} <= set(possible)
        available = np.bincount(possible.buckets, minlength=5)
        assert np.bincount([b for _, b in chosen], minlength=5).tolist() == np.minimum(available, 2).tolist()
    alone = random_stitches(pairs[:1], buckets=5, seed=4)
    assert alone.stitches == random_stitches(pairs[0], buckets=5, seed=4).stitches


def test_overlap_and_recovery_count_a_stitch_once() -> None:
    first = [Stitch(1, 1), Stitch(1, 2), Stitch(2, 2), Stitch(2, 2), Stitch(3, 3, 1, 2)]
    second = [Stitch(1, 2), Stitch(2, 2), Stitch(3, 3)]
    assert overlap(first, second) == Overlap(common=2, of_first=4, of_second=3)
    assert overlap(first, []) == Overlap(0, 4, 0)
    assert recovery(first, second) == 2 / 3 and recovery(second, first) == 2 / 4 and recovery([], second) == 0.0
    chosen = select_stitches(scores())
    assert recovery(chosen, chosen) == 1.0
    with pytest.raises(ValueError, match="got no viable stitch"):
        recovery(first, [])


@pytest.mark.parametrize("spacing", ["width", "quantile"])
def test_more_buckets_than_candidates_are_allowed(spacing: Spacing) -> None:
    got = select_stitches(scores(2, 4), buckets=999, threshold=0.0, spacing=spacing)
    expected, candidates, _ = naive_selection(scores(2, 4), 999, 0.0, spacing, False)
    assert set(pairs_of(got)) == expected and candidates < 999
    assert max(got.buckets) < 999
