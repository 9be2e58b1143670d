"""Scores as a value: laid out, saved, drawn."""

import dataclasses
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy import stats

from klas_hf.paths import Stitch
from klas_hf.scores.values import NEEDED, PROBED, SCORES, StitchScores, check_score
from klas_hf.stitch_costs import StitchCosts


def scores(m: int = 3, n: int = 5) -> StitchScores:
    generator = np.random.default_rng(0)
    return StitchScores(
        score="klas",
        cross=generator.gamma(2.0, size=(m, n)),
        capacity=generator.gamma(2.0, size=n - 1),
        cross_error=generator.random((m, n)),
        capacity_error=generator.random(n - 1),
        gamma_error=generator.random((m, n - 1)),
        sequences=12,
        tokens=345,
        costs=StitchCosts(
            tokens=128,
            source_blocks=np.arange(1, m + 1),
            target_blocks=np.arange(10, 10 + n),
            stitch=3,
            source_total=9,
            target_total=70,
            ends=2,
            source_parameters=np.arange(m),
            target_parameters=np.arange(n),
            stitch_parameters=4,
            ends_parameters=5,
        ),
        provenance={"source": {"name": "small"}, "seed": 3, "text": "Γ"},
    )


def test_gamma_is_theta_by_the_capacity_of_the_next_target_block() -> None:
    made = scores()
    for i in range(1, 4):
        for j in range(1, 5):
            expected = made.cross[i - 1, j - 1] / made.capacity[j - 1]
            assert made.gamma[i - 1, j - 1] == made.value_of(Stitch(i, j)) == pytest.approx(expected)
            assert made.values[i - 1, j] == made.value_of(Stitch(i, j))


def test_theta_can_rank_instead() -> None:
    made = dataclasses.replace(scores(), score="theta")
    assert made.value_of(Stitch(2, 3)) == made.cross[1, 2] != scores().value_of(Stitch(2, 3))


def test_the_targets_first_block_has_no_score() -> None:
    made = scores()
    assert np.isnan(made.values[:, 0]).all() and np.isnan(made.value_of(Stitch(2, 0)))
    assert made.stitches == tuple(Stitch(i, j) for i in range(1, 4) for j in range(1, 5))
    with pytest.raises(ValueError, match="out of range"):
        made.value_of(Stitch(1, 5))


def test_a_block_without_capacity_leaves_its_column_undefined_without_a_warning(
    recwarn: pytest.WarningsRecorder,
) -> None:
    made = scores()
    made.capacity[1], made.cross[0, 1] = 0.0, 0.0
    assert np.isnan(made.gamma[0, 1]) and np.isinf(made.gamma[1:, 1]).all()
    assert {stitch.target_start for stitch in made.stitches} == {1, 3, 4}
    made.plot()
    assert not recwarn.list


@pytest.mark.parametrize("quantity", ["cross", "capacity", "gamma"])
@pytest.mark.parametrize("confidence", [0.95, 0.5])
def test_intervals_are_normal_ones(quantity: str, confidence: float) -> None:
    made = scores()
    error = getattr(made, f"{quantity}_error")
    expected = stats.norm.interval(confidence, loc=getattr(made, quantity), scale=error)
    np.testing.assert_allclose(made.interval(quantity, confidence), expected, rtol=1e-12)


def test_the_usual_interval_is_gammas_at_95_percent() -> None:
    np.testing.assert_array_equal(scores().interval(), scores().interval("gamma", 0.95))
    with pytest.raises(ValueError, match=r"got quantity='kl'; expected one of \['cross', 'capacity', 'gamma'\]"):
        scores().interval("kl")


def functional(m: int = 3, n: int = 5) -> StitchScores:
    """Scores as they are without probes, the default."""
    generator = np.random.default_rng(7)
    nothing = np.full((m, n), np.nan)
    statistics = {name: generator.gamma(2.0, size=(m, n)) for name in ("functional", "functional_error", "dm")}
    return dataclasses.replace(
        scores(m, n),
        score="functional",
        cross=nothing,
        capacity=nothing[0, :-1],
        cross_error=nothing,
        capacity_error=nothing[0, :-1],
        gamma_error=nothing[:, :-1],
        statistics=statistics,
    )


