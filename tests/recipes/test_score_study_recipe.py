"""The score study's recipe: its tables as plain loops give them, what is refused, and its small Llamas."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

RECIPES = Path(__file__).parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))

import score_study  # noqa: E402
import small_llamas  # noqa: E402
from experiments.study import MeasuredStitch, score_outcomes  # noqa: E402

from klas_hf.paths import Stitch  # noqa: E402

NAMES = ("klas", "theta", "dm", "functional", "functional_theta", "functional, temperature 4", "cost")


def measured(seed: int, count: int = 24, names: tuple[str, ...] = NAMES) -> list[MeasuredStitch]:
    generator = np.random.default_rng(seed)
    values = {name: generator.random(count) + 0.1 for name in names}
    quality = -values[names[-3]] + 0.2 * generator.standard_normal(count)
    return [
        MeasuredStitch(
            Stitch(n + 1, 1), 100 + 7 * n, float(quality[n]), {name: float(v[n]) for name, v in values.items()}
        )
        for n in range(count)
    ]


@pytest.fixture
def families() -> dict[str, dict[int, list[MeasuredStitch]]]:
    return {"vit": {0: measured(1), 50: measured(2)}, "swin": {0: measured(3), 50: measured(4)}}


@pytest.fixture
def args(tmp_path: Path) -> score_study.StudyArguments:
    return score_study.StudyArguments(families=["vit", "swin"], lengths=[0, 50], output_dir=str(tmp_path))


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]


def test_the_ranking_is_the_mean_over_families_and_names_the_worst(families, args) -> None:
    outcomes = {(name, n): score_outcomes(families[name][n], resamples=2) for name in families for n in (0, 50)}
    heading, _, *rows = cells(score_study.ranking(outcomes, args))
    assert heading[:3] == ["score", "0 steps", "50 steps"] and {row[0] for row in rows} == set(NAMES)
    sums = []
    for score, first, second, correlations, worst in rows:
        regrets = {key: next(o.relative_regret for o in found if o.score == score) for key, found in outcomes.items()}
        means = [np.mean([regrets["vit", n], regrets["swin", n]]) for n in (0, 50)]
        assert [first, second] == [f"{mean:.0%}" for mean in means]
        sums.append(sum(means))
        for n, shown in zip((0, 50), correlations.split(" / "), strict=True):
            each = [
                spearmanr([one.values[score] for one in families[name][n]], [-one.quality for one in families[name][n]])
                for name in families
            ]
            assert float(shown) == pytest.approx(np.mean([one.statistic for one in each]), abs=0.006)
        family, length = max(regrets, key=lambda key: regrets[key])
        assert worst == f"{regrets[family, length]:.0%} ({family}, {length})"
    assert sums == sorted(sums)


def test_few_samples_are_compared_with_all(args) -> None:
    variants = {
        name: {n: measured(n + place, names=("8 samples", "functional", "temperature 2")) for n in (0, 50)}
        for place, name in enumerate(("vit", "swin"))
    }
    text = score_study.frugality(variants, args)
    stitches = variants["swin"][50]
    row = next(row for row in cells(text.split("swin, 50 steps")[1]) if row[0] == "8 samples")
    few, full = ([one.values[name] for one in stitches] for name in ("8 samples", "functional"))
    assert float(row[1]) == pytest.approx(spearmanr(few, full).statistic, abs=0.006)
    drop = spearmanr(few, [-one.quality for one in stitches]).statistic
    assert float(row[2]) == pytest.approx(drop, abs=0.006)


def test_halving_tries_both_cheap_scores(families, args) -> None:
    rows = cells(score_study.halving(families, args))
    assert {row[0] for row in rows} >= {"theta", "dm"} and len([row for row in rows if row[1] == "functional"]) == 16


def test_a_combination_is_fitted_to_the_other_families(families) -> None:
    found = score_study.combined(families, "vit", 50)
    assert all("combined" in one.values for one in found)
    changed = families | {
        "vit": {50: [MeasuredStitch(o.stitch, o.macs, -o.quality, o.values) for o in families["vit"][50]]}
    }
    again = score_study.combined(changed, "vit", 50)
    assert [one.values["combined"] for one in found] == [one.values["combined"] for one in again]
    alone = {"vit": families["vit"]}
    assert score_study.combined(alone, "vit", 50) == families["vit"][50]


def test_stitches_and_figure_are_written(families, args, tmp_path: Path) -> None:
    score_study.write_stitches(families, tmp_path / "stitches.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "stitches.jsonl").read_text().splitlines()]
    assert len(lines) == 4 * 24
    first = families["vit"][0][0]
    assert lines[0] == {
        "family": "vit", "steps": 0, "stitch": [1, 1], "macs": first.macs, "quality": first.quality,
        "scores": dict(first.values),
    }  # fmt: skip
    outcomes = {(name, n): score_outcomes(families[name][n], resamples=2) for name in families for n in (0, 50)}
    axes = score_study.draw(outcomes, args, tmp_path).axes[0]
    assert axes.get_title() == "what each score's choice loses, mean over 2 families"
    assert axes.get_xlabel() == "length of the fine-tuning, steps"
    assert axes.get_ylabel() == "regret, % of a random choice's"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "50"]
    assert (tmp_path / "regret.png").stat().st_size > 5000 and (tmp_path / "regret.svg").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"families": ["vit", "pvt"]}, "pvt"),
        ({"families": ["mobilenet"]}, "--anchors"),
        ({"families": ["mobilenet"], "data": "x", "anchors": ["one"]}, "--anchors"),
        ({"families": ["stories"], "stories": ["one"]}, "--stories"),
        ({"families": ["vit", "llama_within"], "middle": True}, r"--middle with the families \['llama_within'\]"),
    ],
)
def test_families_without_their_data_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_study.check(score_study.StudyArguments(**changes))


@pytest.mark.parametrize("family", small_llamas.PAIRS)
def test_small_llamas_are_trained_once_and_know_one_tokenizer(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = np.random.default_rng(0).integers(0, 2000, (40, 90))
    texts = [" ".join(f"word{number}" for number in row) for row in words]
    monkeypatch.setattr(small_llamas, "python_documentation", lambda: texts)
    monkeypatch.setattr(small_llamas, "VOCABULARY", 300)
    models, task, _ = small_llamas.documentation_pair(family, tmp_path, steps=2)
    assert "trained" in capsys.readouterr().out
    sizes = [(model.config.num_hidden_layers, model.config.hidden_size) for model in models]
    assert sizes == [(size.depth, size.width) for size in small_llamas.PAIRS[family]]
    assert not {tuple(s) for s in task.train} & ({tuple(s) for s in task.validation} | {tuple(s) for s in task.test})
    deep, wide = small_llamas.documentation_pair("llama_across", tmp_path, steps=2, middle=True)[0]
    capsys.readouterr()
    assert (deep.config.num_hidden_layers, wide.config.hidden_size) == (10, 128)
    again, *_ = small_llamas.documentation_pair(family, tmp_path, steps=2)
    assert "trained" not in capsys.readouterr().out
    for one, other in zip(models, again, strict=True):
        assert all((a == b).all() for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_stories_are_the_lines_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "stories.txt"
    path.write_text("Once.\n\nThe end.\nTwice.\n\n\nThe end.\n \n")
    assert small_llamas._stories(str(path)) == ["Once.\nThe end.", "Twice.\nThe end."]
    assert not re.search(small_llamas.LINE, "a\n\nb")
