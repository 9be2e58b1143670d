"""Healing: rates found, teachers that help, and never a model worse than the start."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path as Folder
from typing import Any

import numpy as np
import pytest
import torch
from image_examples import ToyImages, interrupted_after, tiny_vit, toy_supernet
from scipy.stats import entropy
from tiny_models import tiny_model, token_ids
from torch import nn
from training_examples import QUICK, counting, one_batch, pruned

from klas_hf import StitchedModel, TrainingConfig, TrainingDiverged, evaluate, heal, healing_config, train_stitches
from klas_hf.data.images import ImageSet, map_labels
from klas_hf.training.loop import TrainingResult, held_objective_of
from klas_hf.training.rates import RATES

pytestmark = pytest.mark.filterwarnings("ignore:.*do not determine", "ignore:.*rows per")
TRAIN, HELD = counting(48, 1), counting(16, 2)


@pytest.mark.parametrize("knows", [True, False])
def test_healing_finds_a_rate_and_whether_the_teacher_helps_and_is_never_worse(knows: bool) -> None:
    model, dearest = pruned()
    if knows:
        train_stitches(dearest, TRAIN, replace(QUICK, max_steps=60))
    start = copy.deepcopy(model.state_dict())
    config = replace(QUICK, max_steps=20, learning_rate=1.0)
    result = heal(model, TRAIN, teacher=dearest, validation=HELD, config=config, rates=(1e-6, 1e-3, 2e-2, 50.0))
    assert set(result.tried) == {1e-6, 1e-3, 2e-2, 50.0} and result.tried[2e-2] == min(result.tried.values())
    assert 1e-3 < result.learning_rate < 50
    assert result.end < result.start
    assert evaluate(model, one_batch(HELD)).metrics["loss"] == pytest.approx(result.end, rel=1e-5)
    assert model.config.training["settings"]["distillation_weight"] == result.distillation_weight == knows / 2
    assert "before" not in model.config.training
    alone = StitchedModel.from_path([dearest], "0[:2] 0[3:]", calibration=[token_ids(32, 12)])
    alone.load_state_dict(start)
    chosen = {"distillation_weight": knows / 2, "distillation_until_passed": knows}
    chosen["optimizer"] = "adamw" if knows else "muon"
    config = replace(config, learning_rate=result.learning_rate, **chosen)
    train_stitches(alone, TRAIN, config, teacher=dearest, validation=HELD)
    for name, tensor in alone.state_dict().items():  # the sweep left nothing behind
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_nothing_is_distilled_from_a_teacher_that_does_no_better_than_chance() -> None:
    model, dearest = pruned()
    alone = copy.deepcopy(model)
    assert evaluate(dearest, one_batch(HELD)).metrics["loss"] > np.log(32)
    result = heal(model, TRAIN, teacher=dearest, validation=HELD, config=QUICK)
    expected = heal(alone, TRAIN, validation=HELD, config=replace(QUICK, optimizer="muon"))
    assert result.tried == expected.tried and result.training.validation == expected.training.validation
    assert result.distillation_weight == 0 and expected.distillation_weight == 0
    assert model.config.training["settings"]["optimizer"] == "muon"


def test_without_a_teacher_muon_is_for_models_that_do_no_better_than_chance() -> None:
    model = pruned()[0]
    for optimizer, rates in (("muon", RATES), ("adamw", RATES), ("adamw", (1e-3,))):
        before = evaluate(model, one_batch(HELD)).metrics["loss"]
        assert (before < 0.9 * np.log(32)) == (optimizer == "adamw")
        heal(model, TRAIN, validation=HELD, config=replace(QUICK, max_steps=60), rates=rates)
        assert model.config.training["settings"]["optimizer"] == optimizer


@pytest.mark.parametrize("given", [{"trainable": "lora"}, {"optimizer": "sgd"}])
def test_muon_takes_the_place_of_adamw_alone_where_everything_learns(given: dict[str, str]) -> None:
    model, dearest = pruned()  # which knows nothing of the data
    config = replace(QUICK, **given)
    assert heal(model, TRAIN, teacher=dearest, validation=HELD, config=config).distillation_weight == 0
    assert model.config.training["settings"]["optimizer"] == config.optimizer


def test_runs_too_short_to_be_tried_in_a_tenth_of_their_steps_are_tried_still() -> None:
    result = heal(pruned()[0], TRAIN, validation=HELD, config=replace(QUICK, max_steps=5))
    assert result.start not in result.tried.values() and len(set(result.tried.values())) == len(result.tried)


def test_of_a_teacher_that_knows_less_than_a_short_run_teaches_the_labels_are_tried_alone() -> None:
    model, dearest = pruned()
    config = replace(QUICK, learning_rate=1e-2)
    train_stitches(model, TRAIN, config)
    train_stitches(dearest, TRAIN, replace(config, max_steps=60))
    dearest.get_output_embeddings().weight.data *= 0.3  # it knows which, but not how surely
    taught, knows = (evaluate(one, one_batch(HELD)).metrics["loss"] for one in (model, dearest))
    assert taught < knows < 0.9 * np.log(32), (taught, knows)
    config = replace(QUICK, max_steps=40)
    result = heal(model, TRAIN, teacher=dearest, validation=HELD, config=config)
    settings = model.config.training["settings"]
    assert (result.distillation_weight, settings["optimizer"]) == (0, "adamw")  # it does better than chance
    assert settings["learning_rate"] == result.learning_rate


def run_instead(
    monkeypatch: pytest.MonkeyPatch, train: Callable[..., TrainingResult], loss: Callable[[float], float]
) -> None:
    """Train by a function, and take held-out losses from one of the rate."""
    for module in ("healing", "rates"):
        monkeypatch.setattr(f"klas_hf.training.{module}.train_stitches", train)
        monkeypatch.setattr(
            f"klas_hf.training.{module}.held_out_loss", lambda model, held, config: loss(config.learning_rate)
        )


def test_held_out_examples_that_make_no_sense_are_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ran(*_: Any, **__: Any) -> None:
        raise AssertionError("trained before the examples were looked at")

    for module in ("healing", "rates"):
        monkeypatch.setattr(f"klas_hf.training.{module}.train_stitches", ran)
    held = [{"input_ids": [1, 10**6, 3], "labels": [1, 2, 3]}]
    with pytest.raises(ValueError, match="got the token id 1000000 for a model with a vocabulary of"):
        heal(pruned()[0], TRAIN, validation=held, config=QUICK)


def test_a_share_of_distillation_that_is_given_stays() -> None:
    model, dearest = pruned()  # which knows nothing of the data
    config = replace(QUICK, distillation_weight=0.25)
    assert heal(model, TRAIN, teacher=dearest, validation=HELD, config=config).distillation_weight == 0.25
    assert not model.config.training["settings"]["distillation_until_passed"]


@pytest.mark.parametrize("distilled", [True, False])
def test_an_interrupted_healing_goes_on_with_what_was_chosen(distilled: bool, tmp_path: Folder) -> None:
    model, dearest = pruned()
    weight, optimizer = (0.5, "adamw") if distilled else (0.0, "muon")
    config = replace(QUICK, save_steps=4, learning_rate=7e-3, distillation_weight=weight, optimizer=optimizer)
    with interrupted_after(6):
        train_stitches(model, TRAIN, config, teacher=dearest, validation=HELD, output_dir=tmp_path)
    config = replace(QUICK, save_steps=4)
    model = pruned()[0]
    result = heal(model, TRAIN, teacher=dearest, validation=HELD, config=config, output_dir=tmp_path)
    assert (result.learning_rate, result.distillation_weight, result.tried) == (7e-3, weight, {})
    assert model.config.training["settings"]["optimizer"] == optimizer


@pytest.mark.parametrize(
    ("width", "trainable", "middle"),
    [(32, "full", 3e-3), (128, "full", 1e-3), (1024, "full", 1e-4), (128, "lora", 1e-2), (None, "full", 1e-2)],
)
def test_the_rates_tried_go_with_one_over_the_width(width: int | None, trainable: str, middle: float) -> None:
    config = replace(QUICK, max_steps=1, trainable=trainable)
    if width is None:  # a classifier whose head reads 16 features
        result = heal(tiny_vit(), ToyImages(), config=config)
    else:
        result = heal(tiny_model(hidden_size=width, num_hidden_layers=1), TRAIN, config=config)
    place = RATES.index(middle)
    assert tuple(result.tried)[:3] == RATES[place - 1 : place + 2]


@pytest.mark.parametrize(("trainable", "gain"), [("full", 0.015), ("lora", 0.0075)])
@pytest.mark.parametrize(("steps", "times"), [(25, 0.5), (100, 1), (900, 2)])
def test_long_runs_are_at_higher_rates_than_short_ones(
    steps: int, times: float, trainable: str, gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of losses that are a parabola in the logarithm of the rate, flat or steep: the whole run's has a slope beside."""
    runs: list[TrainingConfig] = []
    least, curvature = 6e-3 if trainable == "lora" else 6e-4, 0.05

    def loss(rate: float) -> float:
        return 2 + curvature * math.log(rate / least) ** 2 / 2

    def train(model: Any, data: Any, config: TrainingConfig, **_: Any) -> TrainingResult:
        runs.append(config)
        end = (1, loss(config.learning_rate))
        return TrainingResult(1, (), 0.0, 1, ((0, 9.0), end), end)

    run_instead(monkeypatch, train, loss)
    config = replace(QUICK, max_steps=steps, trainable=trainable)
    result = heal(tiny_model(hidden_size=128), TRAIN, config=config)
    assert [run.max_steps for run in runs] == [round(steps / 10)] * len(result.tried) + [steps]
    slope = gain * times * min(map(loss, result.tried))
    assert result.learning_rate == runs[-1].learning_rate == pytest.approx(least * math.exp(slope / curvature))


