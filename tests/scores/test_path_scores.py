"""Scores of paths: the best within a budget, the Pareto front, who contends, and how their joints are to be made."""

from itertools import pairwise, zip_longest
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from klas_hf import Path, PathScores
from klas_hf.budgets import Cost
from klas_hf.scores.path_scores import kind_of


def made(points: list[tuple[int, float]]) -> PathScores:
    """Scores of pruned paths of an anchor of 50 blocks, of (MACs, divergence); the anchor comes last."""
    paths = [Path.parse(f"0[:{n + 1}] 0[{n + 2}:]") for n in range(len(points))]
    costs = [Cost(macs, parameters=2 * macs) for macs, _ in points] + [Cost(1000, 2000)]
    values = np.array([value for _, value in points] + [0.0])
    return PathScores((*paths, Path.parse("0[:]")), values, values / 10, tuple(costs), ("one",), 2.0, {"a": 1})


@pytest.mark.parametrize("budget", ["5000", "1 MB", Cost(1001, 2001)])
def test_a_budget_beyond_the_dearest_anchor_gives_the_range(budget: Any) -> None:
    scores = made([(300, 2.0), (600, 0.5)])
    with pytest.raises(
        ValueError, match="above the dearest anchor.*at least 30.0%.* at most 100.0% .*2,000 parameters"
    ):
        scores.best(budget)
    assert scores.best("2000") == scores.best(Cost(1000, 2000)) == scores.best("4 KB") == Path.parse("0[:]")


POINTS = st.lists(st.tuples(st.integers(200, 999), st.floats(0.001, 5)), min_size=1, max_size=12)


@given(POINTS, st.floats(0.05, 1))
@settings(max_examples=60, deadline=None)
def test_the_best_within_a_budget_and_the_pareto_front(points: list[tuple[int, float]], share: float) -> None:
    scores = made(points)
    every = [*points, (1000, 0.0)]
    within = [value for macs, value in every if macs <= share * 1000]
    if within:
        place = scores.place(scores.best(share))
        assert scores.divergence[place] == min(within) and scores.costs[place].macs <= share * 1000
    else:
        with pytest.raises(ValueError, match="below what any path found here reaches; expected at least"):
            scores.best(share)
    front = [every[scores.place(path)] for path in scores.pareto()]
    for macs, value in every:
        beaten = any(m <= macs and v < value or m < macs and v <= value for m, v in every)
        assert beaten or (macs, value) in front
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(front))


ENDS = {
    "0[:]": (0, 0), "0[:2] 0[3:]": (0, 0), "0[:1] 0[2:3] 0[4:]": (0, 0), "0[:3] 0[4:]": (0, 0),
    "0[:2] 1[5:]": (0, 1), "0[:3] 1[6:]": None,
    "1[:1] 1[2:]": (1, 1), "1[:1] 1[2:3] 1[4:]": (1, 1), "1[:1] 1[2:3] 1[4:5] 1[6:]": (1, 1),
    "1[:2] 0[1:2] 1[4:]": (1, 1), "1[:3] 0[1:]": (1, 0),
    "1[:4] 1[6:]": (1, 1), "0[:1] 1[2:4] 1[6:]": (0, 1),
}  # of anchors of 4 and of 6 blocks: path → the anchors that it begins and ends with  # fmt: skip
TAILLESS = ("0[:1] 0[2:3] 0[4:]", "0[:3] 0[4:]", "1[:1] 1[2:3] 1[4:5] 1[6:]", "1[:4] 1[6:]", "0[:1] 1[2:4] 1[6:]")
MEASURED = st.lists(
    st.tuples(st.sampled_from(sorted(ENDS)), st.floats(0.01, 5), st.integers(1, 99)), min_size=1,
    unique_by=lambda one: one[0],
)  # fmt: skip


