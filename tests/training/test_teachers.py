"""A teacher that remembers: the same answers to the last bit, for fewer forwards, and nothing left behind."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from image_examples import tiny_resnet, tiny_vit
from tiny_models import tiny_model, token_ids
from torch import Tensor
from training_examples import QUICK, anchors, counting, pruned
from transformers import PreTrainedModel

from klas_hf import FunctionalScoring, SearchConfig, heal, heal_best, remember_answers, search_paths, train_stitches
from klas_hf.training import teachers

ask = torch.no_grad()(teachers.ask)
TRAIN, HELD = counting(48, 1), counting(16, 2)


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[list[int]]:
    """The number of runs of a model's blocks meanwhile."""
    runs = [0]

    def count(*_: object) -> None:
        runs[0] += 1

    block = next(one for name, one in model.named_modules() if name.rpartition(".")[2] == "0")
    hook = block.register_forward_pre_hook(count)
    try:
        yield runs
    finally:
        hook.remove()


def batches(model: PreTrainedModel) -> list[Tensor]:
    if model.main_input_name == "pixel_values":
        return list(torch.rand(3, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    return [token_ids(2, 9, seed=seed) for seed in range(3)]


@pytest.mark.parametrize(
    "model",
    [tiny_model(), tiny_model("gemma2"), tiny_model("gpt_neox"), pruned()[0], tiny_vit(), tiny_resnet()],
    ids=lambda model: model.config.model_type,
)
def test_what_was_asked_before_is_answered_alike_without_a_run(model: PreTrainedModel) -> None:
    model.eval()
    name = model.main_input_name
    with torch.no_grad():
        expected = [model(**{name: batch}).logits for batch in batches(model)]
    with remember_answers(model):
        for often in range(3):
            with counted(model) as runs:
                for batch, logits in zip(batches(model), expected, strict=True):
                    assert torch.equal(ask(model, {name: batch}).logits, logits)
            assert bool(runs[0]) == (often == 0)
        with counted(model) as runs:  # the model itself is as ever
            assert torch.equal(model(**{name: batches(model)[0]}).logits, expected[0])
        assert runs[0]
    with counted(model) as runs:  # forgotten
        assert torch.equal(ask(model, {name: batches(model)[0]}).logits, expected[0])
    assert runs[0]


def test_what_differs_in_anything_is_another_question() -> None:
    model, ids = tiny_model().eval(), token_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    questions = [
        {"input_ids": ids},
        {"input_ids": ids.flip(0)},
        {"input_ids": ids.reshape(3, 6)},
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ids, "attention_mask": mask.flip(0)},
        {"input_ids": ids, "output_hidden_states": True},
    ]
    with torch.no_grad():
        expected = [model(**question) for question in questions]
        with torch.autocast("cpu", torch.bfloat16):
            fast = model(ids).logits
    with remember_answers(model):
        for _ in range(2):
            for question, answer in zip(questions, expected, strict=True):
                found = ask(model, question)
                assert torch.equal(found.logits, answer.logits)
                assert (found.hidden_states is None) == (answer.hidden_states is None)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(ask(model, {"input_ids": ids}).logits, fast)
    assert not torch.equal(fast.float(), expected[0].logits)


def test_an_answer_that_is_written_over_is_still_remembered_as_it_was() -> None:
    model, ids = tiny_model().eval().model, token_ids(2, 9)
    with torch.no_grad():
        expected = model(ids).last_hidden_state
    with remember_answers(model):
        for _ in range(3):
            states = ask(model, {"input_ids": ids}).last_hidden_state
            assert torch.equal(states, expected)
            states.zero_()


def test_gradients_flow_and_dropout_drops_as_ever() -> None:
    model, ids = tiny_model(attention_dropout=0.5).eval(), token_ids(2, 9)
    with remember_answers(model):
        expected = ask(model, {"input_ids": ids}).logits
        for _ in range(2):
            model.zero_grad()
            teachers.ask(model, {"input_ids": ids, "labels": ids}).loss.backward()
            assert all(parameter.grad is not None for parameter in model.parameters())
        model.train()
        assert not torch.equal(ask(model, {"input_ids": ids}).logits, expected)
        model.eval()
        assert torch.equal(ask(model, {"input_ids": ids}).logits, expected)


def test_no_more_is_kept_than_the_limit() -> None:
    model = tiny_model().eval()
    asked = [{"input_ids": batch} for batch in batches(model)]
    room = 2 * 2 * 9 * model.config.hidden_size * 4  # two batches of two sequences of nine tokens, in 32 bits
    with remember_answers(model, limit=room):
        for question in asked:
            ask(model, question)
        with counted(model) as runs:
            for question in asked:
                ask(model, question)
    assert runs[0] == 1


def test_a_forward_of_its_own_is_put_back_whatever_happens() -> None:
    model, question = tiny_model().eval(), {"input_ids": token_ids(2, 9)}

    class Doubling(ModelHook):
        def post_forward(self, module, output):  # type: ignore[no-untyped-def]
            return output.__class__(last_hidden_state=2 * output.last_hidden_state)

    plain = ask(model, question).logits
    with remember_answers(model), pytest.raises(TypeError):
        ask(model, question | {"labels": "none"})
    assert "forward" not in vars(model.model)
    add_hook_to_module(model.model, Doubling())
    before = model.model.forward
    with remember_answers(model), remember_answers(None):
        for _ in range(2):
            torch.testing.assert_close(ask(model, question).logits, 2 * plain)
            assert model.model.forward is before


def test_a_contest_asks_its_teacher_of_each_batch_once() -> None:
    small, large = anchors()
    train_stitches(large, TRAIN, replace(QUICK, max_steps=60))  # so that it teaches
    scored = [{"input_ids": token_ids(16, 10)}]
    scoring = FunctionalScoring(calibration=[token_ids(48, 10)])
    found = search_paths([small, large], scored, SearchConfig(scoring=scoring), tokens=10)
    options = {"teacher": large, "validation": HELD, "config": replace(QUICK, max_steps=20)}
    options["calibration"] = [token_ids(48, 10)]
    with counted(large) as runs, remember_answers(large, limit=0):  # the outer one's limit holds
        expected = heal_best([small, large], found, "80%", TRAIN, **options)
    often = runs[0]
    with counted(large) as runs:
        contest = heal_best([small, large], found, "80%", TRAIN, **options)
    assert len(contest.contenders) == 2 and all(one.distillation_weight for one in contest.contenders.values())
    # Twenty batches to train on, two to look at.
    assert runs[0] == 22 < often / 2
    for path, healing in expected.contenders.items():
        assert contest.contenders[path].tried == healing.tried
        assert contest.contenders[path].training.losses == healing.training.losses
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(contest.model.state_dict()[name], tensor), name


def test_around_several_healings_nothing_is_forgotten() -> None:
    model, dearest = pruned()
    train_stitches(dearest, TRAIN, replace(QUICK, max_steps=60))
    runs_after = []
    with remember_answers(dearest), counted(dearest) as runs:
        for _ in range(2):
            heal(copy.deepcopy(model), TRAIN, teacher=dearest, validation=HELD, config=QUICK, rates=(1e-3,))
            runs_after.append(runs[0])
    assert runs_after[0] == runs_after[1] > 0