def test_the_usual_interval_is_of_the_score_that_ranks() -> None:
    made = functional()
    expected = stats.norm.interval(0.5, loc=made.statistics["functional"], scale=made.statistics["functional_error"])
    np.testing.assert_allclose(made.interval(confidence=0.5), expected, rtol=1e-12)
    np.testing.assert_array_equal(made.interval(), made.interval("functional", 0.95))
    theta = dataclasses.replace(scores(), score="theta")
    np.testing.assert_array_equal(theta.interval(), theta.interval("cross"))
    with pytest.raises(ValueError, match=r"got quantity='gamma'; expected one of \['functional'\]"):
        made.interval("gamma")
    with pytest.raises(ValueError, match="got quantity='dm'; expected one of"):
        made.with_score("dm").interval()


def test_scores_without_probes_are_drawn() -> None:
    made = functional()
    (axes,) = (axes for axes in made.plot().axes if axes.get_title())
    assert axes.get_title() == "functional, nats"
    shown = axes.images[0].get_array()
    np.testing.assert_allclose(shown[:, :-1], made.values[:, 1:])
    assert shown.mask[:, -1].all()
    best = min(made.stitches, key=made.value_of)
    assert axes.lines[0].get_xydata().tolist() == [[best.target_start, best.source_stop]]


def test_beside_probes_the_score_that_ranks_is_drawn_too() -> None:
    titles = [axes.get_title() for axes in staged().with_score("functional").plot().axes if axes.get_title()]
    assert len(titles) == 3 and titles[2] == "functional, nats"


