"""The report of a comparison: areas, gains and correlations as rows give them by hand, and who won, whoever it is."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experiments.image_comparison import ComparisonSettings, ImageComparison, ImageTask
from experiments.image_report import area, curve_rows, paired, report
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from klas_hf import TrainingConfig
from klas_hf.data.images import ImageSet
from klas_hf.rows import ResultRow

CLASSES, SEEDS = 3, (0, 1, 4)
TRAINING = TrainingConfig(
    trainable="full", gradient_accumulation_steps=1, max_steps=3, per_device_batch_size=8, learning_rate=1e-2
)
SETTINGS = ComparisonSettings(
    rules=["klas", "snnet", "random"], seeds=list(SEEDS), buckets=3, threshold=0.1, batch_size=16,
    calibration_images=20, probe_epochs=2,
)  # fmt: skip


def vit(depth: int, width: int) -> PreTrainedModel:
    torch.manual_seed(depth)
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, num_labels=CLASSES, num_hidden_layers=depth, hidden_size=width,
        num_attention_heads=2, intermediate_size=2 * width, initializer_range=0.5,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def images(count: int, seed: int, classes: int = CLASSES) -> ImageSet:
    pixels = torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return ImageSet(pixels, [n % classes for n in range(count)], ["a", "b", "c"])


def compared(folder: Path, settings: ComparisonSettings = SETTINGS, **changes: Any) -> ImageComparison:
    task = replace(ImageTask(images(24, 1), images(24, 2), images(24, 3), (0.5,), (0.3,)), **changes)
    return ImageComparison([vit(3, 8), vit(4, 16)], ["small", "large"], task, settings, TRAINING, folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison that was run."""
    folder = tmp_path_factory.mktemp("finished")
    compared(folder).run()
    return folder


@pytest.fixture
def made_up(finished: Path, tmp_path: Path) -> Callable[..., ImageComparison]:
    """The comparison with other accuracies in its rows: `accuracy(rule, seed, macs)`."""

    def changed(
        accuracy: Callable[[str, int, int], float],
        seeds: Sequence[int] = SEEDS,
        leave_out: Callable[[dict[str, Any]], bool] = lambda row: False,
    ) -> ImageComparison:
        folder = tmp_path / "changed"
        shutil.copytree(finished, folder, dirs_exist_ok=True)
        header, *rows = (json.loads(line) for line in (finished / "rows.jsonl").read_text().splitlines())
        rows = [row for row in rows if not leave_out(row)]
        for row in rows:
            row["metrics"]["accuracy"] = accuracy(row["rule"], row["seed"], row["macs"])
        (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [header, *rows]))
        return compared(folder, replace(SETTINGS, seeds=list(seeds)))

    return changed


def wavy(rule: str, seed: int, macs: int) -> float:
    """An accuracy that differs everywhere."""
    generator = np.random.default_rng([seed, macs, *map(ord, rule)])
    return float(generator.uniform(0.2, 0.9))


def table(text: str, heading: str) -> dict[str, list[str]]:
    """Cells of the first table below a heading, by their first column."""
    below = text.split(heading, 1)[1].split("|---", 1)[1].split("\n\n")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in below.splitlines()[1:]]
    return {line[0]: line[1:] for line in lines}


def sentence(text: str) -> str:
    return next(line for line in text.splitlines() if line.startswith("**"))


# ---- areas


def by_cost(rows: Sequence[ResultRow]) -> tuple[list[float], list[float]]:
    """Costs in order, and the best accuracy at each."""
    costs = sorted({row.macs for row in rows})
    return costs, [max(row.metrics["accuracy"] for row in rows if row.macs == cost) for cost in costs]


def hand_area(rows: Sequence[ResultRow], low: float, high: float) -> float:
    costs, values = by_cost(rows)
    x = sorted({low, high, *(cost for cost in costs if low < cost < high)})
    return float(np.trapezoid(np.interp(x, costs, values), x) / (high - low))


