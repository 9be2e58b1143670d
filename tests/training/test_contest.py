"""Several paths of a budget, healed: the best is kept, as each alone, as an interrupted contest goes on."""

from dataclasses import replace
from pathlib import Path as Folder
from typing import Any

import pytest
import torch
from image_examples import ToyImages, interrupted_after, tiny_vit
from scipy.stats import ttest_rel
from tiny_models import tiny_model, token_ids
from training_examples import QUICK, counting, one_batch

from klas_hf import HealingResult, PathScores, StitchedModel, TrainingConfig, evaluate, heal, heal_best, search_paths
from klas_hf.training import TrainingResult

pytestmark = pytest.mark.filterwarnings("ignore:.*do not determine", "ignore:.*rows per")
CONFIG = replace(QUICK, max_steps=8, eval_steps=2)
CALIBRATION = [token_ids(32, 12, seed=9)]
TRAIN, HELD = counting(48, 1), counting(16, 2)


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
    assert tuple(done.contenders) == found.contenders("70%", known=False) and len(done.contenders) == 4
    assert any(found.joint(path, steps=8) != found.joint(path, steps=8, known=False) for path in done.contenders)
    ends = {}
    for path, healing in done.contenders.items():
        joint = found.joint(path, steps=8, known=False)
        alone = StitchedModel.from_path(anchors, path, calibration=CALIBRATION, joint=joint)
        result = heal(alone, TRAIN, teacher=anchors[1], validation=HELD, config=CONFIG)
        assert healing.training.validation == result.training.validation and healing.tried == result.tried
        ends[path] = result.end, alone.state_dict()
    best = min(ends, key=lambda path: ends[path][0])
    assert done.model.config.path == str(best) and done.healing == done.contenders[best]
    assert all(torch.equal(tensor, ends[best][1][name]) for name, tensor in done.model.state_dict().items())
    assert evaluate(done.model, one_batch(HELD)).metrics["loss"] == pytest.approx(done.healing.end, rel=1e-5)
    told = done.model.config.search
    assert [one["path"] for one in told["contenders"]] == list(map(str, done.contenders))
    assert [one["end"] for one in told["contenders"]] == [one.end for one in done.contenders.values()]
    assert told["divergence"] == float(found.divergence[found.place(best)])


def test_of_images_the_first_stays_unless_another_is_surely_ahead() -> None:
    small, large = tiny_vit(1), tiny_vit(2, num_hidden_layers=4)
    data, held = ToyImages(42, floats=True), ToyImages(30, floats=True, seed=5)
    for anchor in (small, large):
        heal(anchor, data, validation=held, config=replace(CONFIG, max_steps=20), rates=(1e-2,))
    held.labels[:3] = reversed(held.labels[:3])  # mistakes, which cost the surest most
    batches = [{"pixel_values": part} for part in data.images.split(7)]
    found = search_paths([small, large], batches)
    stayed = set()
    for budget in ("60%", "80%"):
        config = replace(CONFIG, distillation_weight=0.5)
        options = {"teacher": large, "validation": held, "config": config, "calibration": batches}
        done = heal_best([small, large], found, budget, data, **options)
        ends = {path: one.end for path, one in done.contenders.items()}
        losses = {path: one.training.examples for path, one in done.contenders.items()}
        first, *others = ends
        surely = [path for path in others if ttest_rel(losses[first], losses[path]).statistic > 1]
        best = min([first, *surely], key=ends.__getitem__)
        assert done.model.config.path == str(best)
        measured = evaluate(done.model, [{"pixel_values": held.images, "labels": torch.tensor(held.labels)}])
        assert measured.metrics["loss"] == pytest.approx(ends[best], rel=1e-4)
        stayed.add((best == first, min(ends, key=ends.__getitem__) == first))
    assert (True, False) in stayed, stayed


@pytest.mark.parametrize("knows", [True, False])
def test_what_starts_far_contends_where_the_teacher_does_not_know_the_data(setting, knows: bool) -> None:
    anchors, found = setting
    teacher = tiny_model(large=True, seed=2)
    config = replace(CONFIG, max_steps=40, eval_steps=10)
    if knows:
        heal(teacher, TRAIN, validation=HELD, config=replace(config, max_steps=200), rates=(3e-3,))
    else:
        teacher.get_output_embeddings().weight.data *= 30  # very sure of what is wrong
    done = contest(setting, teacher=teacher, config=config)
    near, all_of_them = found.contenders("70%"), found.contenders("70%", known=False)
    assert tuple(done.contenders) == (near if knows else all_of_them) and near != all_of_them
    assert bool(done.contenders[near[0]].distillation_weight) == knows


def test_more_contend_where_healing_is_long(setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def healed(model: Any, *_: Any, config: TrainingConfig, **__: Any) -> HealingResult:
        done = TrainingResult(config.max_steps or 0, (), 0.0, 1, ((0, 2.0), (1, 1.0)), (1, 1.0))
        return HealingResult(done, 1e-3, 0.5, {}, 2.0, 1.0)

    monkeypatch.setattr("klas_hf.training.contest.heal", healed)
    named = {}
    for steps in (8, 1000):
        done = contest(setting, config=replace(CONFIG, max_steps=steps), contenders=9)
        named[steps] = list(done.contenders)
        assert named[steps] == list(setting[1].contenders("70%", 9, steps=steps))
    assert set(named[8]) < set(named[1000])


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
