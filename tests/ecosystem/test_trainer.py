"""transformers' Trainer on stitched models: learning, checkpoints, resuming, evaluation, saving."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stitched_examples import (
    StopAt,
    coloured_images,
    counting_text,
    logits_of,
    saved,
    stitched_classifier,
    stitched_lm,
)
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from klas_hf import StitchedModel

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")

# What learns from what: a model, and its data.
TASKS: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[], Any]]] = {
    "equal KV shapes": (lambda: stitched_lm("equal"), counting_text),
    "unequal KV shapes": (lambda: stitched_lm("unequal"), counting_text),
    "classifier": (stitched_classifier, coloured_images),
}


def trainer(model: PreTrainedModel, data: Any, folder: Path, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "report_to": [], "max_steps": 8, "save_steps": 4,
        "logging_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "disable_tqdm": True, "seed": 7,
    }  # fmt: skip
    callbacks = options.pop("callbacks", None)
    return Trainer(
        model, TrainingArguments(**settings | options), train_dataset=data, eval_dataset=data, callbacks=callbacks,
        data_collator=default_data_collator, compute_metrics=accuracy,
    )  # fmt: skip


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    logits, labels = prediction.predictions, prediction.label_ids
    if labels.ndim == 2:  # tokens: each foretells the next
        logits, labels = logits[:, :-1], labels[:, 1:]
    return {"accuracy": float((logits.argmax(-1) == labels).mean())}


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def assert_equal_weights(model: PreTrainedModel, other: PreTrainedModel) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("task", TASKS)
def test_a_stitched_model_learns_and_is_evaluated(task: str, tmp_path: Path) -> None:
    make, data = TASKS[task]
    model = make()
    run = trainer(model, data(), tmp_path, max_steps=30, save_strategy="no")
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    found = losses(run)
    assert len(found) == 30 and found[-1] < 0.6 * found[0]
    assert after["eval_loss"] < 0.6 * before["eval_loss"]
    assert after["eval_accuracy"] > before["eval_accuracy"] + 0.1
    with torch.no_grad():  # the metric is that of the model itself
        batch = default_data_collator(list(data()))
        labels = batch.pop("labels")
        expected = accuracy(EvalPrediction(model(**batch).logits.numpy(), labels.numpy()))
    assert after["eval_accuracy"] == pytest.approx(expected["accuracy"], abs=0.02)


@pytest.mark.parametrize("task", TASKS)
def test_a_resumed_run_ends_as_an_unbroken_one(task: str, tmp_path: Path) -> None:
    """To the last bit, optimiser, schedule and data order included; and the checkpoint is an ordinary one."""
    make, data = TASKS[task]
    base, examples = saved(make(), tmp_path / "base"), data()
    fresh = [StitchedModel.from_pretrained(base).train() for _ in range(3)]
    whole = trainer(fresh[0], examples, tmp_path / "whole")
    whole.train()
    trainer(fresh[1], examples, tmp_path / "broken", callbacks=[StopAt(4)]).train()
    checkpoint = tmp_path / "broken" / "checkpoint-4"
    loaded = StitchedModel.from_pretrained(checkpoint)
    assert type(loaded) is type(fresh[1])
    assert_equal_weights(loaded, fresh[1])
    assert any(not torch.equal(a, b) for a, b in zip(loaded.parameters(), fresh[0].parameters(), strict=True))
    resumed = trainer(fresh[2], examples, tmp_path / "broken")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_equal_weights(fresh[2], fresh[0])
    assert losses(resumed) == losses(whole)


@pytest.mark.parametrize("task", ["unequal KV shapes", "classifier"])
def test_options_of_the_trainer_change_nothing_else(task: str, tmp_path: Path) -> None:
    """Checkpointed activations, and two small batches for a large one, give the same weights."""
    make, data = TASKS[task]
    base, ends = saved(make(), tmp_path / "base"), []
    for options in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    ):
        model = StitchedModel.from_pretrained(base)
        trainer(
            model,
            data(),
            tmp_path / "run",
            max_steps=3,
            save_strategy="no",
            optim="sgd",
            learning_rate=0.02,
            max_grad_norm=0,
            **options,
        ).train()
        ends.append(dict(model.named_parameters()))
    start = dict(StitchedModel.from_pretrained(base).named_parameters())
    assert any((ends[0][name] - tensor).abs().max() > 1e-3 for name, tensor in start.items())
    for other in ends[1:]:
        for name, tensor in ends[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_bf16_of_the_trainer_keeps_float32_weights(tmp_path: Path) -> None:
    model = stitched_lm()
    run = trainer(model, counting_text(), tmp_path, max_steps=20, bf16=True, save_strategy="no")
    run.train()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert losses(run)[-1] < 0.7 * losses(run)[0]


def test_the_best_checkpoint_comes_back_and_loads_anywhere(tmp_path: Path) -> None:
    """`load_best_model_at_end` and `save_model`, with BatchNorm's statistics (ResNet)."""
    model = stitched_classifier("resnet")
    run = trainer(
        model, coloured_images(), tmp_path / "run", max_steps=6, eval_strategy="steps", eval_steps=2, save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="loss", learning_rate=0.05,
    )  # fmt: skip
    run.train()
    seen = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    best = min(seen, key=lambda step: seen[step])
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert run.evaluate()["eval_loss"] == pytest.approx(seen[best], rel=1e-5)
    run.save_model(str(tmp_path / "best"))
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "best")
    assert_equal_weights(loaded, model)
    first: Tensor = logits_of(loaded)
    assert torch.equal(first, logits_of(model))
