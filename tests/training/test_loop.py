"""Training: what learns, what the loss is, that a run resumes exactly, and what is refused."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_model
from training_examples import anchors, examples, token_batch_list
from transformers import PreTrainedModel

from klas_hf import StitchedModel, TrainingConfig, TrainingDiverged, train_stitches
from klas_hf.training import loop, objectives
from klas_hf.training.data import batches_of, collate
from klas_hf.training.language import LanguageObjective
from klas_hf.training.losses import cross_entropy_sum

QUICK = TrainingConfig(
    trainable="full",
    max_steps=6,
    per_device_batch_size=4,
    gradient_accumulation_steps=1,
    learning_rate=1e-2,
    save_steps=2,
)


@pytest.fixture(scope="module")
def stitched() -> PreTrainedModel:
    source, target = anchors()
    return StitchedModel.from_anchors(source, target, (2, 2), calibration=token_batch_list())


@pytest.fixture
def model(stitched: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(stitched)


def changed(model: PreTrainedModel, before: PreTrainedModel) -> set[str]:
    old = before.state_dict()
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, old[name])}


def assert_same(model: PreTrainedModel, other: PreTrainedModel) -> None:
    assert not changed(model, other)


def test_only_the_stitching_layer_learns(model: PreTrainedModel, stitched: PreTrainedModel) -> None:
    train_stitches(model, examples(), replace(QUICK, trainable="stitch"))
    assert changed(model, stitched) == {"model.joints.0.weight", "model.joints.0.bias"}


@pytest.mark.parametrize("trainable", ["stitch", "lora", "full"])
def test_no_steps_change_nothing(model: PreTrainedModel, stitched: PreTrainedModel, trainable: str) -> None:
    result = train_stitches(model, examples(), replace(QUICK, trainable=trainable, max_steps=0))
    assert (result.steps, result.losses) == (0, ())
    assert_same(model, stitched)
    with pytest.raises(ValueError, match="max_steps=-1"):
        replace(QUICK, max_steps=-1)


def test_lora_learns_in_both_sides_and_is_merged(model: PreTrainedModel, stitched: PreTrainedModel) -> None:
    train_stitches(model, examples(), replace(QUICK, trainable="lora"))
    learned = changed(model, stitched)
    assert model.state_dict().keys() == stitched.state_dict().keys()
    assert {"model.joints.0.weight", "model.joints.0.bias"} <= learned
    for side in ("model.slices.0.", "model.slices.1."):
        assert any(name.startswith(side) for name in learned)
    assert not any("norm" in name or "embed" in name or "lm_head" in name for name in learned)
    update = model.state_dict()["model.slices.1.layers.0.mlp.up_proj.weight"].double()
    update = update - stitched.state_dict()["model.slices.1.layers.0.mlp.up_proj.weight"]
    assert torch.linalg.matrix_rank(update, rtol=1e-4) <= QUICK.lora_rank


def test_full_training_lowers_the_loss_and_leaves_flags_and_mode(model: PreTrainedModel) -> None:
    model.model.slices[0].requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    result = train_stitches(model, examples(), replace(QUICK, max_steps=25))
    assert sum(result.losses[-5:]) < 0.8 * sum(result.losses[:5])
    assert result.steps == len(result.losses) == 25
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not model.training


def test_the_first_loss_is_that_of_transformers(model: PreTrainedModel) -> None:
    data = examples(4)
    expected = model(**collate(data)).loss.item()
    result = train_stitches(model, data, replace(QUICK, max_steps=1))
    assert result.losses[0] == pytest.approx(expected, rel=1e-5)


def test_an_anchor_trains_too_and_others_stay_as_they_are() -> None:
    source, target = anchors()
    before = copy.deepcopy(target)
    made = StitchedModel.from_anchors(source, target, (1, 3), calibration=token_batch_list())
    train_stitches(made, examples(), QUICK, teacher=target)
    assert_same(target, before)
    result = train_stitches(target, examples(), replace(QUICK, trainable="lora"))
    assert result.losses[-1] < result.losses[0]
    assert changed(target, before)


def test_accumulation_equals_a_larger_batch(stitched: PreTrainedModel) -> None:
    one, other = copy.deepcopy(stitched), copy.deepcopy(stitched)
    # 19 examples: the last batch of an epoch is short, and an accumulated one has an empty part.
    whole = train_stitches(one, examples(), replace(QUICK, per_device_batch_size=8, max_steps=5))
    parts = train_stitches(
        other, examples(), replace(QUICK, per_device_batch_size=2, gradient_accumulation_steps=4, max_steps=5)
    )
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_gradient_checkpointing_changes_nothing(stitched: PreTrainedModel) -> None:
    one, other = copy.deepcopy(stitched), copy.deepcopy(stitched)
    train_stitches(one, examples(), replace(QUICK, max_steps=2))
    train_stitches(other, examples(), replace(QUICK, max_steps=2, gradient_checkpointing=True))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_bf16_keeps_the_dtype_and_follows_fp32(stitched: PreTrainedModel) -> None:
    one, other = copy.deepcopy(stitched), copy.deepcopy(stitched).to(torch.bfloat16)
    exact = train_stitches(one, examples(), replace(QUICK, trainable="lora", learning_rate=1e-3))
    coarse = train_stitches(
        other, examples(), replace(QUICK, trainable="lora", learning_rate=1e-3, mixed_precision="bf16")
    )
    assert coarse.losses == pytest.approx(exact.losses, rel=0.1)
    assert {parameter.dtype for parameter in other.parameters()} == {torch.bfloat16}
    assert other(**collate(examples(2))).logits.dtype == torch.bfloat16  # no autocast is left on the forward


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_every_tensor_gets_its_dtype_back(trainable: str, precision: str) -> None:
    model = StitchedModel.from_anchors(*anchors(), (2, 2), calibration=token_batch_list(), dtype=torch.bfloat16)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert {buffer.dtype for buffer in buffers.values()} == {torch.float32}  # the rotary frequencies
    train_stitches(model, examples(), replace(QUICK, trainable=trainable, mixed_precision=precision, max_steps=2))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=0, atol=0)


def test_the_stitching_layer_has_its_own_rate(model: PreTrainedModel, stitched: PreTrainedModel) -> None:
    rates = replace(QUICK, learning_rate=1e-30, stitch_learning_rate=1e-2, max_steps=3)
    train_stitches(model, examples(), rates)
    assert changed(model, stitched) == {"model.joints.0.weight", "model.joints.0.bias"}


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
        return cross_entropy_sum(logits, labels) * (float("nan") if next(seen) == 4 else 1.0)

    monkeypatch.setattr(objectives, "cross_entropy_sum", poisoned)
    with pytest.raises(TrainingDiverged, match=r"nan.*finite.*learning rate"):
        train_stitches(model, examples(), QUICK, output_dir=tmp_path)
    (kept,) = tmp_path.iterdir()
    assert json.loads((kept / "state.json").read_text())["step"] == 4
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_distillation_loss_is_the_mixture(stitched: PreTrainedModel) -> None:
    _, target = anchors()
    data = examples(4)
    batch = collate(data)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    kept = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        p = F.softmax(target(**inputs).logits[:, :-1][kept] / 2, -1)
        q = F.softmax(stitched(**inputs).logits[:, :-1][kept] / 2, -1)
        expected = torch.distributions.kl_divergence(
            torch.distributions.Categorical(p), torch.distributions.Categorical(q)
        )
        hard = stitched(**batch).loss
    config = replace(QUICK, max_steps=1, distillation_weight=0.25, distillation_temperature=2.0)
    result = train_stitches(copy.deepcopy(stitched), data, config, teacher=target)
    assert result.losses[0] == pytest.approx(float(0.75 * hard + 0.25 * 4 * expected.mean()), rel=1e-4)


def test_losses_ignore_masked_labels(model: PreTrainedModel) -> None:
    labels = torch.tensor([[1, -100, 3, 4, -100], [-100, -100, -100, 2, 2]])
    batch = {"input_ids": torch.ones_like(labels), "attention_mask": torch.ones_like(labels), "labels": labels}
    objective = LanguageObjective(model, examples(), QUICK, None)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits
        found = objective.loss_sum(model, batch, (0, 0, 0))
    expected = sum(
        -logits[row, place].log_softmax(-1)[labels[row, place + 1]]
        for row in range(2)
        for place in range(4)
        if labels[row, place + 1] != -100
    )
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert objective.count(batch) == 4
    batch["labels"] = torch.full_like(labels, -100)
    assert objective.count(batch) == objective.loss_sum(model, batch, (0, 0, 0)) == 0


def test_every_example_is_seen_once_an_epoch() -> None:
    data = [{"input_ids": [number, 1], "labels": [number, 1]} for number in range(3, 14)]
    loader, order = batches_of(data, 2, 4, seed=3)
    seen = []
    for epoch in range(2):
        order.epoch = epoch
        batches = list(loader)
        assert len(batches) == 8  # 11 examples in batches of 2, filled up to a multiple of 4
        labelled = [batch["input_ids"][(batch["labels"] == 1).any(1)][:, 0] for batch in batches]
        seen.append(torch.cat(labelled).tolist())
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(3, 14))
    assert seen[0] != seen[1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no examples"),
        ([{"input_ids": [1, 2]}], r"example 0 without \['labels'\]"),
        ([{"input_ids": [1, 2], "labels": [1]}], "2 input_ids and 1 labels"),
        ([{"input_ids": [1, 2], "labels": [1, -100]}], "without a label"),
    ],
)
def test_bad_examples_are_refused(model: PreTrainedModel, data: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_stitches(model, data, QUICK)


def test_bad_settings_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"trainable='all'.*stitch.*lora.*full"):
        TrainingConfig(trainable="all")
    with pytest.raises(ValueError, match="mixed_precision='fp8'"):
        TrainingConfig(mixed_precision="fp8")
    with pytest.raises(ValueError, match="epochs=0"):
        TrainingConfig(epochs=0)
    with pytest.raises(ValueError, match="no teacher"):
        train_stitches(model, examples(), replace(QUICK, distillation_weight=0.5))
    with pytest.raises(ValueError, match="no stitching layer"):
        train_stitches(tiny_model(), examples(), replace(QUICK, trainable="stitch"))
