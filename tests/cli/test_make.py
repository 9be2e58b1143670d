"""`klas-hf make`: end to end on tiny anchors, killed anywhere and gone on with, refused where settings differ."""

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants
from quick_cases import quick
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from klas_hf import PathScores, StitchedModel, evaluate, heal, healing_config, search_paths
from klas_hf.cli import main
from klas_hf.curves.tradeoff import TradeoffCurve, plot_curves
from klas_hf.data.text import TextBatches, text_sequences
from klas_hf.hub.page import results_page
from klas_hf.rows import read_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*rows", "ignore:.*licence")
LEFT = {"README.md", "curve.png", "paths.png", "paths.svg", "paths.safetensors", "rows.jsonl", "klas_hf_make.json"}


def _make(folder: Path, data: str, output: Path, *words: str, budget: str = "70%") -> int:
    anchors = [str(folder / name) for name in ("small", "large")]
    given = ["--budget", budget, "--data", str(folder / data), "--output", str(output), "--length", "12"]
    return main(["make", *anchors, *given, "--steps", "4", "--contenders", "2", *words])


def _text(language: Path) -> tuple[TextBatches, TextBatches, TextBatches]:
    """What is searched, learnt from and measured on."""
    texts = [(language / "text" / name).read_text() for name in ("a.txt", "deeper/b.txt")]
    sequences = text_sequences(texts, AutoTokenizer.from_pretrained(language / "large"), 12)
    kept = [one for number, one in enumerate(sequences) if number % 10 != 9]
    return TextBatches(kept, 8, count=256), TextBatches(kept, 8), TextBatches(sequences[9::10], 8)