@pytest.mark.parametrize(
    ("short", "whole"),
    [
        # Chance is 4.23 nats here. What has died stands at it: only what is below says anything.
        ({1e-4: 6.0, 3e-4: 5.0, 1e-3: 3.0, 3e-3: 4.22}, 1e-3),
        # Nothing has learnt: higher rates are nearest, and the highest is not trusted.
        ({3e-4: 6.5, 1e-3: 5.6, 3e-3: 5.1, 1e-2: 4.6, 3e-2: 4.2}, 1e-2),
    ],
)
def test_short_runs_at_chance_say_nothing_of_rates(
    short: dict[float, float], whole: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(model: Any, data: Any, config: TrainingConfig, **_: Any) -> TrainingResult:
        return TrainingResult(1, (), 0.0, 1, ((0, 9.0), (1, 1.0)), (1, 1.0))

    run_instead(monkeypatch, train, short.__getitem__)
    config = replace(QUICK, learning_rate=min(short))  # at which the start is looked at
    result = heal(tiny_model(hidden_size=128), TRAIN, config=config, rates=tuple(short))
    assert result.learning_rate == pytest.approx(whole)


def others_foretell(labels: list[int], classes: int) -> float:
    """Laplace's rule, label by label."""
    others = [sum(one == other for other in labels) - 1 for one in labels]
    return -sum(math.log((count + 1) / (len(labels) - 1 + classes)) for count in others) / len(labels)


def test_chance_is_what_the_other_labels_foretell() -> None:
    held = [{"input_ids": [1, 2, 2, 3], "labels": [-100, 2, 2, 3]}, {"input_ids": [4, 9], "labels": [4, 9]}]
    model = tiny_model()
    expected = others_foretell([2, 2, 3, 9], model.config.vocab_size)  # the first token has no label
    assert held_objective_of(model, held, QUICK).chance() == pytest.approx(expected)
    toys = ToyImages(9)
    plain = tiny_vit()
    expected = others_foretell(list(toys.labels), plain.config.num_labels)
    assert held_objective_of(plain, toys, QUICK).chance() == pytest.approx(expected)
    few = map_labels(ImageSet(toys.images, toys.labels, "abc"), {"a": 1, "b": 4, "c": 6})
    settings = replace(QUICK, mean=[0.5] * 3, std=[0.25] * 3)
    found = held_objective_of(tiny_vit(classes=7), few, settings).chance()
    assert found == pytest.approx(others_foretell(toys.labels, 3))
    many = [{"input_ids": row, "labels": row} for row in torch.randint(32, (1000, 31)).tolist()]
    counts = np.bincount([one for row in many for one in row["labels"][1:]])
    of_many = held_objective_of(model, many, QUICK).chance()
    assert of_many == pytest.approx(entropy(counts), abs=model.config.vocab_size / counts.sum())


@pytest.mark.parametrize("checkpoints", [True, False])
def test_lower_rates_follow_where_a_whole_run_is_no_better_than_the_start(
    checkpoints: bool, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("klas_hf.training.rates.MIDDLE", 16 * 3)  # so that the first rates do harm
    model = tiny_model(seed=2)
    train_stitches(model, TRAIN, replace(QUICK, max_steps=60), validation=HELD)
    config, folder = replace(QUICK, max_steps=20), tmp_path if checkpoints else None
    result = heal(
        copy.deepcopy(model),
        TRAIN,
        validation=HELD,
        config=config,
        rates=(1e-6, 1e-5, 1.0, 3.0, 9.0),
        output_dir=folder,
    )
    assert {1.0, 3.0, 9.0} <= set(result.tried) and min(result.tried.values()) >= result.start
    assert result.learning_rate == 1e-5 and result.end < result.start
    alone = copy.deepcopy(model)  # the run at the rate that did harm left nothing behind
    again = train_stitches(alone, TRAIN, replace(config, learning_rate=1e-5), validation=HELD)
    assert again.losses == result.training.losses
    assert len(list(tmp_path.glob("checkpoint-*"))) == checkpoints


def test_a_model_that_no_rate_makes_better_stays_as_it_was() -> None:
    model = tiny_model(seed=2)
    train_stitches(model, TRAIN, replace(QUICK, max_steps=60), validation=HELD)
    config = replace(QUICK, max_steps=20)
    kept = copy.deepcopy(model.state_dict())
    result = heal(model, TRAIN, validation=HELD, config=config, rates=(1.0, 3.0))
    assert result.end == result.start
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, kept[name]), name


def test_images_held_out_keep_their_classes() -> None:
    toys = ToyImages()
    data = map_labels(ImageSet(toys.images, toys.labels, "abc"), {"a": 1, "b": 4, "c": 6})
    model = tiny_vit(classes=7)
    with torch.no_grad():
        among = model(pixel_values=toys.normalised()).logits[9::10, [1, 4, 6]]
    expected = torch.nn.functional.cross_entropy(among, torch.tensor(toys.labels[9::10]))
    settings = replace(QUICK, max_steps=1, mean=[0.5] * 3, std=[0.25] * 3)
    assert heal(model, data, config=settings, rates=(1e-3,)).start == pytest.approx(float(expected), rel=1e-5)


def test_a_rate_that_diverges_is_left_out() -> None:
    model, dearest = pruned()
    config = replace(QUICK, max_steps=20, max_grad_norm=1e30)
    result = heal(model, TRAIN, teacher=dearest, validation=HELD, config=config, rates=(5e-3, 1e30))
    assert result.learning_rate == 5e-3 and result.tried[1e30] == float("inf") and result.end < result.start
    start = copy.deepcopy(model.state_dict())
    with pytest.raises(TrainingDiverged):
        heal(model, TRAIN, teacher=dearest, validation=HELD, config=config, rates=(1e29, 1e30))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, start[name]), name


