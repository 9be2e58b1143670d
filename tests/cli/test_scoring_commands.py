"""`klas-hf score` and `select` give what the public functions give."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

from klas_hf import (
    StitchScores,
    StitchSelection,
    esta_stitches,
    min_kl_stitches,
    random_stitches,
    score_stitches,
    select_stitches,
    snnet_stitches,
    train_probes,
)
from klas_hf.cli import main
from klas_hf.data.images import common_processing, image_batches, load_images
from klas_hf.data.text import TextBatches, text_sequences

ROOT = Path(__file__).parents[2]


def _sequences(language: Path, length: int) -> list[list[int]]:
    texts = [(language / "text" / name).read_text() for name in ("a.txt", "deeper/b.txt")]
    return text_sequences(texts, AutoTokenizer.from_pretrained(language / "large"), length)


def _anchors(folder: Path, auto: Any = AutoModelForCausalLM) -> list[Any]:
    return [auto.from_pretrained(folder / name) for name in ("small", "large")]


def _score(folder: Path, data: str, output: Path, *words: str) -> int:
    anchors = [str(folder / name) for name in ("small", "large")]
    return main(["score", *anchors, "--data", str(folder / data), "--output", str(output), *words])


@pytest.fixture(scope="module")
def scored(language: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scores") / "scores.safetensors"
    assert _score(language, "text", path, "--length", "12", "--batch_size", "8", "--score", "functional_theta") == 0
    return path


def _equal(one: StitchScores, other: StitchScores) -> None:
    np.testing.assert_allclose(one.values, other.values, rtol=1e-12)
    np.testing.assert_array_equal(one.costs.macs, other.costs.macs)
    assert (one.score, one.sequences, one.tokens, one.available) == (
        other.score, other.sequences, other.tokens, other.available
    )  # fmt: skip


def test_scores_of_text_are_those_of_the_function(language: Path, scored: Path) -> None:
    batches = TextBatches(_sequences(language, 12), 8)
    _equal(StitchScores.load(scored), score_stitches(*_anchors(language), batches, tokens=12, score="functional_theta"))


def test_other_scores_samples_dtype_and_json(language: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "new" / "f.safetensors"
    words = ("--length", "12", "--score", "functional", "--samples", "20", "--batch_size", "5", "--dtype", "float64")
    assert _score(language, "text", output, *words, "--json") == 0
    sequences = _sequences(language, 12)
    chosen = [sequences[number * len(sequences) // 20] for number in range(20)]
    anchors = [AutoModelForCausalLM.from_pretrained(language / n, dtype="float64") for n in ("small", "large")]
    expected = score_stitches(*anchors, TextBatches(chosen, 5), tokens=12, score="functional")
    _equal(StitchScores.load(output), expected)
    printed = json.loads(capsys.readouterr().out)
    best = select_stitches(expected).best_per_bucket()
    pairs = [(one["source_stop"], one["target_start"]) for one in printed["stitches"]]
    assert pairs == [(one.source_stop, one.target_start) for one in best]
    assert printed["output"] == str(output) and printed["available"] == list(expected.available)


def test_probes_from_folders(language: Path, tmp_path: Path) -> None:
    anchors, batches = _anchors(language), TextBatches(_sequences(language, 12), 16)
    probes = [train_probes(anchor, batches) for anchor in anchors]
    folders = [str(tmp_path / name) for name in ("a", "b")]
    for probe, folder in zip(probes, folders, strict=True):
        probe.save_pretrained(folder)
    output = tmp_path / "scores.safetensors"
    assert _score(language, "text", output, "--length", "12", "--probes", *folders) == 0
    _equal(StitchScores.load(output), score_stitches(*anchors, batches, probes=probes, tokens=12))


def test_images_are_scored_on_one_split_by_probes_of_another(vision: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.safetensors"
    assert _score(vision, "images", output, "--batch_size", "12", "--score", "klas") == 0
    processing = common_processing([vision / "small", vision / "large"])
    moments = processing.mean, processing.std
    train, held = (load_images(vision / "images", split, processing) for split in ("train", "validation"))
    anchors = _anchors(vision, AutoModelForImageClassification)
    probes = [train_probes(anchor, image_batches(train, 12, *moments, seed=0)) for anchor in anchors]
    expected = score_stitches(*anchors, image_batches(held, 12, *moments, seed=0), probes=probes, score="klas")
    _equal(StitchScores.load(output), expected)
    _equal(StitchScores.load(output).with_score("cka"), expected.with_score("cka"))
    other = tmp_path / "other.safetensors"
    swapped = ("--split", "train", "--train_split", "validation", "--batch_size", "6", "--score", "functional")
    assert _score(vision, "images", other, *swapped) == 0
    assert StitchScores.load(other).sequences == len(train) // 2


def test_labels_of_images_may_be_mapped(vision: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    labels = tmp_path / "labels.yaml"
    labels.write_text("{ant: 1, bee: 0, cat: 2, dog: 3}")
    words = ("--labels", str(labels), "--score", "functional")
    assert _score(vision, "images", tmp_path / "s.safetensors", *words) == 2
    assert "without the classes ['elk']" in capsys.readouterr().err
    labels.write_text("{ant: 1, bee: 0, cat: 2, dog: 3, elk: elk}")
    for name, more in (("mapped", words), ("plain", words[2:])):
        assert _score(vision, "images", tmp_path / f"{name}.safetensors", *more, "--batch_size", "6") == 0
    mapped, plain = (StitchScores.load(tmp_path / f"{name}.safetensors") for name in ("mapped", "plain"))
    np.testing.assert_array_equal(mapped.values, plain.values)  # functional KL sees no labels, the loss does
    assert not np.allclose(
        mapped.with_score("stitched_loss").values, plain.with_score("stitched_loss").values, equal_nan=True
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--score", "nonsense"), "got --score 'nonsense'; expected one of"),
        (("--length", "2"), "got --length 2; expected at least 3"),
        (("--samples", "0"), "got --samples 0; expected at least 1"),
        (("--data", "nowhere"), "got nowhere; expected a text file"),
        (("--probes", "nowhere", "else"), "could not load probes from nowhere"),
    ],
)
def test_bad_input_of_scoring(
    words: tuple[str, ...], expected: str, language: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "scores.safetensors"
    assert _score(language, "text", output, *words) == 2
    error = capsys.readouterr().err
    assert expected in error and "Traceback" not in error and not output.exists()


def test_bad_text(language: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, content in (("binary.txt", b"\xff\xfe\x00"), ("empty.txt", b"")):
        (tmp_path / name).write_bytes(content)
        assert _score(language, str(tmp_path / name), tmp_path / "scores.safetensors") == 2
    error = capsys.readouterr().err
    assert "binary.txt, which is not UTF-8 text" in error and "empty.txt with no text of two tokens" in error
    (tmp_path / "folder").mkdir()
    assert _score(language, str(tmp_path / "folder"), tmp_path / "scores.safetensors") == 2
    assert "a folder with .txt files" in capsys.readouterr().err


def test_scores_are_replaced_only_when_asked(
    language: Path, scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "scores.safetensors"
    output.write_text("mine")
    assert _score(language, "text", output, "--length", "12") == 2
    assert "add --overwrite" in capsys.readouterr().err and output.read_text() == "mine"
    words = ("--length", "12", "--batch_size", "8", "--score", "functional_theta", "--overwrite")
    assert _score(language, "text", output, *words) == 0
    _equal(StitchScores.load(output), StitchScores.load(scored))
    assert _score(language, "text", output / "below.safetensors", "--length", "12") == 2
    assert "is a file" in capsys.readouterr().err


# --- select ---


def _selected(words: list[str], capsys: pytest.CaptureFixture) -> dict[str, Any]:
    assert main(["select", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def _same(printed: dict[str, Any], expected: StitchSelection, scores: StitchScores) -> None:
    assert [(one["source_stop"], one["target_start"]) for one in printed["stitches"]] == [
        (stitch.source_stop, stitch.target_start) for stitch in expected
    ]
    assert [(one["macs"], one["parameters"]) for one in printed["stitches"]] == [scores.costs.of(s) for s in expected]
    assert [one["bucket"] for one in printed["stitches"]] == list(expected.buckets)
    values = [None if value != value else value for value in expected.values]
    assert [one["value"] for one in printed["stitches"]] == values
    assert (printed["rule"], printed["candidates"]) == (expected.rule, expected.candidates)


def test_every_rule(scored: Path, capsys: pytest.CaptureFixture) -> None:
    scores = StitchScores.load(scored)
    cases = [
        ([], select_stitches(scores)),
        (["--buckets", "3", "--threshold", "0.5"], select_stitches(scores, buckets=3, threshold=0.5)),
        (["--rule", "theta", "--buckets", "2"], select_stitches(scores.with_score("theta"), buckets=2)),
        (["--rule", "min_kl", "--buckets", "4"], min_kl_stitches(scores, 4)),
        (["--rule", "esta"], esta_stitches(scores.costs)),
        (["--rule", "snnet"], snnet_stitches(scores.costs)),
        (["--rule", "random", "--buckets", "2", "--seed", "5"], random_stitches(scores.costs, buckets=2, seed=5)),
        (["--rule", "random", "--buckets", "2"], random_stitches(scores.costs, buckets=2, seed=0)),
    ]
    for words, expected in cases:
        _same(_selected([str(scored), *words], capsys), expected, scores)
    assert tuple(cases[-1][1]) != tuple(cases[-2][1])


@pytest.mark.parametrize(("column", "budget"), [("macs", "{:.4%}"), ("parameters", "{}"), ("parameters", "{} KB")])
@pytest.mark.parametrize("buckets", [1, 20])
def test_a_budget_recommends_the_lowest_score_within_it(
    column: str, budget: str, buckets: int, scored: Path, capsys: pytest.CaptureFixture
) -> None:
    scores = StitchScores.load(scored)
    costs = {stitch: scores.costs.of(stitch)[column == "parameters"] for stitch in scores.stitches}
    limit = sorted(costs.values())[len(costs) // 2]
    best = min((stitch for stitch in costs if costs[stitch] <= limit), key=scores.value_of)
    value = {"{:.4%}": limit / scores.costs.target_total + 1e-6, "{}": limit, "{} KB": limit * 4 / 1000}[budget]
    words = [str(scored), "--budget", budget.format(value), "--buckets", str(buckets)]
    printed = _selected(words, capsys)
    found = printed["recommended"]
    assert (found["source_stop"], found["target_start"]) == (best.source_stop, best.target_start)
    without = {name: found[name] for name in found if name != "why"}
    assert without in printed["stitches"] and "has the lowest functional_theta" in found["why"]
    assert main(["select", *words]) == 0
    out = capsys.readouterr().out
    assert out.count("← recommended") == 1 and f"| {best} ← recommended" in out and found["why"] in out


def test_a_budget_is_answered_without_a_library_of_models(scored: Path) -> None:
    check = (
        "import sys, klas_hf_command\n"
        "try: klas_hf_command.main()\n"
        "except SystemExit as end: code = end.code\n"
        "print(code, sorted({'torch', 'transformers', 'accelerate'} & set(sys.modules)))"
    )
    words = ["select", str(scored), "--budget", "80%"]
    done = subprocess.run([sys.executable, "-c", check, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


def test_without_a_score_the_dearest_within_the_budget_is_recommended(
    scored: Path, capsys: pytest.CaptureFixture
) -> None:
    printed = _selected([str(scored), "--budget", "80%", "--rule", "esta"], capsys)
    costs, found = StitchScores.load(scored).costs, printed["recommended"]
    within = [one["macs"] for one in printed["stitches"] if one["macs"] <= 0.8 * costs.target_total]
    assert found["macs"] == max(within) and "is the dearest of" in found["why"]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [("2%", "expected at least"), ("many", "got --budget 'many'"), ("9B", "above the dearest anchor itself")],
)
def test_budgets_that_nothing_meets(budget: str, expected: str, scored: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["select", str(scored), "--budget", budget]) == 2
    assert expected in capsys.readouterr().err


def test_the_table_of_a_selection(scored: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["select", str(scored), "--rule", "esta"]) == 0
    lines = capsys.readouterr().out.splitlines()
    scores = StitchScores.load(scored)
    assert [line.split("|")[1].strip() for line in lines[2:]] == [str(stitch) for stitch in esta_stitches(scores.costs)]
    assert "–" in lines[2] and "esta_proportional" in lines[0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["--rule", "nonsense"], "got the rule 'nonsense'"), (["--rule", "cka"], "got score='cka'")],
)
def test_rules_that_cannot_be_had(words: list[str], expected: str, scored: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["select", str(scored), *words]) == 2
    assert expected in capsys.readouterr().err


def test_a_damaged_file_of_scores(scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    damaged = tmp_path / "scores.safetensors"
    damaged.write_bytes(scored.read_bytes()[:-50])
    assert main(["select", str(damaged)]) == 2
    assert "expected a whole file of StitchScores.save" in capsys.readouterr().err
