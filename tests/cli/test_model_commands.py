"""`klas-hf stitch`, `train`, `evaluate`, `plot` and `card` give what the public functions give."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    PreTrainedModel,
    ViTImageProcessorPil,
)

from klas_hf import (
    StitchedModel,
    TrainingConfig,
    evaluate,
    measure_costs,
    train_stitches,
)
from klas_hf.cli import main
from klas_hf.data.images import common_processing, image_batches, load_images
from klas_hf.data.text import TextBatches, text_examples, text_sequences
from klas_hf.hub import model_card
from klas_hf.rows import read_rows

ROOT = Path(__file__).parents[2]
FULL = ("--trainable", "full", "--per_device_batch_size", "4", "--gradient_accumulation_steps", "1")


def _sequences(language: Path, length: int = 12) -> list[list[int]]:
    texts = [(language / "text" / name).read_text() for name in ("a.txt", "deeper/b.txt")]
    return text_sequences(texts, AutoTokenizer.from_pretrained(language / "large"), length)


def _stitch(folder: Path, data: str, output: Path, *words: str, stitch: tuple[int, int] = (1, 2)) -> int:
    anchors = [str(folder / name) for name in ("small", "large")]
    pair = [str(number) for number in stitch]
    return main(["stitch", *anchors, "--stitch", *pair, "--data", str(folder / data), "--output", str(output), *words])


@pytest.fixture(scope="module")
def stitched(language: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("stitched") / "model"
    assert _stitch(language, "text", output, "--length", "12") == 0
    return output


@pytest.fixture(scope="module")
def classifier(vision: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("stitched") / "classifier"
    assert _stitch(vision, "images", output) == 0
    return output


def _same_weights(one: PreTrainedModel, other: PreTrainedModel) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def _parameters(folder: Path) -> dict[str, Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


# --- stitch ---


def test_a_stitched_language_model_is_that_of_the_function(language: Path, stitched: Path) -> None:
    batches = TextBatches(_sequences(language))
    expected = StitchedModel.from_anchors(language / "small", language / "large", (1, 2), calibration=batches)
    loaded = AutoModelForCausalLM.from_pretrained(stitched)
    _same_weights(loaded, expected)
    assert loaded.config.joint_fits[0] == expected.config.joint_fits[0]
    assert AutoTokenizer.from_pretrained(stitched)("word5 word9")["input_ids"] == [5, 9]


def test_columns_and_sizes_of_images_are_options_and_messages_name_them(vision: Path, tmp_path: Path, capsys) -> None:
    pictures = [Image.open(path) for path in sorted((vision / "images" / "train").rglob("*.png"))]
    table = {"picture": pictures, "kind": [number // 12 for number in range(len(pictures))]}
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.Value("int64")})
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "table.parquet")
    data, columns = str(tmp_path / "table.parquet"), ["--image_column", "picture", "--label_column", "kind"]
    assert _stitch(vision, data, tmp_path / "without") == 2
    assert "name them by --image_column … and --label_column …" in capsys.readouterr().err
    assert _stitch(vision, data, tmp_path / "with", *columns) == 0
    shutil.copytree(vision / "small", tmp_path / "small")
    shutil.copytree(vision / "large", tmp_path / "large")
    ViTImageProcessorPil(size={"height": 48, "width": 48}).save_pretrained(tmp_path / "small")
    assert _stitch(tmp_path, data, tmp_path / "sizes", *columns) == 2
    assert "give --image_size …, one that all take" in capsys.readouterr().err
    assert _stitch(tmp_path, data, tmp_path / "sizes", *columns, "--image_size", "32") == 0


def test_a_stitched_classifier_is_that_of_the_function(vision: Path, classifier: Path) -> None:
    processing = common_processing([vision / "small", vision / "large"])
    train = load_images(vision / "images", "train", processing)
    batches = image_batches(train, 16, processing.mean, processing.std, seed=0)
    expected = StitchedModel.from_anchors(vision / "small", vision / "large", (1, 2), calibration=batches)
    _same_weights(AutoModelForImageClassification.from_pretrained(classifier), expected)
    picture = Image.new("RGB", (32, 32), (200, 10, 30))
    saved, own = (AutoImageProcessor.from_pretrained(name) for name in (classifier, vision / "large"))
    assert torch.equal(*(one(picture, return_tensors="pt")["pixel_values"] for one in (saved, own)))


def test_other_options_of_stitch(language: Path, vision: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ("--length", "9", "--samples", "30", "--dtype", "bfloat16")
    assert _stitch(language, "text", tmp_path / "half", *words, stitch=(2, 3)) == 0
    assert "stitch (2, 3): " in capsys.readouterr().out
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert half.dtype == torch.bfloat16 and half.config.joint_fits[0]["rows"] == 30 * 8
    assert _stitch(vision, "images", tmp_path / "held", "--split", "validation") == 0
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "held").config
    assert config.joint_fits[0]["rows"] == 30 * 17  # class token and 4 × 4 positions


def test_a_folder_with_something_in_it_is_left_alone(
    language: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert _stitch(language, "text", tmp_path) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert _stitch(language, "text", tmp_path, "--length", "12", "--overwrite") == 0
    assert (tmp_path / "notes.txt").read_text() == "mine" and (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("stitch", [(9, 1), (0, 1)])
def test_an_impossible_stitch(
    stitch: tuple[int, int], language: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert _stitch(language, "text", tmp_path / "model", stitch=stitch) == 2
    assert "expected" in capsys.readouterr().err and not (tmp_path / "model").exists()


def test_no_tokenizer_no_data(language: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(language / "large").save_pretrained(bare)
    words = ["--stitch", "1", "2", "--data", str(language / "text"), "--output", str(tmp_path / "model")]
    assert main(["stitch", str(language / "small"), str(bare), *words]) == 2
    assert "without a tokenizer" in capsys.readouterr().err


# --- train ---


def _train(model: Path, data: Path, output: Path, *words: str) -> int:
    return main(["train", str(model), "--data", str(data), "--output", str(output), *words])


def test_training_of_a_language_model_is_that_of_the_function(language: Path, stitched: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("learning_rate: 1e-3\nmax_steps: 50\nseed: 3\n")
    words = (*FULL, "--max_steps", "3", "--config", str(settings), "--length", "12")
    assert _train(stitched, language / "text", tmp_path / "trained", *words) == 0
    expected = AutoModelForCausalLM.from_pretrained(stitched)
    config = TrainingConfig(
        trainable="full", per_device_batch_size=4, gradient_accumulation_steps=1, max_steps=3, learning_rate=1e-3,
        seed=3,
    )  # fmt: skip
    train_stitches(expected, text_examples(_sequences(language)), config)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    _same_weights(trained, expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "trained")("word5")["input_ids"] == [5]
    assert not (tmp_path / "trained" / "checkpoints").exists()
    assert not torch.equal(
        _parameters(stitched)["model.joints.0.weight"], trained.state_dict()["model.joints.0.weight"]
    )


def test_a_run_killed_while_saving_its_model_goes_on(
    language: Path, stitched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*FULL, "--max_steps", "2", "--length", "12")
    data, output, whole = language / "text", tmp_path / "trained", tmp_path / "whole"
    assert _train(stitched, data, whole, *words) == 0
    model = AutoModelForCausalLM.from_pretrained(stitched)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "save_pretrained", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert _train(stitched, data, output, *words) != 0
    assert (output / "tokenizer_config.json").exists() and (output / "checkpoints").exists()
    assert _train(stitched, data, output, *words) == 0
    _same_weights(AutoModelForCausalLM.from_pretrained(output), AutoModelForCausalLM.from_pretrained(whole))


def test_no_steps_save_the_model_as_it_was(
    language: Path, stitched: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "trained"
    assert _train(stitched, language / "text", output, *FULL, "--max_steps", "0", "--length", "12") == 0
    assert "0 steps" in capsys.readouterr().out
    model, before = (AutoModelForCausalLM.from_pretrained(folder) for folder in (output, stitched))
    _same_weights(model, before)


def test_training_of_a_classifier_from_a_teacher(vision: Path, classifier: Path, tmp_path: Path) -> None:
    words = (
        "--max_steps",
        "2",
        "--per_device_batch_size",
        "8",
        "--distillation_weight",
        "0.5",
        "--split",
        "validation",
    )
    output = tmp_path / "trained"
    assert _train(classifier, vision / "images", output, *words, "--teacher", str(vision / "large")) == 0
    processing = common_processing([vision / "large"])
    images = load_images(vision / "images", "validation", processing)
    expected = AutoModelForImageClassification.from_pretrained(classifier)
    teacher = AutoModelForImageClassification.from_pretrained(vision / "large")
    config = TrainingConfig(
        max_steps=2, per_device_batch_size=8, distillation_weight=0.5, mean=[0.5] * 3, std=[0.5] * 3
    )
    train_stitches(expected, images, config, teacher=teacher)
    _same_weights(AutoModelForImageClassification.from_pretrained(output), expected)


@pytest.mark.slow
def test_an_interrupted_run_goes_on(language: Path, stitched: Path, tmp_path: Path) -> None:
    words = [*FULL, "--max_steps", "150", "--save_steps", "5", "--length", "12"]
    output = tmp_path / "trained"
    command = ["train", str(stitched), "--data", str(language / "text"), "--output", str(output), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "klas_hf.cli", *command], env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 100
    while not list((output / "checkpoints").glob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "klas-hf: error: interrupted" in error and "Traceback" not in error
    assert not (output / "config.json").exists()
    kept = [int(path.name.partition("-")[2]) for path in (output / "checkpoints").glob("checkpoint-*")]
    assert 5 <= max(kept) < 150
    assert main(command) == 0
    assert _train(stitched, language / "text", tmp_path / "at_once", *words) == 0
    resumed, at_once = _parameters(output), _parameters(tmp_path / "at_once")
    assert all(torch.equal(resumed[name], at_once[name]) for name in at_once)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--mixup", "0.5"), "got the settings ['mixup'] for a language model"),
        (("--trainable", "nothing"), "got --trainable 'nothing'"),
        (("--distillation_weight", "0.5"), "no teacher"),
        (("--config", "nowhere.yaml"), "nowhere.yaml"),
    ],
)
def test_wrong_settings(
    words: tuple[str, ...], expected: str, language: Path, stitched: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert _train(stitched, language / "text", tmp_path / "trained", *words) == 2
    assert expected in capsys.readouterr().err and not (tmp_path / "trained").exists()


def test_a_file_of_settings_with_another_key(
    language: Path, stitched: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = tmp_path / "settings.yaml"
    for content, expected in (("data: x", "unknown options ['data']"), ("- a", "expected a mapping"), ("a: [", "no")):
        settings.write_text(content)
        assert _train(stitched, language / "text", tmp_path / "trained", "--config", str(settings)) == 2
        assert expected in capsys.readouterr().err


def test_the_model_is_not_its_own_output_and_divergence_is_a_failure(
    language: Path, stitched: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert _train(stitched, language / "text", stitched, "--overwrite") == 2
    assert "expected another output" in capsys.readouterr().err
    words = (*FULL, "--learning_rate", "1e30", "--warmup_ratio", "0", "--max_steps", "4", "--length", "12")
    assert _train(stitched, language / "text", tmp_path / "trained", *words) == 1
    error = capsys.readouterr().err
    assert "klas-hf: error: TrainingDiverged: got a loss of" in error and "Traceback" not in error


# --- evaluate, plot, card ---


def test_losses_rows_and_curve(language: Path, stitched: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = tmp_path / "rows.jsonl"
    folders = [language / "small", stitched, language / "large"]
    words = ["evaluate", *map(str, folders), "--data", str(language / "text"), "--length", "12", "--rows", str(rows)]
    assert main([*words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    batches = TextBatches(_sequences(language))
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    assert [row["metrics"]["loss"] for row in printed] == [evaluate(model, batches).metrics["loss"] for model in models]
    assert [row["macs"] for row in printed] == [measure_costs(model, tokens=12).macs for model in models]
    assert [row["parameters"] for row in printed] == [measure_costs(model).parameters for model in models]
    assert [(row["rule"], row["path"]) for row in printed] == [
        ("source", "0[:]"), ("stitched", "0[:1] 1[2:]"), ("target", "1[:]")
    ]  # fmt: skip
    before = rows.read_text()
    assert main(words) == 0
    assert rows.read_text() == before and "| stitched | 0[:1] 1[2:] |" in capsys.readouterr().out
    assert [row.metrics for row in read_rows(rows)] == [row["metrics"] for row in printed]
    assert main(["plot", str(rows), "--output", str(tmp_path / "curve")]) == 0
    assert b"stitched" in (tmp_path / "curve.svg").read_bytes() or (tmp_path / "curve.svg").stat().st_size > 5000
    assert Image.open(tmp_path / "curve.png").size[0] > 300


def test_two_models_under_one_name_are_told_apart(
    language: Path, stitched: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = tmp_path / "other"
    assert _stitch(language, "text", other, "--length", "12", "--samples", "25") == 0
    rows = tmp_path / "rows.jsonl"
    words = ["--data", str(language / "text"), "--samples", "10", "--length", "12", "--batch_size", "5"]
    assert main(["evaluate", str(stitched), str(other), *words, "--rows", str(rows)]) == 0
    assert capsys.readouterr().out.count("| stitched | 0[:1] 1[2:] |") == 2
    assert main(["evaluate", str(other), *words, "--rows", str(rows)]) == 0
    assert main(["evaluate", str(other), *words, "--rows", str(rows), "--rule", "few"]) == 0
    first, second, few = read_rows(rows)
    assert [first.rule, second.rule, few.rule] == ["stitched", "stitched", "few"]
    assert first.made_from != second.made_from == few.made_from and second.metrics == few.metrics
    assert main(["evaluate", str(other), *words[:-1], "4", "--rows", str(rows), "--rule", "x", "--length", "9"]) == 2
    assert "holds the rows of another run" in capsys.readouterr().err


def test_untuned_anchors_beside_a_tuned_model_are_marked(
    language: Path, stitched: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tuned, words = shutil.copytree(stitched, tmp_path / "tuned"), ["--data", str(language / "text"), "--length", "12"]
    config = json.loads((tuned / "config.json").read_text()) | {"training": {"settings": {"max_steps": 3}}}
    (tuned / "config.json").write_text(json.dumps(config))
    folders = [str(language / "small"), str(tuned), str(language / "large")]
    assert main(["evaluate", *folders, *words]) == 0
    printed = capsys.readouterr().out
    assert "| source (not tuned) |" in printed and "| target (not tuned) |" in printed
    assert f"klas-hf train {language / 'large'} --data {language / 'text'} --output large-tuned" in printed
    assert main(["evaluate", folders[0], str(stitched), folders[2], *words]) == 0
    assert "not tuned" not in (printed := capsys.readouterr().out) and "klas-hf train" not in printed


def test_a_row_says_how_its_model_was_trained_and_not_what_came_out(
    language: Path, stitched: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Otherwise two seeds of one training would be two models, and never be averaged."""
    data, words = language / "text", ("--length", "12", "--samples", "8")
    for seed in ("1", "2"):
        assert _train(stitched, data, tmp_path / seed, *FULL, "--max_steps", "1", "--seed", seed, *words) == 0
    rows = tmp_path / "rows.jsonl"
    folders = [str(tmp_path / seed) for seed in ("1", "2")]
    assert main(["evaluate", *folders, "--data", str(data), *words, "--rows", str(rows)]) == 0
    first, second = read_rows(rows)
    assert (first.seed, second.seed) == (1, 2) and first.model == second.model
    assert first.training is not None and first.training["settings"]["max_steps"] == 1
    assert "loss" not in json.dumps(first.training) and first.measurement != second.measurement
    assert capsys.readouterr().out.count("| stitched |") == 1


