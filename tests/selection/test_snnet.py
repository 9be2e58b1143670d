"""SN-Net's stitches: the published counts, and lists written by hand."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest

from klas_hf.paths import Stitch
from klas_hf.selection.choice import StitchSelection
from klas_hf.selection.snnet import Stages, snnet_groups, snnet_stitches
from klas_hf.stitch_costs import StitchCosts

ONE = 10  # MACs of a source block; target blocks cost three times as much


def anchors(source: list[int], target: list[int], positions: tuple[int, int] = (0, 1)) -> StitchCosts:
    """Costs of two anchors with so many blocks per stage; only blocks of one stage can be stitched."""
    m, n = sum(source), sum(target)
    of_source, of_target = (np.repeat(np.arange(len(depths)), depths) for depths in (source, target))
    # T stands for the output of target block j (from 1), which has the grid of block j - 1 (from 0).
    reached = np.concatenate([of_target[:1], of_target[:-1]])
    return StitchCosts(
        tokens=0,
        source_blocks=np.full(m, ONE),
        target_blocks=np.full(n, 3 * ONE),
        stitch=1,
        source_total=m * ONE,
        target_total=3 * n * ONE,
        ends=0,
        source_parameters=np.full(m, 1),
        target_parameters=np.full(n, 1),
        stitch_parameters=1,
        ends_parameters=0,
        source=positions[0],
        target=positions[1],
        source_stages=of_source,
        target_stages=of_target,
        allowed=of_source[:, None] == reached,
    )


def pairs_of(selection: StitchSelection) -> list[tuple[int, int]]:
    return sorted((stitch.source_stop, stitch.target_start) for stitch in selection)


@pytest.mark.parametrize(
    ("depths", "stages", "published"),
    [
        ([[12], [12], [12]], "all_but_last", 71),  # DeiT Ti, S, B
        ([[2, 2, 6, 2], [2, 2, 18, 2], [2, 2, 18, 2]], "all_but_last", 41),  # Swin Ti, S, B
        ([[4, 4, 4], [4, 4, 4]], "all_but_last", 8),  # LeViT
        ([[2, 2, 2, 2], [3, 4, 6, 3]], "middle", 10),  # ResNet-18 and 50
        ([[2, 2, 2, 2], [2, 2, 6, 2]], "middle", 8),  # ResNet-18 and Swin-Ti
    ],
)
def test_the_published_counts_come_out(depths: list[list[int]], stages: Stages, published: int) -> None:
    every = [anchors(a, b, (k, k + 1)) for k, (a, b) in enumerate(pairwise(depths))]
    got = snnet_stitches(every, stages=stages)
    assert len(got) + len(depths) == published
    assert len(set(got)) == len(got)
    assert {(stitch.source, stitch.target) for stitch in got} == {(one.source, one.target) for one in every}


def test_equal_depths_of_one_stage_join_every_pair_of_a_window() -> None:
    expected = [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 1), (3, 2)]  # (a, b): 00 01 10 11 12 21 22
    made = anchors([3], [3])
    assert pairs_of(snnet_stitches(made)) == expected
    without = dataclasses.replace(made, source_stages=None, target_stages=None, allowed=None)
    assert pairs_of(snnet_stitches(without)) == expected
    paired = [(1, 0), (2, 1), (3, 2)]
    assert pairs_of(snnet_stitches(made, window=1)) == paired
    assert pairs_of(snnet_stitches(made, window=3)) == [(i, j) for i in (1, 2, 3) for j in (0, 1, 2)]


def test_unequal_depths_of_one_stage_are_mapped_and_only_go_forwards() -> None:
    """Two blocks fill four places as 0 0 1 1."""
    assert pairs_of(snnet_stitches(anchors([2], [4]))) == [(1, 1), (1, 2), (2, 3)]
    assert pairs_of(snnet_stitches(anchors([2], [4]), window=3)) == [(1, 1), (1, 2), (1, 3), (2, 3)]


def test_stages_are_joined_one_by_one() -> None:
    """ResNet-18 and Swin-Ti: the six places of the third stage are filled 0 0 0 1 1 1."""
    middle = [(3, 3), (5, 5), (5, 6), (5, 7), (6, 8), (6, 9)]
    made = anchors([2, 2, 2, 2], [2, 2, 6, 2])
    assert pairs_of(snnet_stitches(made, stages="middle")) == middle
    assert pairs_of(snnet_stitches(made)) == [(1, 1), *middle]


def test_a_deeper_source_is_mapped_too() -> None:
    """Five blocks on three places: 0, 1, 3."""
    made = dataclasses.replace(anchors([5, 1], [3, 1]), source_total=0)
    assert pairs_of(snnet_stitches(made)) == [(1, 1), (2, 2)]


def test_nearest_interpolation_is_torchs() -> None:
    import torch

    for source in range(1, 9):
        for target in range(source, 20):
            filled = torch.nn.functional.interpolate(torch.arange(source).float()[None, None], target).flatten()
            expected = sorted({(int(filled[b - 1]) + 1, b) for b in range(1, target)})
            if expected:
                assert pairs_of(snnet_stitches(anchors([source, 1], [target, 1]))) == expected


def test_stitches_outside_the_anchors_costs_are_kept_and_counted() -> None:
    """(i, j) costs 10 i + 30 (3 - j) + 1, against the target's 90."""
    made = anchors([3], [3])
    got = snnet_stitches(made)
    macs = {stitch: made.of(stitch)[0] for stitch in got}
    dear = [stitch for stitch, cost in macs.items() if not 30 <= cost <= 90]
    assert sorted(dear) == [Stitch(1, 0), Stitch(2, 0), Stitch(3, 1)]
    assert (got.rule, got.outside, got.candidates) == ("snnet", 3, len(got) - 3)
    assert list(got.macs) == sorted(got.macs) == [macs[stitch] for stitch in got]
    assert set(got.buckets) == {-1} and np.isnan(got.values).all() and len(got.values) == len(got)