def test_distillation_alone_pulls_towards_the_teacher() -> None:
    model, dearest = pruned()
    ids = one_batch(HELD)[0]["input_ids"]

    def distance(one: nn.Module) -> float:
        with torch.no_grad():
            p, q = (net(ids).logits.log_softmax(-1) for net in (dearest, one))
        return float((p.exp() * (p - q)).sum(-1).mean())

    before = distance(model)
    train_stitches(model, TRAIN, replace(QUICK, max_steps=40, distillation_weight=1.0), teacher=dearest)
    assert distance(model) < 0.7 * before


def test_examples_are_held_out_where_none_are_given() -> None:
    model, dearest = pruned()
    result = heal(model, TRAIN, teacher=dearest, config=healing_config(6), rates=RATES[:1])
    assert result.training.steps == 6 and result.learning_rate == RATES[0] and not result.tried
    assert model.config.training["data"]["examples"] == 44  # of 48, every tenth is held out


def test_mistakes_are_told() -> None:
    model, dearest = pruned()
    with pytest.raises(ValueError, match="got 4 examples and no validation; expected at least 10"):
        heal(model, TRAIN[:4], teacher=dearest)
    with pytest.raises(ValueError, match="got validation for a supernet"):
        train_stitches(toy_supernet(), ToyImages(), QUICK, validation=ToyImages(6))
    with pytest.raises(ValueError, match="no examples to train on"):
        train_stitches(model, TRAIN, QUICK, validation=[])