def test_accuracies(vision: Path, classifier: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--data", str(vision / "images"), "--json"]
    processing = common_processing([vision / "large"])
    for split, more in (("validation", []), ("train", ["--split", "train"])):
        assert main(["evaluate", str(classifier), str(vision / "large"), *words, *more]) == 0
        printed = json.loads(capsys.readouterr().out)
        images = load_images(vision / "images", split, processing)
        for row, folder in zip(printed, (classifier, vision / "large"), strict=True):
            model = AutoModelForImageClassification.from_pretrained(folder)
            measured = evaluate(model, image_batches(images, 16, processing.mean, processing.std, seed=0))
            assert row["metrics"] == pytest.approx(dict(measured.metrics))


def test_heatmaps(language: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    anchors = [str(language / name) for name in ("small", "large")]
    words = ["--data", str(language / "text"), "--length", "12", "--samples", "32", "--batch_size", "8"]
    for score in ("klas", "functional"):
        scores = tmp_path / f"{score}.safetensors"
        assert main(["score", *anchors, *words, "--score", score, "--output", str(scores)]) == 0
        assert main(["plot", str(scores), "--output", str(tmp_path / f"{score}.png")]) == 0
        assert {path.suffix for path in tmp_path.glob(f"{score}.*")} == {".safetensors", ".png", ".svg"}
    width = {score: Image.open(tmp_path / f"{score}.png").size[0] for score in ("klas", "functional")}
    assert width["klas"] > width["functional"]  # two panels, and one
    (tmp_path / "klas.png").unlink()
    assert main(["plot", str(tmp_path / "klas.safetensors"), "--output", str(tmp_path / "klas")]) == 2
    assert "klas.svg, which exists" in capsys.readouterr().err
    assert main(["plot", str(tmp_path / "klas.safetensors"), "--output", str(tmp_path / "klas"), "--overwrite"]) == 0


def test_what_is_no_file_of_rows(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for content, expected in (("hello\n", "which is not JSONL"), ('{"run": {}, "versions": {}}\n', "without a row")):
        (tmp_path / "rows.jsonl").write_text(content)
        assert main(["plot", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "curve")]) == 2
        assert expected in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_metric_that_the_rows_lack(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    row = {
        "rule": "klas",
        "path": "0[:1] 1[1:]",
        "seed": 0,
        "macs": 5,
        "parameters": 5,
        "metrics": {"loss": 1.0, "bleu": 2.0},
    }
    lines = ({"run": {}, "versions": {}}, row, row | {"macs": 9, "path": "0[:1] 1[2:]"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["plot", str(tmp_path / "rows.jsonl"), "--output"]
    assert main([*words, str(tmp_path / "a"), "--metric", "rouge"]) == 2
    assert "got a row without 'rouge'" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "a")]) == main([*words, str(tmp_path / "b"), "--metric", "bleu"]) == 0
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_a_card(language: Path, stitched: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, rows = shutil.copytree(stitched, tmp_path / "model"), tmp_path / "rows.jsonl"
    folders = [str(language / "small"), str(model), str(language / "large")]
    assert main(["evaluate", *folders, "--data", str(language / "text"), "--length", "12", "--rows", str(rows)]) == 0
    words = ["card", str(model), "me/between", "--licence", "mit", "--base_model", "you/small", "you/large"]
    more = ["--rows", str(rows), "--dataset", "my text", "--split", "test"]
    assert main([*words, *more]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model_card(
            AutoModelForCausalLM.from_pretrained(model), "me/between", licence="mit",
            base_model=["you/small", "you/large"], rows=read_rows(rows), dataset="my text", split="test",
            picture="curve.png",
        )  # fmt: skip
    assert ModelCard.load(model / "README.md").content == expected.content
    assert (model / "curve.png").exists()
    assert main(words) == 2
    assert "README.md, which exists" in capsys.readouterr().err
    (model / "tokenizer_config.json").unlink()
    assert main([*words, "--overwrite"]) == 0
    plain = (model / "README.md").read_text()
    assert "my text" not in plain and "AutoTokenizer" not in plain and "AutoTokenizer" in expected.content


def test_a_finished_run_again_says_so(
    stitched: Path, language: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["train", str(stitched), "--data", str(language / "text"), "--length", "12", "--samples", "8"]
    words += ["--output", str(tmp_path / "trained"), "--trainable", "stitch"]
    assert main([*words, "--max_steps", "1"]) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "trained").iterdir()}
    capsys.readouterr()
    assert main([*words, "--max_steps", "1"]) == 0
    assert "which is finished; nothing to do" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "trained").iterdir()} == before
    assert main([*words, "--max_steps", "2"]) == 2  # another run, which would replace it
    assert "which exists" in capsys.readouterr().err


def test_a_table_is_no_text(language: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "texts.csv").write_text("text\nhello\n")
    words = ["stitch", str(language / "small"), str(language / "large"), "--stitch", "1", "2"]
    assert main([*words, "--data", str(tmp_path / "texts.csv"), "--output", str(tmp_path / "out")]) == 2
    assert "a table; expected plain text" in capsys.readouterr().err