def test_what_cannot_be_stitched_is_refused() -> None:
    made = anchors([2, 2, 2], [2, 2, 2])
    allowed = made.possible.copy()
    allowed[2, 3] = False
    for given, options, message in (
        (made, {"stages": "last"}, r"got stages='last'; expected one of \['all_but_last', 'middle'\]"),
        (made, {"window": 0}, "got window=0; expected at least 1"),
        (made, {"window": 1}, "got no stitch with window=1 and stages='all_but_last'"),
        (anchors([2, 2], [2, 2]), {"stages": "middle"}, "got no stitch"),
        (anchors([2, 2], [2, 2, 2]), {}, r"got the stages \[0, 1\] of the source and \[0, 1, 2\] of the target"),
        (dataclasses.replace(made, allowed=allowed), {}, r"got the stitches \[\(3, 3\)\], whose blocks have other"),
        (dataclasses.replace(made, source_total=10**6), {}, "reversed"),
        ([], {}, "got 0 selections"),
    ):
        with pytest.raises(ValueError, match=message):
            snnet_stitches(given, **options)


def test_layers_are_shared_within_a_window_of_freely_paired_anchors() -> None:
    costs = [anchors([4], [4], (0, 1)), anchors([4], [4], (1, 2))]
    chosen = snnet_stitches(costs)
    numbers = dict(zip(chosen, snnet_groups(chosen, costs), strict=True))
    # Windows {0, 1}, {1, 2} and {2, 3} of each pair; (a, b) is Stitch(a + 1, b), and (1, 1) is of the first window.
    windows = [[(0, 0), (0, 1), (1, 0), (1, 1)], [(1, 2), (2, 1), (2, 2)], [(2, 3), (3, 2), (3, 3)]]
    for source in (0, 1):
        for window in windows:
            assert len({numbers[Stitch(a + 1, b, source, source + 1)] for a, b in window}) == 1
    assert set(numbers.values()) == set(range(6))


def test_layers_of_staged_anchors_are_their_own() -> None:
    costs = anchors([2, 2, 6, 2], [2, 2, 18, 2])
    chosen = snnet_stitches(costs)
    assert snnet_groups(chosen, costs) == tuple(range(19))


def test_groups_need_the_costs_of_every_pair() -> None:
    with pytest.raises(ValueError, match="costs of the anchors"):
        snnet_groups([Stitch(1, 1, 4, 5)], anchors([3], [3]))
