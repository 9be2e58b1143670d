"""Held-out losses while training: what is measured, and whose weights are kept."""

import copy
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path as Folder
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from image_examples import ToyImages, interrupted_after, tiny_vit
from safetensors.torch import load_file
from torch import nn
from training_examples import QUICK, counting, one_batch, pruned

from klas_hf import evaluate, heal, train_stitches
from klas_hf.training.held_out import is_less

pytestmark = pytest.mark.filterwarnings("ignore:.*do not determine", "ignore:.*rows per")
TRAIN, HELD = counting(48, 1), counting(16, 2)


def image_losses(model: Any, data: ToyImages) -> np.ndarray:
    with torch.no_grad():
        logits = model(pixel_values=data.images).logits
    return nn.functional.cross_entropy(logits, torch.tensor(data.labels), reduction="none").numpy()


@pytest.mark.parametrize("trainable", ["stitch", "lora", "full"])
def test_the_weights_are_those_of_the_least_held_out_loss(trainable: str) -> None:
    model, _ = pruned()
    before = evaluate(model, one_batch(HELD)).metrics["loss"]
    config = replace(QUICK, trainable=trainable, eval_steps=3, learning_rate=2e-2)
    result = train_stitches(model, TRAIN, config, validation=HELD)
    assert [step for step, _ in result.validation] == [0, 3, 6, 9, 12]
    assert result.validation[0][1] == pytest.approx(before, rel=1e-5)
    after = evaluate(model, one_batch(HELD)).metrics["loss"]
    assert after == pytest.approx(min(loss for _, loss in result.validation), rel=1e-5) and after < before
    assert model.config.training["validation_loss"] == pytest.approx(after, rel=1e-5)


def test_the_end_is_kept_unless_earlier_weights_did_better_by_more_than_an_error(tmp_path: Folder) -> None:
    seen = Counter()
    for seed in (1, 2, 6, 9):
        data, held = ToyImages(42, floats=True, seed=seed), ToyImages(9, floats=True, seed=seed + 50)
        if seed % 2:  # which is learnt by heart
            data.labels = np.random.default_rng(seed).permutation(data.labels).tolist()
        config = replace(QUICK, eval_steps=3, save_steps=1, learning_rate=3e-2, seed=seed)
        model, after = tiny_vit(seed), {0: tiny_vit(seed)}
        result = train_stitches(model, data, config, validation=held)
        for step in (3, 6, 9, 12):
            after[step] = tiny_vit(seed)
            with interrupted_after(step) if step < 12 else nullcontext():
                train_stitches(after[step], data, config, output_dir=tmp_path / f"{seed}-{step}")
            after[step].load_state_dict(
                load_file(tmp_path / f"{seed}-{step}" / f"checkpoint-{step}/weights.safetensors")
            )
        losses = {step: image_losses(one, held) for step, one in after.items()}
        torch.testing.assert_close(dict(result.validation), {step: float(one.mean()) for step, one in losses.items()})
        least, worse = min(after, key=dict(result.validation).__getitem__), losses[12].mean() > losses[0].mean()
        far = least != 12 and scipy.stats.ttest_rel(losses[12], losses[least]).statistic > 1
        kept = least if far or worse else 12
        seen["far" if far else "near" if least != 12 else "last"] += 1
        assert result.kept == (kept, pytest.approx(losses[kept].mean(), rel=1e-4)), seed
        torch.testing.assert_close(sorted(result.examples), sorted(losses[kept].tolist()), rtol=1e-4, atol=1e-5)
        for name, tensor in after[kept].state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0, msg=name)
    assert set(seen) == {"far", "near", "last"}, seen


@given(arrays(float, st.integers(2, 40), elements=st.floats(0, 5)), st.integers(0, 10**6))
def test_less_by_more_than_an_error_is_a_paired_t_above_one(losses: np.ndarray, seed: int) -> None:
    others = losses + np.random.default_rng(seed).normal(0.2, 1, len(losses))
    found = scipy.stats.ttest_rel(others, losses).statistic
    assume(abs(found - 1) > 1e-6)
    assert is_less(losses, others) == (found > 1)
    assert is_less(losses[:1], losses[:1] + 0.1) and not is_less(losses, losses)


