"""The comparison of healings: each method trains as it says, with the same steps, and rows are made once."""

import json
from pathlib import Path as Folder

import healing as recipe
import pytest
import torch
from experiments import healing_study
from experiments.healing_study import METHODS, HealingStudy, joints, match, seen
from tiny_study import family, sequences

from klas_hf import Path, StitchedModel, evaluate, heal, healing_config
from klas_hf.anchors.loading import load_anchors

pytestmark = pytest.mark.filterwarnings("ignore:.*do not determine", "ignore:.*rows per")
PATHS = [Path.parse("0[:2] 1[3:]"), Path.parse("1[:2] 0[1:]")]


def study(folder: Folder) -> HealingStudy:
    return HealingStudy(family(), PATHS, [2], [0], ["full", "lora"], folder)


@pytest.mark.slow
def test_every_method_is_healed_once_and_stands_in_the_report(
    tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = study(tmp_path).run()
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()[1:]]
    kinds = {(row["path"], row["rule"], row["seed"], (row["training"] or {}).get("trainable")) for row in rows}
    assert len(rows) == len(kinds) == (1 + len(METHODS) + 4) + (1 + 4 + 4)  # no state of the small one is matched
    for row in rows:
        if row["rule"] in ("labels", "by default") and row["training"]["trainable"] == "full":
            anchors, path = family().anchors, row["path"]
            model = StitchedModel.from_path(anchors, path, calibration=family().fitting)
            config = healing_config(2, eval_steps=1, per_device_batch_size=8)
            teacher = family().anchors[1] if row["rule"] == "by default" else None
            done = heal(model, family().train, teacher=teacher, validation=family().validation, config=config)
            assert row["details"]["learning_rate"] == done.learning_rate
            assert row["metrics"]["loss"] == pytest.approx(evaluate(model, family().test).metrics["loss"], rel=1e-5)
    monkeypatch.setattr(healing_study, "heal", None)
    assert study(tmp_path).run() == text and text.count("states, then both") == 2


@pytest.mark.parametrize("where", ["head", "joints"])
def test_matching_brings_the_states_nearer_to_the_large_anchors(where: str) -> None:
    given = family()
    small, large = given.anchors
    path = Path.parse("0[:2] 1[2:3] 1[5:]")
    model = StitchedModel.from_path([small, large], path, calibration=given.fitting)
    ids = torch.tensor(sequences(8, seed=9))

    def distances() -> list[float]:
        with torch.no_grad():
            if where == "head":
                mine, theirs = (one(ids, output_hidden_states=True).hidden_states[-1] for one in (model, large))
                return [float((mine - theirs).square().sum() / theirs.square().sum())]
            states = large(ids, output_hidden_states=True).hidden_states
            with seen(joints(model)) as got:
                model(ids)
            return [
                float((mine - states[at]).square().sum() / states[at].square().sum())
                for mine, at in zip(got, (2, 5), strict=True)
            ]

    before = distances()
    config = healing_config(40, per_device_batch_size=8)
    match(model, path, large, given.train, where, config, 40, 3e-3)
    after = distances()
    assert all(one < other for one, other in zip(after, before, strict=True)), (before, after)
    assert load_anchors([large])[0].fingerprint == load_anchors([family().anchors[1]])[0].fingerprint


def test_the_paths_are_the_best_and_the_best_stitch() -> None:
    found = recipe.best_paths(family(), 0.8)
    assert found[-1].stitch is not None and found[0].joints and len(set(found)) == len(found) <= 2


@pytest.mark.parametrize("options", [{"lengths": [0]}, {"seeds": []}, {"trainable": ["stitch"]}])
def test_what_cannot_be_compared_is_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        recipe.HealingArguments(**options)
