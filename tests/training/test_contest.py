"""Several paths of a budget, healed: the best is kept, as each alone, and those that cannot catch up are given up."""

from dataclasses import replace
from pathlib import Path as Folder
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_examples import interrupted_after
from tiny_models import tiny_model, token_ids

from klas_hf import PathScores, StitchedModel, TrainingConfig, evaluate, heal, heal_best, search_paths, train_stitches
from klas_hf.training.contest import hopeless

pytestmark = pytest.mark.filterwarnings("ignore:.*do not determine", "ignore:.*rows per")
CONFIG = TrainingConfig(
    trainable="full", max_steps=8, per_device_batch_size=8, gradient_accumulation_steps=1, eval_steps=2
)
CALIBRATION = [token_ids(32, 12, seed=9)]


def examples(count: int, seed: int) -> list[dict[str, list[int]]]:
    """Sequences that count upwards, so that there is something to learn."""
    ids = (token_ids(count, 1, seed=seed) + torch.arange(10)) % 32
    return [{"input_ids": row, "labels": row} for row in ids.tolist()]


TRAIN, HELD = examples(48, 1), examples(16, 2)


@pytest.fixture(scope="module")
def setting() -> tuple[list[Any], PathScores]:
    anchors = [tiny_model(seed=1), tiny_model(large=True, seed=2)]
    return anchors, search_paths(anchors, [token_ids(12, 12, seed=seed) for seed in range(4)], tokens=12)


def contest(setting: tuple[list[Any], PathScores], **options: Any) -> Any:
    anchors, found = setting
    given = {"teacher": anchors[1], "validation": HELD, "config": CONFIG, "calibration": CALIBRATION} | options
    return heal_best(anchors, found, "70%", TRAIN, **given)


def test_the_model_is_the_best_of_those_healed_alone(setting) -> None:
    anchors, found = setting
    done = contest(setting)
    assert tuple(done.contenders) == found.contenders("70%", 3) and len(done.contenders) == 3
    ends = {}
    for path, healing in done.contenders.items():
        alone = StitchedModel.from_path(anchors, path, calibration=CALIBRATION, joint=found.joint(path))
        result = heal(alone, TRAIN, teacher=anchors[1], validation=HELD, config=CONFIG)
        count = len(healing.training.validation)  # fewer, where it was given up
        assert healing.training.validation == result.training.validation[:count] and healing.tried == result.tried
        ends[path] = result.end, alone.state_dict()
    best = min(ends, key=lambda path: ends[path][0])
    assert done.model.config.path == str(best) and done.healing == done.contenders[best]
    assert all(torch.equal(tensor, ends[best][1][name]) for name, tensor in done.model.state_dict().items())
    batch = {name: torch.tensor([one[name] for one in HELD]) for name in HELD[0]}
    assert evaluate(done.model, [batch]).metrics["loss"] == pytest.approx(done.healing.end, rel=1e-5)
    told = done.model.config.search
    assert [one["path"] for one in told["contenders"]] == list(map(str, done.contenders))
    assert [one["end"] for one in told["contenders"]] == [one.end for one in done.contenders.values()]
    assert told["divergence"] == float(found.divergence[found.place(best)])


def test_one_contender_is_the_best_path(setting) -> None:
    done = contest(setting, contenders=1)
    assert list(done.contenders) == [setting[1].best("70%")]


def test_an_interrupted_contest_goes_on_to_the_same_model(
    setting, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contest(setting)
    config = replace(CONFIG, save_steps=3)
    with interrupted_after(20):  # among the second one's steps
        contest(setting, config=config, output_dir=tmp_path)
    again = contest(setting, config=config, output_dir=tmp_path)
    assert again.healing.end == pytest.approx(whole.healing.end)
    assert again.model.config.path == whole.model.config.path
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(tensor, again.model.state_dict()[name], msg=name)
    monkeypatch.setattr("klas_hf.training.loop._Run._step", lambda *_: pytest.fail("a step was taken again"))
    last = contest(setting, config=config, output_dir=tmp_path)
    assert last.model.config.search == again.model.config.search


def test_a_run_that_is_given_up_ends_there_and_stays_so(tmp_path: Folder) -> None:
    def run(**options: Any) -> Any:
        model = tiny_model(seed=3)
        return train_stitches(model, TRAIN, CONFIG, validation=HELD, output_dir=tmp_path, **options), model

    asked: list[tuple[int, int]] = []

    def give_up(history: Any, total: int) -> bool:
        asked.append((history[-1][0], total))
        return history[-1][0] >= 4

    first, model = run(give_up=give_up)
    assert asked == [(0, 8), (2, 8), (4, 8)] and first.steps == 4
    again, other = run(give_up=give_up)
    assert again.steps == 4 and again.losses == first.losses and again.validation == first.validation
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
    on, _ = run()  # not given up, it goes on from there
    assert on.steps == 8 and on.losses[:4] == first.losses
    with pytest.raises(ValueError, match="give_up without validation"):
        train_stitches(tiny_model(), TRAIN, CONFIG, give_up=give_up)


@given(
    st.lists(st.floats(0.0, 1.0), min_size=4, max_size=12), st.floats(0.0, 1.0), st.floats(1.0, 2.0),
    st.floats(1e-6, 1.0), st.integers(1, 9), st.data(),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_no_run_is_given_up_that_would_have_won(
    falls: list[float], rise: float, end: float, margin: float, every: int, data: st.DataObject
) -> None:
    """Losses that rise at first, then fall ever more slowly, but up to twice as fast in the second half: a cosine's."""
    count, losses = len(falls), [9.0]
    rising = data.draw(st.integers(0, (count - 1) // 2))
    for place, fall in enumerate(sorted(falls, reverse=True), 1):
        losses.append(losses[-1] + (rise if place <= rising else -fall * (end if 2 * place > count else 1)))
    history = [(every * place, loss) for place, loss in enumerate(losses)]
    give_up = hopeless(losses[-1] + margin)
    assert not any(give_up(history[:seen], every * count) for seen in range(1, count + 2))


def test_what_is_hopeless() -> None:
    """As by hand: 3.0 → 2.0 in half of the steps falls by no more than twice 1.0 in the other half."""
    history = [(0, 3.0), (5, 2.0)]
    assert not hopeless(0.1)(history, 10) and hopeless(-0.1)(history, 10)
    assert not hopeless(-9.0)(history, 11)  # not yet half of the steps
    assert hopeless(1.9)([(0, 1.95), (5, 2.0)], 10) and not hopeless(2.1)([(0, 1.95), (5, 2.0)], 10)