def test_printed_scores_are_a_few_lines_with_the_best_of_each_fifth_of_the_costs() -> None:
    made = dataclasses.replace(functional(), costs=dataclasses.replace(scores().costs, target_total=50))
    shown = str(made).splitlines()
    assert str(made) == repr(made) and len(shown) <= 7 and "nan" not in str(made)
    assert "functional of 12 stitches" in shown[0] and "small (3 blocks) → target (5 blocks)" in shown[0]
    assert "12 sequences, 345 tokens" in shown[0] and shown[-1] == "with_score also has: dm"
    best: dict[int, Stitch] = {}
    for stitch in sorted(made.stitches, key=made.value_of):
        macs = made.costs.of(stitch)[0]
        if 9 <= macs <= 50:
            best.setdefault(min((macs - 9) * 5 // 41, 4), stitch)
    assert len(best) > 2
    for line, (_, stitch) in zip(shown[1:-1], sorted(best.items()), strict=True):
        share = made.costs.of(stitch)[0] / 50
        assert line.split() == [f"{share:.0%}", *["of", "the", "target's", "MACs:"], *str(stitch).split(),
                                f"{made.value_of(stitch):.4g}"]  # fmt: skip


def test_a_saved_file_gives_everything_back(tmp_path: Path) -> None:
    made = dataclasses.replace(scores(), score="theta")
    path = made.save(tmp_path / "folder" / "scores.safetensors")
    again = StitchScores.load(path)
    assert_same(again, made)
    assert again.stitches == made.stitches and again.costs.of(Stitch(2, 1)) == made.costs.of(Stitch(2, 1))


def assert_same(again: StitchScores, made: StitchScores) -> None:
    for field in dataclasses.fields(StitchScores):
        if field.name not in ("costs", "statistics"):
            np.testing.assert_array_equal(getattr(again, field.name), getattr(made, field.name), field.name)
    assert again.statistics.keys() == made.statistics.keys()
    for name, statistic in made.statistics.items():
        np.testing.assert_array_equal(again.statistics[name], statistic, name)
    for field in dataclasses.fields(StitchCosts):
        one, other = getattr(again.costs, field.name), getattr(made.costs, field.name)
        assert type(one) is type(other)
        np.testing.assert_array_equal(one, other, field.name)


def staged() -> StitchScores:
    """Scores with every statistic, of the anchors 1 and 3 of some, of two stages; block and pair costs differ."""
    generator = np.random.default_rng(5)
    made = scores()
    stages = np.array([0, 0, 1]), np.array([0, 0, 1, 1, 1])
    costs = dataclasses.replace(
        made.costs,
        tokens=0,
        stitch=np.arange(15).reshape(5, 3).T,  # not contiguous
        source=1,
        target=3,
        source_stages=stages[0],
        target_stages=stages[1],
        allowed=stages[0][:, None] == np.concatenate([stages[1][:1], stages[1][:-1]]),
        image_height=32,
        image_width=48,
    )
    names = ("theta_reversed", "mse", "ce", "dm", "cka", "class_cka", "cross_shuffled", "functional", "stitched_loss")
    statistics = {name: generator.random((3, 5)) for name in names}
    return dataclasses.replace(
        made, costs=costs, statistics=statistics | {"capacity_shuffled": generator.random(4) + 0.1}
    )


def test_a_saved_file_gives_back_stages_and_statistics(tmp_path: Path) -> None:
    made = staged().with_score("cka")
    again = StitchScores.load(made.save(tmp_path / "scores.safetensors"))
    assert_same(again, made)
    assert again.costs.allowed is not None and again.costs.allowed.dtype == bool
    assert again.stitches == made.stitches and again.stitches[0].source == 1


def test_the_scores_that_klas_is_compared_with() -> None:
    made = staged()
    of = made.statistics
    for i in range(1, 4):
        for j in range(1, 5):
            expected = {
                "klas": made.cross[i - 1, j - 1] / made.capacity[j - 1],
                # Block 3 begins the second stage; the first has blocks 1 and 2, so one capacity within it.
                "klas_staged": made.cross[i - 1, j - 1] / made.capacity[0 if j == 2 else j - 1],
                "theta": made.cross[i - 1, j - 1],
                **{name: of[name][i - 1, j - 1] for name in ("theta_reversed", "mse", "ce", "dm")},
                **{name: of[name][i - 1, j - 1] for name in ("functional", "stitched_loss")},
                "functional_theta": (of["functional"][i - 1, j - 1] * made.cross[i - 1, j - 1]) ** 0.5,
                **{name: 1 - of[name][i - 1, j - 1] for name in ("cka", "class_cka")},
                "klas_shuffled": of["cross_shuffled"][i - 1, j - 1] / of["capacity_shuffled"][j - 1],
            }
            assert expected.keys() == set(made.available) == SCORES.keys() == NEEDED.keys()
            for name, value in expected.items():
                ranked = made.with_score(name)
                assert ranked.score == name
                stays = made.costs.possible[i - 1, j]
                assert ranked.value_of(Stitch(i, j)) == pytest.approx(value if stays else np.nan, nan_ok=True)


def test_stitches_across_stages_have_no_value() -> None:
    made = staged()
    pairs = [(s.source_stop, s.target_start) for s in made.stitches]
    assert pairs == [(1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (3, 4)]
    assert {(s.source, s.target) for s in made.stitches} == {(1, 3)}
    assert np.isfinite(made.values).sum() == 6
    theta, gamma = (axes for axes in made.plot().axes if axes.get_title())
    shown = gamma.images[0].get_array()
    blank = {(i + 1, j + 1) for i, j in np.argwhere(shown.mask).tolist()}
    assert blank == {(i, j) for i in (1, 2, 3) for j in (1, 2, 3, 4, 5)} - set(pairs)
    assert not theta.images[0].get_array().mask.any()


def test_a_score_without_its_statistics_is_refused_and_the_others_named() -> None:
    made = staged()
    few = {name: made.statistics[name] for name in ("mse", "cross_shuffled")}
    fewer = dataclasses.replace(made, statistics=few)
    assert fewer.available == ("klas", "klas_staged", "theta", "mse")
    known = r"\['klas', 'klas_staged', 'theta', 'mse'\]"
    message = rf"got score='klas_shuffled'; expected one of {known}.*needs \['capacity_shuffled'\]"
    for call in (lambda: fewer.with_score("klas_shuffled"), lambda: check_score("klas_shuffled", [*PROBED, *few])):
        with pytest.raises(ValueError, match=message):
            call()
    check_score("klas_shuffled", ["capacity_shuffled", "cross_shuffled"])
    with pytest.raises(ValueError, match=r"got score='mse'; expected one of \['klas', 'klas_staged', 'theta'\]"):
        check_score("mse")
    assert scores().available == ("klas", "klas_staged", "theta")


def test_staged_gamma_where_no_stage_has_two_blocks_is_gamma() -> None:
    made = scores()
    np.testing.assert_array_equal(made.staged_gamma, made.gamma)  # one stage for all
    alone = dataclasses.replace(made.costs, target_stages=np.arange(5), source_stages=np.arange(3))
    np.testing.assert_array_equal(dataclasses.replace(made, costs=alone).staged_gamma, made.gamma)


@pytest.mark.parametrize(("name", "shape"), [("mse", (3, 4)), ("capacity_shuffled", (3, 5))])
def test_statistics_of_another_shape_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"got the statistic '{name}' of shape .*expected \("):
        dataclasses.replace(scores(), statistics={name: np.ones(shape)})


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"weight": np.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="without stitch scores; expected one of StitchScores.save"):
        StitchScores.load(tmp_path / "model.safetensors")


def test_an_unknown_score_is_refused_and_the_known_ones_named(tmp_path: Path) -> None:
    for call in (lambda: check_score("kl"), lambda: dataclasses.replace(scores(), score="kl")):
        with pytest.raises(
            ValueError, match=r"got score='kl'; expected one of \['ce', 'cka', .*'theta', 'theta_reversed'\]"
        ):
            call()
    path = scores().save(tmp_path / "scores.safetensors")
    content = path.read_bytes().replace(rb"\"score\": \"klas\"", rb"\"score\": \"spam\"")
    assert b"spam" in content
    path.write_bytes(content)
    with pytest.raises(ValueError, match="got score='spam'"):
        StitchScores.load(path)


def test_every_score_gives_a_value_for_every_stitch() -> None:
    for name, rule in SCORES.items():
        check_score(name, NEEDED[name])
        assert rule(staged()).shape == (3, 4)


@pytest.mark.parametrize("name", ["heat.png", "heat.svg", "heat", "heat.1B.png"])
def test_heatmaps_are_written_as_png_and_svg(tmp_path: Path, name: str) -> None:
    figure = scores().plot(tmp_path / "folder" / name)
    stem = name.removesuffix(".png").removesuffix(".svg")
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == [f"{stem}.png", f"{stem}.svg"]
    pixels = matplotlib.image.imread(tmp_path / "folder" / f"{stem}.png")
    assert pixels.shape[0] > 300 and len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 50
    assert (tmp_path / "folder" / f"{stem}.svg").read_text().count("<g id=") > 20
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert len(titles) == 2 and titles[0].startswith("Θ") and titles[1].startswith("Γ")


def test_heatmaps_show_the_values_and_cross_the_lowest() -> None:
    made = scores()
    theta, gamma = (axes for axes in made.plot().axes if axes.get_title())
    np.testing.assert_allclose(theta.images[0].get_array(), made.cross)
    shown = gamma.images[0].get_array()
    np.testing.assert_allclose(shown[:, :-1], made.gamma)
    assert shown.mask[:, -1].all()  # the last target block has no capacity after it
    for axes, values in ((theta, made.cross), (gamma, made.gamma)):
        i, j = np.unravel_index(values.argmin(), values.shape)
        assert axes.lines[0].get_xydata().tolist() == [[j + 1, i + 1]]


def test_scores_with_a_zero_are_drawn(recwarn: pytest.WarningsRecorder) -> None:
    """An anchor with itself has Θ = 0, which a logarithmic scale leaves blank."""
    made = scores(2, 2)
    made.cross[:] = [[0.0, 1.0], [1.0, 0.0]]
    theta, _ = (axes for axes in made.plot().axes if axes.get_title())
    assert theta.images[0].get_array().mask.tolist() == [[True, False], [False, True]]
    assert not recwarn.list
