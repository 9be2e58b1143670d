"""Training: what learns, what the loss is, and what is refused."""

import copy
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_model
from training_examples import anchors, examples, token_batch_list
from transformers import AutoModelForCausalLM, PreTrainedModel

from klas_hf import StitchedModel, TrainingConfig, TrainingResult, train_stitches
from klas_hf.training import loop
from klas_hf.training.data import batches_of, collate
from klas_hf.training.language import LanguageObjective

CPU = torch.device("cpu")
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


@pytest.mark.parametrize(
    ("asked", "device", "has_it", "expected"),
    [("auto", "cuda", True, "bf16"), ("auto", "cuda", False, "no"), ("auto", "mps", True, "bf16"),
     ("auto", "cpu", True, "no"), ("no", "cuda", True, "no"), ("bf16", "cpu", False, "bf16")],
)  # fmt: skip
def test_precision_is_bf16_by_itself_where_a_gpu_has_it(
    asked: str, device: str, has_it: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "is_bf16_available", lambda: has_it)
    assert loop.with_precision(TrainingConfig(mixed_precision=asked), torch.device(device)).mixed_precision == expected


def test_the_precision_that_was_taken_is_recorded(model: PreTrainedModel) -> None:
    assert TrainingConfig().mixed_precision == "auto"
    train_stitches(model, examples(), replace(QUICK, max_steps=1))
    assert model.config.training["settings"]["mixed_precision"] == "no"  # of a CPU


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
    with torch.no_grad():
        each = objective.example_losses(model, batch, (0, 0, 0))
        alone = [model(input_ids=batch["input_ids"][[row]], labels=labels[[row]]).loss for row in range(2)]
    torch.testing.assert_close(each, torch.stack(alone) * torch.tensor([2, 2]))
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


def test_hard_distillation_of_text(stitched: PreTrainedModel) -> None:
    _, target = anchors()
    data = examples(4)
    batch = collate(data)
    kept = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        best = target(**inputs).logits[:, :-1].argmax(-1)
        log_q = stitched(**inputs).logits[:, :-1].log_softmax(-1)
        expected = 0.75 * stitched(**batch).loss - 0.25 * log_q.gather(-1, best[..., None])[..., 0][kept].mean()
    config = replace(QUICK, max_steps=1, distillation_weight=0.25, distillation="hard")
    result = train_stitches(copy.deepcopy(stitched), data, config, teacher=target)
    assert result.losses[0] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_a_step_of_sgd_follows_the_gradient(stitched: PreTrainedModel, dtype: torch.dtype, error: float) -> None:
    data = examples(4)
    model, other = (copy.deepcopy(stitched).to(dtype) for _ in range(2))
    logits = other(**collate(data)).logits[:, :-1]  # the loss of transformers is in float32
    F.cross_entropy(logits.flatten(0, 1), collate(data)["labels"][:, 1:].flatten()).backward()
    config = replace(QUICK, max_steps=1, optimizer="sgd", learning_rate=0.5, warmup_ratio=0.0, max_grad_norm=1e9)
    train_stitches(model, data, config)
    for found, given in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, given - 0.5 * given.grad, atol=error, rtol=10 * error)


def test_stitching_layers_of_text_learn_at_a_low_rank(model: PreTrainedModel, stitched: PreTrainedModel) -> None:
    train_stitches(model, examples(), replace(QUICK, trainable="stitch", low_rank_stitches=2))
    assert changed(model, stitched) == {"model.joints.0.weight"}
    update = (model.model.joints[0].weight - stitched.model.joints[0].weight).double()
    assert torch.linalg.matrix_rank(update, rtol=1e-4) == 2


def test_workers_load_the_same_text(stitched: PreTrainedModel) -> None:
    found = [
        train_stitches(copy.deepcopy(stitched), examples(), replace(QUICK, max_steps=1, num_workers=workers)).losses
        for workers in (0, 1)
    ]
    assert found[0] == found[1]


def test_a_teacher_of_other_tokens_or_of_shared_weights_is_refused(model: PreTrainedModel) -> None:
    config = replace(QUICK, distillation_weight=0.5)
    with pytest.raises(ValueError, match="teacher of 9 classes for a model of"):
        train_stitches(model, examples(), config, teacher=tiny_model(vocab_size=9, bos_token_id=1))
    with pytest.raises(ValueError, match="shares parameters.*deepcopy"):
        train_stitches(model, examples(), config, teacher=model)


def test_dtypes_and_layers_come_back_when_peft_raises() -> None:
    model = StitchedModel.from_anchors(*anchors(), (2, 2), calibration=token_batch_list(), dtype=torch.bfloat16)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="dropout"):  # after some layers have got their updates
        train_stitches(model, examples(), replace(QUICK, trainable="lora", lora_dropout=2.0))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in before.named_modules()]
    assert_same(model, before)


def test_a_teacher_goes_back_where_it_was(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    _, target = anchors()
    places = [torch.device("cuda", 3)]  # stands for another device than the model's
    monkeypatch.setattr(type(target), "device", property(lambda self: places[-1] if self is target else CPU))
    monkeypatch.setattr(target, "to", lambda device: places.append(device))
    objective = LanguageObjective(model, examples(), replace(QUICK, distillation_weight=0.5), target)
    with pytest.raises(KeyboardInterrupt), objective.while_training(CPU):
        assert target.device == CPU
        raise KeyboardInterrupt
    assert places == [torch.device("cuda", 3), CPU, torch.device("cuda", 3)]


def test_the_training_stays_with_the_model(model: PreTrainedModel, tmp_path: Path) -> None:
    _, target = anchors()
    train_stitches(model, examples(), replace(QUICK, max_steps=0))
    assert model.config.training is None
    first = train_stitches(model, examples(), replace(QUICK, distillation_weight=0.5), teacher=target)
    second = train_stitches(model, examples(7), replace(QUICK, trainable="stitch", max_steps=1))
    model.save_pretrained(tmp_path)
    record = AutoModelForCausalLM.from_pretrained(tmp_path).config.training
    assert TrainingConfig(**record["settings"]) == replace(QUICK, trainable="stitch", max_steps=1, mixed_precision="no")
    assert record["data"] == {"kind": "text", "examples": 7} and record["teacher"] is None
    assert (record["steps"], record["first_loss"], record["last_loss"]) == (1, second.losses[0], second.losses[0])
    before = record["before"]
    assert before["teacher"] == "LlamaForCausalLM" and before["settings"]["distillation_weight"] == 0.5
    assert (before["first_loss"], before["last_loss"]) == (first.losses[0], first.losses[-1])
    assert "before" not in before


def test_a_result_prints_in_one_line() -> None:
    result = TrainingResult(600, tuple(2 - number / 600 for number in range(600)), 12.34, 2)
    assert repr(result) == str(result) == "600 steps in 12.3 s, loss 2.0000 → 1.0017"
    assert str(TrainingResult(0, (), 0.0, 1)) == "0 steps in 0.0 s"


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_training_warns_of_nothing(model: PreTrainedModel, trainable: str, tmp_path: Path) -> None:
    config = replace(QUICK, trainable=trainable, gradient_checkpointing=trainable == "full")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_stitches(model, examples(), config, output_dir=tmp_path)