def _same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture(scope="module")
def made(language: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made") / "between"
    assert _make(language, "text", output) == 0
    return output


def test_a_language_model_is_that_of_the_functions(language: Path, made: Path) -> None:
    searched, learnt, held = _text(language)
    names = [language / "small", language / "large"]
    found = search_paths(names, searched, tokens=12)
    teacher, healed = AutoModelForCausalLM.from_pretrained(names[1]), {}
    for path in found.contenders("70%", 2, known=False):
        one = StitchedModel.from_path(names, path, calibration=learnt, joint=found.joint(path, steps=4))
        result = heal(one, learnt.examples, teacher=teacher, config=healing_config(4, per_device_batch_size=8))
        healed[path] = result.end, one
    best, (_, model) = min(healed.items(), key=lambda pair: pair[1][0])
    assert len(healed) == 2
    loaded = AutoModelForCausalLM.from_pretrained(made)
    assert _same(loaded, model) and loaded.config.training["teacher"] is None  # no better than chance here
    assert loaded.config.search["budget"] == "70%" and loaded.config.search["share"] <= 0.7
    assert PathScores.load(made / "paths.safetensors").paths == found.paths
    rows = {row.rule: row for row in read_rows(made / "rows.jsonl")}
    assert rows["made"].metrics == evaluate(model, held).metrics and rows["made"].path == str(best)
    assert rows["target"].metrics == evaluate(teacher, held).metrics and rows["target"].path == "1[:]"
    assert rows["source"].path == "0[:]" and rows["made"].training == loaded.config.training
    heal(model, learnt.examples, teacher=teacher, config=healing_config(1, distillation_weight=0.5), rates=(1e-4,))
    assert model.config.training["teacher"] == "large"


def test_what_is_left_is_a_folder_to_use_and_to_publish(made: Path) -> None:
    there = {path.name for path in made.iterdir()}
    assert there > LEFT | {"config.json", "model.safetensors", "tokenizer.json"} and "making" not in there
    card = ModelCard.load(made / "README.md")
    assert card.data.eval_results[0].metric_type == "loss" and "![picture" in card.text and "budget of 70%" in card.text
    assert "of 2 that were healed alike" in card.text
    assert AutoTokenizer.from_pretrained(made)("word5 word9")["input_ids"] == [5, 9]


def test_the_same_command_again_does_nothing_and_another_is_refused(
    language: Path, made: Path, capsys: pytest.CaptureFixture
) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    assert _make(language, "text", made) == 0
    assert "which is finished; nothing to do" in capsys.readouterr().out
    assert _make(language, "text", made, "--batch_size", "4", budget="60%") == 2
    error = capsys.readouterr().err
    assert "begun with other settings" in error and "--budget '70%', now '60%'" in error
    assert "--batch_size 8, now 4" in error and "--length" not in error.partition("; repeat")[0]
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == before


# Where a run is killed → what is called there, and in which call of it.
KILLED = {
    "searching": ("klas_hf.scores.paths.PathScorer.score", 2),
    "assembling": ("klas_hf.stitching.assembly.assemble_path", 1),
    "finding the rate": ("klas_hf.training.healing.train_stitches", 2),
    "healing": ("klas_hf.training.loop._Run._step", 6),
    "saving": ("klas_hf.models.StitchedForCausalLM.save_pretrained", 1),
    "measuring": ("klas_hf.evaluation.measuring.Sums.add", 2),
    "the card": ("klas_hf.hub.model_card", 1),
}


@pytest.mark.parametrize("place", quick(KILLED, ["searching", "healing", "saving"]))
def test_a_run_killed_anywhere_goes_on_to_the_same_model(
    place: str, language: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    output, calls, (target, last) = tmp_path / "between", [], KILLED[place]
    original = _named(target)

    def killed(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == last:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(target, killed)
        assert _make(language, "text", output) == 130
    assert not (output / "README.md").exists()
    assert json.loads((output / "klas_hf_make.json").read_text()).get("stage") != "finished"
    assert _make(language, "text", output, budget="50%") == 2
    assert "begun with other settings (--budget '70%', now '50%')" in capsys.readouterr().err
    assert _make(language, "text", output) == 0
    assert {path.name for path in output.iterdir()} == {path.name for path in made.iterdir()}
    assert _same(*(AutoModelForCausalLM.from_pretrained(folder) for folder in (output, made)))
    mine, theirs = (read_rows(folder / "rows.jsonl") for folder in (output, made))
    assert [row.metrics for row in mine] == [row.metrics for row in theirs]


def _named(target: str) -> Any:
    owner, _, name = target.rpartition(".")
    module, _, kind = owner.rpartition(".")
    return getattr(getattr(import_module(module), kind) if kind[0] in "PS_" else import_module(owner), name)


def test_a_healing_that_was_interrupted_goes_on_at_its_rate(
    language: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last checkpoint is used: no short run is made again, and no step."""
    output = tmp_path / "between"
    with monkeypatch.context() as patch:
        patch.setattr("klas_hf.cli.make_steps.save_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert _make(language, "text", output) == 130
    assert len(list((output / "making" / "checkpoints").glob("contender-*/checkpoint-*"))) == 2
    monkeypatch.setattr("klas_hf.training.loop._Run._step", lambda *_: pytest.fail("a step was taken again"))
    assert _make(language, "text", output) == 0
    assert _same(*(AutoModelForCausalLM.from_pretrained(folder) for folder in (output, made)))


def test_data_that_have_changed_meanwhile_are_refused(
    language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    text, words = tmp_path / "text.txt", ("--data", str(tmp_path / "text.txt"))
    text.write_text((language / "text" / "a.txt").read_text())
    with monkeypatch.context() as patch:
        patch.setattr("klas_hf.cli.make.healed", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert _make(language, "text", tmp_path / "between", *words) == 130
    text.write_text(text.read_text().replace("word5", "word6"))
    assert _make(language, "text", tmp_path / "between", *words) == 2
    assert "whose content is not what" in capsys.readouterr().err


def test_images_of_two_anchors_or_one(vision: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert _make(vision, "images", tmp_path / "two") == 0
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "two")
    assert model.config.training["settings"]["mean"] == [0.5] * 3
    assert list(AutoImageProcessor.from_pretrained(tmp_path / "two").image_mean) == [0.5] * 3
    rows = read_rows(tmp_path / "two" / "rows.jsonl")
    assert [row.rule for row in rows] == ["source", "target", "made"] and rows[2].details["images"] == 30
    one, data = str(vision / "large"), str(vision / "images")
    words = ["--budget", "100%", "--data", data, "--output", str(tmp_path / "one"), "--test_split", "train"]
    assert main(["make", one, *words]) == 0
    assert "0[:], for a budget of 100%; not healed" in capsys.readouterr().out
    whole = AutoModelForImageClassification.from_pretrained(one)
    alone = AutoModelForImageClassification.from_pretrained(tmp_path / "one")
    assert alone.num_parameters() == whole.num_parameters()
    assert read_rows(tmp_path / "one" / "rows.jsonl")[0].details["images"] == 60


def test_images_of_some_classes_are_searched_and_measured_among_these(
    vision: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for split in ("train", "validation"):
        for name in ("ant", "cat"):
            shutil.copytree(vision / "images" / split / name, tmp_path / "images" / split / f"my {name}")
    (tmp_path / "labels.yaml").write_text("{my ant: 0, my cat: 2}")
    words = ("--labels", str(tmp_path / "labels.yaml"))
    assert _make(vision, str(tmp_path / "images"), tmp_path / "made", *words) == 0  # an absolute path stays itself
    assert PathScores.load(tmp_path / "made" / "paths.safetensors").provenance["classes"] == [0, 2]
    rows = read_rows(tmp_path / "made" / "rows.jsonl")
    among = [row.metrics["accuracy_among"] for row in rows]
    assert all(one >= row.metrics["accuracy"] for one, row in zip(among, rows, strict=True))
    assert (
        among[-1] > 0.5 > rows[0].metrics["accuracy"] and "accuracy_among" in (tmp_path / "made/README.md").read_text()
    )
    assert next(iter(rows[-1].metrics)) == "accuracy_among"  # what the curve is of
    capsys.readouterr()
    data = ["--data", str(tmp_path / "images"), "--split", "validation", *words, "--json"]
    assert main(["evaluate", str(tmp_path / "made"), *data]) == 0
    assert json.loads(capsys.readouterr().out)[0]["metrics"] == pytest.approx(rows[-1].metrics)


def test_a_dry_run_loads_and_writes_nothing(
    language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("klas_hf.cli.make_steps.load_model", lambda *_: pytest.fail("a model was loaded"))
    assert _make(language, "text", tmp_path / "between", "--dry_run") == 0
    out = capsys.readouterr().out
    searched, _, held = _text(language)
    found = search_paths([language / "small", language / "large"], searched, tokens=12)
    assert f"at most {found.provenance['limit']:,} runs of a block" in out and out.count(" or more here") == 2
    assert f"measured on {len(held.examples)} sequences" in out and not (tmp_path / "between").exists()
    parameters = 4 * sum(
        AutoModelForCausalLM.from_pretrained(language / name).num_parameters() for name in ("small", "large")
    )
    assert f"weights to be read: {parameters / 1000:.1f} kB" in out


def test_overwriting_makes_it_anew(language: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "between"
    output.mkdir()
    (output / "paths.safetensors").write_text("somebody else's")
    assert _make(language, "text", output, "--steps", "0") == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert _make(language, "text", output, "--steps", "0", "--overwrite") == 0
    assert "not healed" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(output).config.training is None
    assert _make(language, "text", output, "--steps", "0", "--overwrite", budget="50%") == 0
    assert AutoModelForCausalLM.from_pretrained(output).config.search["budget"] == "50%"
    assert [row.rule for row in read_rows(output / "rows.jsonl")] == ["source", "target", "made"]


def test_a_budget_may_be_in_seconds_and_bytes(
    language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    output, words = tmp_path / "between", ("--steps", "0", "--prompt", "5", "--at_once", "2", "--weight_bits", "8")
    drawn = _drawn(monkeypatch)
    assert _make(language, "text", output, *words, budget="10 s, 1 GB, 80%") == 0
    out = capsys.readouterr().out
    assert "for a budget of 10 s, 1 GB, 80%; not healed" in out and "| ms per token, or of the images | loss" in out
    assert set(drawn) == {"latency"}  # which is named first
    found = PathScores.load(output / "paths.safetensors")
    usage = found.provenance["usage"]
    assert (usage["prompt"], usage["batch"], usage["weight_bits"]) == (5, 2, 8)
    assert all(cost.latency and cost.weight_bytes < 4 * cost.parameters for cost in found.costs)
    assert found.cost == "macs"  # 80 % is the narrowest of the three
    assert all(row.cost("latency") > 0 for row in read_rows(output / "rows.jsonl"))
    assert _make(language, "text", tmp_path / "other", "--dry_run", budget=f"{found.dearest.parameters / 1.6e6} M") == 0
    assert "search over parameters: " in capsys.readouterr().out


def _drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What curves are over from now on."""
    drawn: list[str] = []

    def plot(curves: list[TradeoffCurve], **options: Any) -> Any:
        drawn.extend(curve.cost for curve in curves)
        return plot_curves(curves, **options)

    monkeypatch.setattr("klas_hf.hub.results.plot_curves", plot)
    return drawn


def test_the_curve_is_over_what_the_budget_names(
    language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """In picture, card and report, and whenever the card is written again."""
    output, large = tmp_path / "between", AutoModelForCausalLM.from_pretrained(language / "large")
    drawn, size = _drawn(monkeypatch), 4 * large.num_parameters()
    assert _make(language, "text", output, "--steps", "0", budget=f"{0.8 * size / 1e3} KB, 90%") == 0
    capsys.readouterr()
    rows = {row.rule: row for row in read_rows(output / "rows.jsonl")}
    assert rows["target"].cost("weight_bytes") == size and "usage" not in rows["target"].setting
    assert 4 * rows["made"].parameters == rows["made"].cost("weight_bytes") <= 0.8 * size
    assert set(drawn) == {"weight_bytes"}
    card = (output / "README.md").read_text()
    assert "| MB of weights | loss" in card and f"| {size / 1e6:.4g} " in card
    page = results_page(output)
    assert ">MB of weights</text>" in page and "<th>MB of weights</th>" in page and "MACs (millions)" not in page
    again = ["card", str(output), "me/between", "--rows", str(output / "rows.jsonl"), "--dataset", "text"]
    for words, cost in ((), "weight_bytes"), (("--cost", "parameters"), "parameters"):
        drawn.clear()
        assert main([*again, "--licence", "mit", "--overwrite", *words]) == 0
        assert set(drawn) == {cost}
        assert ("| MB of weights |" in (output / "README.md").read_text()) == (cost == "weight_bytes")
    assert main([*again, "--licence", "mit", "--overwrite", "--cost", "latency"]) == 2
    assert "'latency' and a row that has ['kv_bytes_per_token', 'macs', 'para" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--budget", "3%"), "below what any path"),
        (("--budget", "9B"), "above the dearest anchor itself; expected at least"),
        (("--budget", "soon"), "got --budget 'soon'; expected a share"),
        (("--budget", "1 GB, 0.001 ms", "--prompt", "16"), "The nearest: "),
        (("--budget", "20 ms", "--prompt", "0"), "got --prompt 0; expected at least 1"),
        (("--steps", "-1"), "got --steps -1; expected 0 or more"),
        (("--length", "90"), "expected at least 30, of which some are held out"),
        (("--data", "nowhere"), "got nowhere; expected a text file"),
    ],
)
def test_bad_input_is_told_before_anything_is_loaded(
    words: tuple[str, ...], expected: str, language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr("klas_hf.cli.make_steps.load_model", lambda *_: pytest.fail("a model was loaded"))
    assert _make(language, "text", tmp_path / "between", *words) == 2
    assert expected in capsys.readouterr().err and not (tmp_path / "between").exists()