def hand_front_area(rows: Sequence[ResultRow], low: float, high: float) -> float:
    costs, values = by_cost(rows)
    kept = [n for n, value in enumerate(values) if value > max([-1.0, *values[:n]])]
    costs, values = [costs[n] for n in kept], [values[n] for n in kept]
    # Between its points, and outside them too, where numpy's interpolation is level.
    x = sorted({low, high, *(cost for cost in costs if low < cost < high)})
    return float(np.trapezoid(np.interp(x, costs, values), x) / (high - low))


def test_areas_are_those_of_the_rows(made_up: Callable[..., ImageComparison]) -> None:
    comparison = made_up(wavy)
    text = report(comparison)
    low, high = comparison.macs
    found = table(text, "## Rules")
    assert found.keys() == set(SETTINGS.rules)
    for rule, cells in found.items():
        of_seed = [[row for row in comparison.rows if row.rule == rule and row.seed == seed] for seed in SEEDS]
        for cell, by_hand in zip(cells, (hand_area, hand_front_area), strict=False):
            areas = [by_hand(rows, low, high) for rows in of_seed]
            assert cell == f"{np.mean(areas):.4f} ± {stats.sem(areas):.4f}"
    assert (comparison.output / "report.md").read_text() == text + "\n"
    for name in ("curve.png", "curve.svg", "heatmap-0-1.png", "probes.png", "anchors.png"):
        assert (comparison.output / name).stat().st_size > 1000
    stitches = (comparison.output / "stitches.md").read_text()
    for stitch in comparison.selection("klas", 0):
        assert f"| {stitch.path} " in stitches


def rows_at(points: Sequence[tuple[int, float]]) -> list[ResultRow]:
    return [ResultRow("klas", (1, n + 1), 0, macs, 1, {"accuracy": value}) for n, (macs, value) in enumerate(points)]


