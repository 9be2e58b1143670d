"""Stitches and their costs, against sums written out block by block."""

import dataclasses

import numpy as np
import pytest

from klas_hf.paths import Path, Slice, Stitch
from klas_hf.stitch_costs import StitchCosts


def costs(source_total: int = 1_050, target_total: int = 9_500) -> StitchCosts:
    """Costs in which no two sums of blocks are equal."""
    return StitchCosts(
        tokens=7,
        source_blocks=np.array([100, 203, 405]),
        target_blocks=np.array([1_000, 2_007, 4_011, 1_900]),
        stitch=31,
        source_total=source_total,
        target_total=target_total,
        ends=500,
        source_parameters=np.array([11, 23, 47]),
        target_parameters=np.array([101, 211, 431, 863]),
        stitch_parameters=5,
        ends_parameters=60,
    )


def test_every_cost_is_the_sum_of_what_runs() -> None:
    got = costs()
    assert got.macs.shape == got.parameters.shape == (3, 4)
    for i in range(1, 4):
        for j in range(4):
            macs = sum(got.source_blocks[:i].tolist()) + 31 + sum(got.target_blocks[j:].tolist()) + 500
            parameters = sum(got.source_parameters[:i].tolist()) + 5 + sum(got.target_parameters[j:].tolist()) + 60
            assert got.of(Stitch(i, j)) == (macs, parameters)
            assert (got.macs[i - 1, j], got.parameters[i - 1, j]) == (macs, parameters)


@pytest.mark.parametrize("pair", [(4, 0), (1, 4)])
def test_a_stitch_beyond_the_anchors_is_refused(pair: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"out of range.*source of 3.*target of 4.*1 <= i <= 3 and 0 <= j <= 3"):
        costs().of(Stitch(*pair))


def test_the_last_stitches_in_range_are_accepted() -> None:
    Stitch(3, 3).check(3, 4)
    Stitch(1, 0).check(3, 4)


@pytest.mark.parametrize("pair", [(0, 1), (-1, 1), (1, -1)])
def test_negative_or_empty_sides_are_refused(pair: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="source_stop >= 1"):
        Stitch(*pair)


def test_pairs_are_read_as_stitches() -> None:
    assert Stitch.of((2, 3)) == Stitch.of([np.int64(2), 3]) == Stitch.of(Stitch(2, 3)) == Stitch(2, 3)
    assert Stitch.of(Stitch(2, 3, source=1, target=2)).target == 2
    assert str(Stitch(2, 3)) == "(2, 3)"


@pytest.mark.parametrize("wrong", [3, (1,), (1, 2, 3), (1, 2, 0, 1, 2), (1.5, 2), "12", None])
def test_what_is_no_pair_of_whole_numbers_is_refused(wrong: object) -> None:
    with pytest.raises(TypeError, match=r"expected Stitch\(i, j\) or a pair"):
        Stitch.of(wrong)


def test_a_reversed_pair_of_anchors_is_refused_and_an_equal_one_is_not() -> None:
    with pytest.raises(ValueError, match=r"9,501 MACs.*9,500: reversed.*Swap"):
        costs(source_total=9_501).check_direction()
    costs(source_total=9_500).check_direction()


def test_a_stitch_of_other_anchors_says_which() -> None:
    assert str(Stitch(5, 7)) == str(Stitch(5, 7, 0, 1)) == "(5, 7)"
    assert str(Stitch(5, 7, 0, 2)) == "0→2 (5, 7)"
    assert Stitch.of((5, 7, 1, 2)) == Stitch(5, 7, source=1, target=2) != Stitch(5, 7)


def test_a_stitching_layers_cost_may_depend_on_its_pair() -> None:
    by_pair = np.arange(12).reshape(3, 4) * 1_000
    got = dataclasses.replace(costs(), stitch=by_pair, stitch_parameters=by_pair + 1)
    for i in range(1, 4):
        for j in range(4):
            macs, parameters = costs().of(Stitch(i, j))
            expected = macs - 31 + by_pair[i - 1, j], parameters - 5 + by_pair[i - 1, j] + 1
            assert got.of(Stitch(i, j)) == expected


def test_every_stitch_is_possible_unless_told_otherwise() -> None:
    assert costs().possible.shape == (3, 4) and costs().possible.all()
    allowed = np.arange(12).reshape(3, 4) % 2 == 0
    np.testing.assert_array_equal(dataclasses.replace(costs(), allowed=allowed).possible, allowed)


@pytest.mark.parametrize(
    ("field", "shape", "expected"),
    [
        ("allowed", (4, 3), r"\(3, 4\): anchors of 3 and 4"),
        ("source_stages", (4,), r"\(3,\): anchors of 3 and 4"),
        ("target_stages", (3,), r"\(4,\): anchors of 3 and 4"),
        ("stitch", (3,), r"one number or the shape \(3, 4\)"),
        ("stitch_parameters", (4, 3), r"one number or the shape \(3, 4\)"),
    ],
)
def test_arrays_of_another_shape_are_refused(field: str, shape: tuple[int, ...], expected: str) -> None:
    with pytest.raises(ValueError, match=f"got {field} of shape .*; expected {expected}"):
        dataclasses.replace(costs(), **{field: np.ones(shape, dtype=int)})


def test_a_text_is_parsed_and_not_taken_for_slices() -> None:
    for wrong in ("0[:8] 1[14:]", [Slice(0)], (Stitch(1, 1),)):
        with pytest.raises(TypeError, match="expected a tuple of Slice. A text is read by Path.parse"):
            Path(wrong)