@given(MEASURED, st.integers(1, 8), st.booleans(), st.sampled_from([0, 100, 225, 399, 400, 1000]))
@example(
    [("0[:1] 0[2:3] 0[4:]", 1.0, 2), ("0[:1] 1[2:4] 1[6:]", 1.0, 1), ("0[:3] 0[4:]", 1.0, 1), ("0[:]", 1.0, 1)],
    1, False, 400,
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_contenders_are_an_anchor_what_lies_near_and_the_best_between_other_ends(
    measured: list[tuple[str, float, int]], count: int, known: bool, steps: int
) -> None:
    paths, whole = [Path.parse(text) for text, _, _ in measured], Path.parse("1[:]")
    values, costs = [value for _, value, _ in measured] + [0.0], [Cost(m, m) for _, _, m in measured] + [Cost(100, 100)]
    scores = PathScores(
        (*paths, whole), np.array(values), np.zeros(len(costs)), tuple(costs), ("a", "b"), 2.0, depths=(4, 6)
    )
    far = {path: scores.divergence[scores.place(path)] for path in paths}
    ranked = sorted(paths, key=lambda path: (far[path], scores.share(path)))
    options: dict[str, Any] = {"known": known, "steps": steps}
    best, found, every = ranked[0], *(scores.contenders(Cost(99, 99), one, **options) for one in (count, 99))
    assert found[0] == best == scores.best(Cost(99, 99)) and found == every[:count] and len(set(every)) == len(every)
    assert scores.contenders(1.0, count) == (whole,)
    # By hand: whoever is first between its ends, a mixture after all others, at most three times as far, or six in long
    # healings (however far, if the dearest anchor does not know the data); between the best's, a quarter farther. In
    # long healings to have no last block is an end too, however far the dearest anchor without it starts; but for what
    # is cut from an anchor that is nearer as a whole.
    times = {0: 3, 100: 3, 225: 4.5, 399: 3 * 3.99**0.5, 400: 6, 1000: 6}[steps] if known else np.inf
    ends = {path: ENDS[str(path)] for path in ranked}
    if steps >= 400:
        ends = {path: both and (*both, str(path) in TAILLESS) for path, both in ends.items()}
    anchor = [path for path in ranked if not path.joints and path != best][:1]
    small = Path.parse("0[:]")
    others: list[Path] = []
    near: list[Path] = []
    tailless = ("1[:1] 1[2:3] 1[4:5] 1[6:]", "1[:4] 1[6:]") if steps >= 400 else ()
    reach = [one for one in ranked if far[one] <= times * far[best] or str(one) in tailless]
    if small in reach:  # what is cut from it and no nearer is none to choose from
        cut = ("0[:2] 0[3:]", "0[:1] 0[2:3] 0[4:]", "0[:3] 0[4:]")
        reach = [one for one in reach if str(one) not in cut or ranked.index(one) < ranked.index(small)]
    for path in ranked[1:]:
        alike = [one for one in reach if ends[one] == ends[path] not in (None, ends[best])]
        simple = [one for one in alike if kind_of(one) != "mixed"] or alike
        if steps >= 400 and simple:  # the dearest of what is nearly as near
            simple = [one for one in simple if far[one] <= 1.25 * far[simple[0]]]
            simple.sort(key=scores.share, reverse=True)
        if simple[:1] == [path]:
            others.append(path)
        if ENDS[str(path)] == ENDS[str(best)] and far[path] <= 1.25 * far[best]:
            near.append(path)
    others.sort(key=lambda path: ENDS[str(path)][1] == 0)  # stable: those that end with the dearest anchor first
    others.sort(key=lambda path: steps >= 400 and str(path) in TAILLESS)  # and before that, those that have their end
    assert set(every) == {best, *anchor, *others, *near} and every[1 : 1 + len(anchor)] == tuple(anchor)
    others, near = ([path for path in of_one if path not in anchor] for of_one in (others, near))
    first = list(dict.fromkeys(path for pair in zip_longest(near, others) for path in pair if path is not None))
    assert list(every[1 + len(anchor) :]) == first
    with pytest.raises(ValueError, match="count=0"):
        scores.contenders(1.0, 0)


def test_an_anchor_takes_no_others_turn() -> None:
    texts = ("1[:1] 1[2:]", "1[:2] 1[3:]", "1[:3] 1[4:]", "0[:]", "1[:3] 0[3:]", "1[:]")
    costs = tuple(Cost(macs, macs) for macs in (80, 80, 80, 40, 60, 100))
    values = np.array([1.0, 1.1, 1.2, 2.0, 2.5, 0.0])
    scores = PathScores(tuple(map(Path.parse, texts)), values, values, costs, ("a", "b"), 2.0, depths=(4, 6))
    assert [str(path) for path in scores.contenders("90%")] == [texts[0], "0[:]", texts[1], "1[:3] 0[3:]"]


@pytest.mark.parametrize(
    ("joint", "seamless", "divergence", "steps", "healed"),
    [
        ("merged", (), 0.04, 4, "identity"),  # as files have it that do not say
        ("merged", (True, False), 0.06, 100, "merged"),
        ("merged", (True, False), 0.06, 200, "identity"),
        ("merged", (True, False), 0.16, 300, "merged"),
        ("merged", (True, False), 0.46, 1000, "identity"),
        ("merged", (True, False), 0.51, 1000, "merged"),
        ("least_squares", (), 0.01, 300, "least_squares"),
        ("least_squares", (True, False), 0.01, 100, "identity"),
        ("least_squares", (True, False), 0.06, 100, "least_squares"),
    ],
)
def test_little_that_is_cut_is_left_as_it_is_where_healing_follows(
    joint: str, seamless: tuple[bool, ...], divergence: float, steps: int, healed: str, tmp_path: FilePath
) -> None:
    paths = Path.parse("1[:2] 1[4:]"), Path.parse("1[:]")
    values, costs = np.array([divergence, 0.0]), (Cost(50, 50), Cost(100, 100))
    scores = PathScores(
        paths, values, np.zeros(2), costs, ("a", "b"), 2.0, joints=(joint, "least_squares"), depths=(4, 6),
        seamless=seamless,
    )  # fmt: skip
    for one in (scores, PathScores.load(scores.save(tmp_path / "paths.safetensors"))):
        assert (one.joint(paths[0]), one.joint(paths[0], steps=steps)) == (joint, healed)
        assert one.joint(paths[0], steps=steps, known=False) == ("identity" if one.seamless[0] else joint)
        assert one.joint(paths[0], known=False) == joint
        assert one.joint(paths[1], steps=steps) == "least_squares"


def test_scores_are_saved_and_drawn(tmp_path: FilePath) -> None:
    scores = made([(300, 2.0), (600, 0.5), (700, 0.6)])
    again = PathScores.load(scores.save(tmp_path / "paths.safetensors"))
    assert again.paths == scores.paths and again.costs == scores.costs and again.provenance == {"a": 1}
    assert (again.divergence == scores.divergence).all() and (again.error == scores.error).all()
    scores.plot(tmp_path / "picture")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert str(scores).count("\n") == 3 and "0[:2] 0[3:]" in str(scores) and "0.6000" not in str(scores)
