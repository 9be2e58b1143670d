"""The score study of two tiny Llamas: what is measured, against stitched models one by one, and what is kept."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from experiments.language_study import LanguageScoreStudy, TextTask
from experiments.score_study import StudySettings
from tiny_models import tiny_model, token_ids

from klas_hf import Stitch, StitchedModel, TrainingConfig, evaluate, train_stitches
from klas_hf.data.text import TextBatches, text_examples
from klas_hf.evaluation import evaluate_divergence

pytestmark = pytest.mark.filterwarnings("ignore:.*do not determine")

TRAINING = TrainingConfig(trainable="full", per_device_batch_size=8, gradient_accumulation_steps=1, learning_rate=1e-2)


def sequences(count: int, seed: int) -> list[list[int]]:
    return [[1, *row] for row in token_ids(count, 9, seed=seed).tolist()]


def study(folder: Path, **settings) -> LanguageScoreStudy:
    task = TextTask(sequences(40, 1), sequences(16, 2), sequences(16, 3), 10, batch_size=8, calibration=24, probing=32)
    given = {
        "lengths": (0, 3),
        "seeds": (0, 1),
        "adapted_steps": (1,),
        "alone": 2,
        "samples": (8,),
        "temperatures": (2.0,),
    }
    anchors = [tiny_model(seed=1), tiny_model(large=True, seed=2)]
    return LanguageScoreStudy("llama", anchors, task, TRAINING, StudySettings(**given | settings), folder)


def test_every_stitch_is_measured_at_every_length_and_nothing_twice(tmp_path: Path) -> None:
    one = study(tmp_path)
    every = set(one.scores.stitches)
    for length, seeds in ((0, {0}), (3, {0, 1})):
        rows, found = one.rows(length), one.stitches(length)
        assert {row.seed for row in rows} == seeds
        assert {entry.stitch for entry in found} == every
        assert {
            "klas",
            "theta",
            "dm",
            "functional",
            "stitched_loss",
            "cost",
            "functional, 1 steps",
            "functional, temperature 2",
        } <= set(found[0].values)
        for entry in found:
            losses = [row.metrics["loss"] for row in rows if row.is_of(entry.stitch)]
            assert len(losses) == len(seeds) and entry.quality == pytest.approx(-np.mean(losses))
    variants = one.with_variants(3)[0].values
    assert {"functional", "8 samples", "temperature 2", "fitted to scrambled data"} <= set(variants)
    written = {path: path.read_bytes() for path in tmp_path.rglob("*.json*")}
    again = study(tmp_path)
    assert again.stitches(3) == one.stitches(3) and again.with_variants(3) == one.with_variants(3)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json*")} == written


def test_untrained_stitches_have_the_loss_of_their_least_squares_start(tmp_path: Path) -> None:
    one = study(tmp_path)
    rows = {row.stitch: row.metrics["loss"] for row in one.rows(0)}
    calibration = TextBatches(one.task.train[:24], 8)
    for pair in ((1, 1), (2, 3)):
        model = StitchedModel.from_anchors(one.source, one.target, pair, calibration=calibration)
        expected = evaluate(model, TextBatches(one.task.test, 8)).metrics["loss"]
        assert rows[Stitch(*pair)] == pytest.approx(expected, rel=1e-4)


def test_stitches_alone_are_trained_by_themselves(tmp_path: Path) -> None:
    one = study(tmp_path)
    rows = one.alone_rows(3)
    assert len({row.stitch for row in rows}) == 2 and one.alone_rows(3) == rows
    model = StitchedModel.from_anchors(
        one.source, one.target, rows[0].stitch, calibration=TextBatches(one.task.train[:24], 8)
    )
    config = TrainingConfig(
        trainable="full", per_device_batch_size=8, gradient_accumulation_steps=1, learning_rate=1e-2, max_steps=3
    )
    train_stitches(model, text_examples(one.task.train), config)
    assert rows[0].metrics["loss"] == pytest.approx(
        evaluate(model, TextBatches(one.task.test, 8)).metrics["loss"], rel=1e-5
    )


def test_adapting_brings_the_stitched_network_nearer_and_touches_no_anchor(tmp_path: Path) -> None:
    one, stitch = study(tmp_path), Stitch(2, 2)
    before = {name: tensor.clone() for name, tensor in one.target.state_dict().items()}
    start = one.adapted(stitch, 0)
    assert start == pytest.approx(one.values["functional"][stitch], rel=1e-3)
    assert one.adapted(stitch, 12) < start
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.target.state_dict().items())


def test_scrambled_sequences_hold_the_same_tokens_after_the_same_first(tmp_path: Path) -> None:
    one = study(tmp_path)
    plain, scrambled = (
        [row for batch in one.calibration(scrambled=option) for row in batch["input_ids"].tolist()]
        for option in (False, True)
    )
    assert plain != scrambled and len(plain) == 24
    for row, other in zip(plain, scrambled, strict=True):
        assert row[0] == other[0] == 1 and sorted(row) == sorted(other)
    assert sum(len(batch["input_ids"]) for batch in one.calibration(5)) == 5
    assert sum(len(batch["input_ids"]) for batch in one.scored(7)) == 7


@pytest.mark.parametrize(("count", "calibration", "probing"), [(41, 24, 32), (40, 20, 32), (40, 24, 30)])
def test_rows_of_other_data_are_not_taken_for_these(count: int, calibration: int, probing: int, tmp_path: Path) -> None:
    study(tmp_path).rows(0)
    parts = sequences(count, 1), sequences(16, 2), sequences(16, 3)
    task = TextTask(*parts, 10, batch_size=8, calibration=calibration, probing=probing)
    anchors = [tiny_model(seed=1), tiny_model(large=True, seed=2)]
    with pytest.raises(ValueError, match="another run"):
        LanguageScoreStudy("llama", anchors, task, TRAINING, StudySettings(lengths=(0,)), tmp_path)


@pytest.mark.parametrize("padded", [False, True])
def test_divergence_of_language_models_is_torchs(padded: bool) -> None:
    source, target = tiny_model(seed=1), tiny_model(seed=2)
    ids = token_ids(3, 9)
    ids[:, 0] = 1
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 6:] = 0
    counted = mask.bool()
    counted[:, 0] = False  # BOS
    with torch.no_grad():
        p, q = (
            torch.distributions.Categorical(logits=model(ids, attention_mask=mask).logits[counted])
            for model in (target, source)
        )
    expected = float(torch.distributions.kl_divergence(p, q).mean())
    batches = [{"input_ids": ids, "attention_mask": mask}]
    assert evaluate_divergence(source, target, batches) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="nothing to compare outputs on"):
        evaluate_divergence(source, target, [])


def test_what_is_kept_is_plain_json(tmp_path: Path) -> None:
    one = study(tmp_path)
    values = one.variants["8 samples"]
    lines = json.loads((tmp_path / "8-samples.json").read_text())
    assert {Stitch(*stitch): value for stitch, value in lines} == values
