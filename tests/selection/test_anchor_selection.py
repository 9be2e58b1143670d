"""Anchor pairs against every subset of anchors tried in turn."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klas_hf.selection.anchors import AnchorRule, AnchorSelection, choose_pairs


def divergences(anchors: int, seed: int = 0) -> np.ndarray:
    made = np.random.default_rng(seed).gamma(1.0, size=(anchors, anchors))
    np.fill_diagonal(made, 0.0)
    return made


@given(st.lists(st.integers(1, 6), min_size=2, max_size=6).filter(lambda m: len(set(m)) > 1), st.integers(0, 10**6))
@settings(max_examples=120, deadline=None)
def test_the_least_path_is_the_best_of_all_subsets(macs: list[int], seed: int) -> None:
    divergence = divergences(len(macs), seed)
    sums = {}
    for size in range(2, len(macs) + 1):
        for path in itertools.permutations(range(len(macs)), size):
            costs = [macs[k] for k in path]
            rising = all(a < b for a, b in itertools.pairwise(costs))
            if rising and costs[0] == min(macs) and costs[-1] == max(macs):
                sums[tuple(itertools.pairwise(path))] = sum(divergence[p] for p in itertools.pairwise(path))
    assert choose_pairs(divergence, macs) == min(sums, key=sums.__getitem__)


def test_both_of_the_papers_choices_are_reproduced() -> None:
    """A middle anchor is passed through where that is less in sum, and left out where it is not."""
    macs = [17, 1, 4]  # base, tiny, small
    near = np.array([[0, 9, 9], [5.0, 0, 2.0], [2.5, 9, 0]])
    assert choose_pairs(near, macs, "least_kl") == ((1, 2), (2, 0))
    far = np.array([[0, 0.1, 0.1], [4.0, 0, 2.0], [2.5, 0.1, 0]])
    assert choose_pairs(far, macs) == ((1, 0),)


def test_nearest_are_neighbours_by_cost_and_all_are_all() -> None:
    macs = [17, 1, 4, 9]
    assert choose_pairs(divergences(4), macs, "nearest") == ((1, 2), (2, 3), (3, 0))
    assert set(choose_pairs(divergences(4), macs, "all")) == {(1, 2), (1, 3), (1, 0), (2, 3), (2, 0), (3, 0)}
    assert choose_pairs(divergences(3), [5, 5, 1], "all") == ((2, 0), (2, 1))


def test_what_cannot_be_chosen_from_is_refused() -> None:
    three = divergences(3)
    holed = np.where(np.eye(3)[::-1] == 1, np.nan, three)
    for divergence, macs, rule, message in (
        (three, [1, 2, 3], "kl", r"got rule='kl'; expected one of \['all', 'least_kl', 'nearest'\]"),
        (three, [1, 2], "all", r"shape \(3, 3\) and 2 costs"),
        (three[:1, :1], [1], "all", "expected at least two anchors"),
        (holed, [1, 2, 3], "least_kl", "NaN or infinite"),
        (three, [4, 4, 4], "least_kl", "got anchors that all cost 4 MACs"),
        (three, [4, 7, 4], "nearest", r"got anchors \[\(0, 2\)\] of equal MACs"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_pairs(divergence, macs, rule)


def selection(names: tuple[str, ...] = ("base", "tiny", "small"), rule: AnchorRule = "least_kl") -> AnchorSelection:
    macs = (17_000_000, 1_000_000, 4_000_000)
    divergence = np.array([[0, 9, 9], [5.0, 0, 2.0], [2.5, 9, 0]])
    return AnchorSelection(names, macs, divergence, choose_pairs(divergence, macs, rule), rule)


def test_the_table_lists_pairs_by_divergence_with_the_choice_marked() -> None:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in str(selection()).splitlines()]
    assert cells[0] == ["source", "target", "M MACs", "KL, nats", "least_kl"]
    assert cells[2:] == [
        ["tiny", "small", "1.0 → 4.0", "2.0000", "yes"],
        ["small", "base", "4.0 → 17.0", "2.5000", "yes"],
        ["tiny", "base", "1.0 → 17.0", "5.0000", ""],
    ]


def test_the_heatmap_names_the_anchors_and_marks_the_choice(tmp_path: Path) -> None:
    made = selection()
    figure = made.plot(tmp_path / "anchors.png")
    axes = figure.axes[0]
    for axis in (axes.xaxis, axes.yaxis):
        assert [label.get_text() for label in axis.get_ticklabels()] == ["base", "tiny", "small"]
        assert axis.get_ticklocs().tolist() == [1, 2, 3]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("target", "source")
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[3, 2]], [[1, 3]]]  # (target, source), from 1
    shown = axes.images[0].get_array()
    assert shown.mask.diagonal().all() and shown[1, 2] == 2.0
    assert (tmp_path / "anchors.svg").exists()


def test_an_anchor_listed_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got the anchors \['tiny'\] more than once"):
        selection(("tiny", "tiny", "small"))
    with pytest.raises(ValueError, match="got 2 names for 3 anchors"):
        selection(("tiny", "small"))