def test_a_training_that_makes_things_worse_gives_the_start_back() -> None:
    model, _ = pruned()
    start = copy.deepcopy(model.state_dict())
    result = train_stitches(model, TRAIN, replace(QUICK, learning_rate=3.0, max_grad_norm=1e6), validation=HELD)
    assert result.validation[-1][1] > result.validation[0][1]
    assert model.config.training["kept_step"] == 0
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, start[name], rtol=0, atol=0, msg=name)


def test_measuring_changes_nothing_of_the_training() -> None:
    one, other = pruned()[0], pruned()[0]
    plain = train_stitches(one, TRAIN, QUICK)
    watched = train_stitches(other, TRAIN, replace(QUICK, eval_steps=12), validation=HELD)
    assert watched.losses == plain.losses
    for name, tensor in one.state_dict().items():  # the last step is the best here
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_a_resumed_run_keeps_the_same_weights(trainable: str, tmp_path: Folder) -> None:
    config = replace(QUICK, trainable=trainable, eval_steps=2, save_steps=3, learning_rate=3e-2)
    whole, broken, resumed = (pruned()[0] for _ in range(3))
    expected = train_stitches(whole, TRAIN, config, validation=HELD)
    with interrupted_after(7):
        train_stitches(broken, TRAIN, config, validation=HELD, output_dir=tmp_path)
    assert (tmp_path / "checkpoint-6" / "best.safetensors").exists()
    found = train_stitches(resumed, TRAIN, config, validation=HELD, output_dir=tmp_path)
    assert found.losses == pytest.approx(expected.losses)
    torch.testing.assert_close(torch.tensor(found.validation), torch.tensor(expected.validation))
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(tensor, resumed.state_dict()[name], msg=name)


def test_images_and_their_statistics() -> None:
    model, data = tiny_vit(), ToyImages(floats=True)
    result = train_stitches(model, data, replace(QUICK, eval_steps=4), validation=ToyImages(18, floats=True, seed=3))
    assert len(result.validation) == 4 and result.validation[-1][1] < result.validation[0][1]
    assert heal(tiny_vit(), data, config=QUICK, rates=(5e-3,)).end < result.validation[0][1]


@pytest.mark.parametrize("knows", [True, False])
def test_a_teacher_teaches_until_it_is_passed(knows: bool) -> None:
    (constant, dearest), until = pruned(), pruned()[0]
    dearest.get_output_embeddings().weight.data *= 0.5  # less sure, so that it is no worse than the start
    if knows:
        train_stitches(dearest, TRAIN, replace(QUICK, max_steps=60))
    config = replace(QUICK, eval_steps=2, distillation_weight=0.5, learning_rate=1e-2)
    expected = train_stitches(constant, TRAIN, config, teacher=dearest, validation=HELD)
    asked = []
    dearest.register_forward_hook(lambda *_: asked.append(1))
    known = evaluate(dearest, one_batch(HELD)).metrics["loss"]
    asked.clear()
    result = train_stitches(
        until, TRAIN, replace(config, distillation_until_passed=True), teacher=dearest, validation=HELD
    )
    ahead = [step for step, loss in result.validation if loss < known - 0.1]
    passed = ahead[0] if ahead else 12
    assert (passed == 12) == knows and passed > 0
    assert len(asked) == 2 + passed  # two batches of the held-out examples, and each step's
    assert result.losses[:passed] == expected.losses[:passed]
    assert until.config.training["passed_teacher"] == (not knows) == (result.losses != expected.losses)
    assert until.config.training["teacher"] == constant.config.training["teacher"]


def test_a_resumed_run_knows_that_its_teacher_was_passed(tmp_path: Folder) -> None:
    config = replace(QUICK, eval_steps=2, save_steps=3, distillation_weight=0.5, distillation_until_passed=True)
    (whole, dearest), broken, resumed = pruned(), pruned()[0], pruned()[0]
    dearest.get_output_embeddings().weight.data *= 0.5
    options = {"teacher": dearest, "validation": HELD}
    expected = train_stitches(whole, TRAIN, config, **options)
    with interrupted_after(11):
        train_stitches(broken, TRAIN, config, **options, output_dir=tmp_path)
    assert train_stitches(resumed, TRAIN, config, **options, output_dir=tmp_path).losses == expected.losses
    assert resumed.config.training["passed_teacher"]
    with pytest.raises(ValueError, match="distillation_until_passed and no validation"):
        train_stitches(broken, TRAIN, config, teacher=dearest)
