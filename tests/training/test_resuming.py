"""Runs that stop, or are killed, and go on: to the same model, from whole checkpoints, of this run alone."""

import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import training_examples
from tiny_models import tiny_model
from training_examples import anchors, examples, token_batch_list
from transformers import PreTrainedModel

from klas_hf import StitchedModel, TrainingDiverged, train_stitches
from klas_hf.training import language, loop
from klas_hf.training.losses import cross_entropies

QUICK = replace(training_examples.QUICK, max_steps=6, per_device_batch_size=4, learning_rate=1e-2, save_steps=2)


@pytest.fixture(scope="module")
def stitched() -> PreTrainedModel:
    return StitchedModel.from_anchors(*anchors(), (2, 2), calibration=token_batch_list())


@pytest.fixture
def model(stitched: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(stitched)


def assert_same(model: PreTrainedModel, other: PreTrainedModel) -> None:
    old = other.state_dict()
    assert all(tensor.equal(old[name]) for name, tensor in model.state_dict().items())


class Interrupt(Exception):
    """Stands for Ctrl-C or a killed job."""


@pytest.fixture
def interrupted_at(monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """Make training stop at its n-th step, once."""
    step = loop._Run._step

    def stop_at(number: int) -> None:
        taken = iter(range(number))

        def interrupted(self, batches, seed):
            if next(taken, None) is None:
                raise Interrupt
            return step(self, batches, seed)

        monkeypatch.setattr(loop._Run, "_step", interrupted)

    yield stop_at
    monkeypatch.undo()


@pytest.mark.parametrize("trainable", ["stitch", "lora", "full"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    stitched: PreTrainedModel, trainable: str, interrupted_at, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = replace(
        QUICK, trainable=trainable, max_steps=None, epochs=3, save_steps=2, lora_dropout=0.2, weight_decay=0.1
    )
    whole, broken, resumed = (copy.deepcopy(stitched) for _ in range(3))
    expected = train_stitches(whole, examples(), config)
    interrupted_at(9)
    with pytest.raises(Interrupt):
        train_stitches(broken, examples(), config, output_dir=tmp_path)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-8"]
    assert not any(path.suffix in (".bin", ".pt", ".pkl", ".pth") for path in tmp_path.rglob("*"))
    result = train_stitches(resumed, examples(), config, output_dir=tmp_path)
    assert result.losses == expected.losses
    assert_same(resumed, whole)
    again = copy.deepcopy(stitched)
    assert (
        train_stitches(again, examples(), config, output_dir=tmp_path).losses == expected.losses
    )  # nothing left to do
    assert_same(again, whole)


@pytest.mark.parametrize("tied", [True, False])
def test_an_anchor_resumes_too_tied_or_not(tied: bool, interrupted_at, monkeypatch, tmp_path: Path) -> None:
    whole, broken, resumed = (tiny_model(tie_word_embeddings=tied, seed=4) for _ in range(3))
    expected = train_stitches(whole, examples(), QUICK)
    interrupted_at(5)
    with pytest.raises(Interrupt):
        train_stitches(broken, examples(), QUICK, output_dir=tmp_path)
    monkeypatch.undo()
    assert train_stitches(resumed, examples(), QUICK, output_dir=tmp_path).losses == expected.losses
    assert_same(resumed, whole)


def test_an_interrupted_model_is_whole_again(model: PreTrainedModel, interrupted_at, stitched: PreTrainedModel) -> None:
    interrupted_at(1)
    with pytest.raises(Interrupt):
        train_stitches(model, examples(), replace(QUICK, trainable="lora"))
    assert model.state_dict().keys() == stitched.state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_checkpoint_of_another_run_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    train_stitches(model, examples(), QUICK, output_dir=tmp_path)
    with pytest.raises(ValueError, match=r"another run.*learning_rate.*another output folder"):
        train_stitches(model, examples(), replace(QUICK, learning_rate=0.5), output_dir=tmp_path)


def test_nan_stops_and_keeps_the_last_checkpoint(model: PreTrainedModel, tmp_path: Path, monkeypatch) -> None:
    seen = iter(range(100))

    def poisoned(logits, labels):
        return cross_entropies(logits, labels) * (float("nan") if next(seen) == 4 else 1.0)

    monkeypatch.setattr(language, "cross_entropies", poisoned)
    with pytest.raises(TrainingDiverged, match=r"nan.*finite.*learning rate"):
        train_stitches(model, examples(), QUICK, output_dir=tmp_path)
    (kept,) = tmp_path.iterdir()
    assert json.loads((kept / "state.json").read_text())["step"] == 4
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_folder_of_another_program_is_named_and_stays(model: PreTrainedModel, tmp_path: Path) -> None:
    foreign = tmp_path / "checkpoint-5"
    foreign.mkdir()
    (foreign / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"checkpoint-5 without a state.json.*another output folder"):
        train_stitches(model, examples(), QUICK, output_dir=tmp_path)
    assert [one.name for one in foreign.iterdir()] == ["trainer_state.json"]


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("klas_hf.training.checkpoints", "save_file"),
        ("klas_hf.training.checkpoints", "remove_folder"),
        ("shutil", "rmtree"),
    ],
)
def test_a_run_killed_while_saving_is_resumed(
    stitched: PreTrainedModel, place: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole, broken, resumed = (copy.deepcopy(stitched) for _ in range(3))
    expected = train_stitches(whole, examples(), QUICK)
    module = sys.modules[place]
    real = getattr(module, name)

    def killed(*given: object, **options: object) -> object:
        if list(tmp_path.glob("checkpoint-[4-9]")) or (name == "save_file" and list(tmp_path.glob("checkpoint-2"))):
            raise Interrupt
        return real(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, killed)
        with pytest.raises(Interrupt):
            train_stitches(broken, examples(), QUICK, output_dir=tmp_path)
    result = train_stitches(resumed, examples(), QUICK, output_dir=tmp_path)
    assert result.losses == expected.losses
    assert_same(resumed, whole)
    assert [one.name for one in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