@given(
    st.lists(st.tuples(st.integers(0, 60), st.floats(0, 1)), max_size=8),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_the_front_is_level_beyond_its_best_and_never_below_a_cheaper_model(
    others: list[tuple[int, float]], first: float, last: float
) -> None:
    rows = rows_at([(10, first), (50, last), *others])
    whole, front = area(rows, "accuracy", (10.0, 50.0))
    assert whole == pytest.approx(hand_area(rows, 10, 50))
    assert front == pytest.approx(hand_front_area(rows, 10, 50), abs=1e-6)


def test_a_rule_that_joins_no_stitch_to_an_anchor_has_it_as_it_was_given(
    made_up: Callable[..., ImageComparison],
) -> None:
    comparison = made_up(wavy, leave_out=lambda row: row["rule"] == "klas" and row["path"] == "0[:]")
    rows = curve_rows(comparison, "klas", 1)
    (given,) = [row for row in comparison.rows if row.rule == "anchor" and row.path == "0[:]"]
    assert given in rows and min(rows, key=lambda row: row.macs) == given
    assert [row.path for row in rows if not row.joints] == ["1[:]", "0[:]"]
    assert all(row.rule == "snnet" for row in curve_rows(comparison, "snnet", 1))
    report(comparison)  # the curve reaches over the whole interval


# ---- who won


def test_klas_wins(made_up: Callable[..., ImageComparison]) -> None:
    level = {"klas": 0.7, "snnet": 0.6, "random": 0.5, "anchor": 0.1}
    noise = {0: 0.0, 1: 0.01, 4: 0.02}
    text = report(made_up(lambda rule, seed, _: level[rule] + noise[seed] * (rule == "klas")))
    error = f"{0.01 / 3**0.5:.4f}"
    assert sentence(text) == (
        f"**klas has the largest area, 0.7100.** It is 0.1100 ± {error} ahead of snnet. "
        f"It is 0.2100 ± {error} ahead of random."
    )
    gain = table(text, "## Rules")["klas"][2:]
    assert gain[0] == "+0.1100 (mean +0.1100)" and gain[2] == "no equal quality"
    assert table(text, "## Rules")["snnet"][2:] == ["–", "–", "–"]


def test_klas_loses_within_two_standard_errors_of_one_rule_only(made_up: Callable[..., ImageComparison]) -> None:
    ahead = {0: 0.03, 1: -0.01, 4: 0.02}  # mean .0133, standard error .0120
    level = {"klas": 0.6, "snnet": 0.6, "random": 0.4, "anchor": 0.1}
    text = report(made_up(lambda rule, seed, _: level[rule] + ahead[seed] * (rule == "snnet")))
    error = f"{stats.sem(list(ahead.values())):.4f}"
    assert sentence(text) == (
        f"**snnet has the largest area, 0.6133.** It is 0.0133 ± {error} ahead of klas, within two standard errors. "
        f"It is 0.2133 ± {error} ahead of random. KLAS did not win here."
    )


def test_one_seed_has_no_standard_error(made_up: Callable[..., ImageComparison]) -> None:
    level = {"klas": 0.5, "snnet": 0.6, "random": 0.7, "anchor": 0.1}
    text = report(made_up(lambda rule, *_: level[rule], seeds=[1]))
    assert sentence(text) == (
        "**random has the largest area, 0.7000.** It is 0.1000 ahead of snnet. It is 0.2000 ahead of klas. "
        "KLAS did not win here."
    )
    assert table(text, "## Rules")["random"][0] == "0.7000"


@given(st.dictionaries(st.integers(0, 9), st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2))
def test_paired_differences(values: dict[int, tuple[float, float]]) -> None:
    ours, theirs = ({seed: pair[side] for seed, pair in values.items()} for side in (0, 1))
    mean, error = paired(ours, theirs | {77: 0.5})
    differences = np.array([one - other for one, other in values.values()])
    assert mean == pytest.approx(differences.mean(), abs=1e-12)
    assert error == pytest.approx(stats.sem(differences), abs=1e-12)


# ---- scores, classes


@pytest.mark.slow
def test_all_stitches_tell_what_each_score_foretells(tmp_path: Path) -> None:
    settings = replace(SETTINGS, rules=["every"], seeds=[0, 1])
    comparison = compared(tmp_path / "out", settings)
    comparison.run()
    text = report(comparison)
    (scores,) = comparison.scores
    found = table(text, "## small → large")
    for name in ("klas", "theta", "dm", "cka", "klas_shuffled"):
        one = scores.with_score(name)
        pairs = [
            (one.value_of(stitch), -np.mean([row.metrics["accuracy"] for row in comparison.rows if row.is_of(stitch)]))
            for stitch in one.stitches
            if any(row.is_of(stitch) for row in comparison.rows)
        ]
        x, y = np.array(pairs).T
        assert found[name][:2] == [f"{stats.pearsonr(x, y)[0]:.2f}", f"{stats.spearmanr(x, y)[0]:.2f}"], name
    assert f"{len(comparison.selection('every', 0))} stitches in one supernet" in text
    assert "## τ and buckets" in text and "## Rules" not in text
    fewer = compared(tmp_path / "fewer", replace(settings, most_stitches=5, seeds=[0]))
    fewer.run()
    assert "## τ and buckets" not in report(fewer)


def test_accuracy_among_the_classes_of_the_data_stands_beside_that_over_all(tmp_path: Path) -> None:
    settings = replace(SETTINGS, rules=["snnet"], seeds=[0])
    comparison = compared(tmp_path, settings, test=images(20, 3, classes=2), classes=(0, 1))
    comparison.run()
    text = report(comparison)
    headings = re.findall("## Rules: (.*) after", text)
    assert headings == ["accuracy", "accuracy_among"]
    low, high = comparison.macs
    rows = [row for row in comparison.rows if row.rule == "snnet"]
    among = [replace(row, metrics={"accuracy": row.metrics["accuracy_among"]}) for row in rows]
    assert table(text, "## Rules: accuracy_among")["snnet"][0] == f"{hand_area(among, low, high):.4f}"
    assert {"curve.png", "curve-accuracy_among.png"} <= {path.name for path in tmp_path.iterdir()}
    # SN-Net needs no scores; the figures show them all the same.
    assert (tmp_path / "heatmap-0-1.png").exists()
