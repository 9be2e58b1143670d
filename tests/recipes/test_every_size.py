"""The study of every size: what each rule takes at which cost, rows that are made once, and a report of these rows."""

import json
import re
import sys
from dataclasses import replace
from math import hypot
from pathlib import Path as Folder
from statistics import fmean, stdev
from typing import Any

import every_size as recipe
import numpy as np
import pytest
import torch
from experiments import every_size
from experiments.beside import quantised
from experiments.every_size import EverySize, Family, StudySettings
from experiments.every_size_report import Outcome, report, totals
from scipy.stats import sem, spearmanr
from tiny_study import family

from klas_hf import Path, PathSelection, SearchConfig, StitchedModel, evaluate, heal, healing_config, measure_costs
from klas_hf.budgets import Budget
from klas_hf.evaluation import evaluate_divergence

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*do not determine", "ignore:.*rows per")]
SETTINGS = StudySettings(
    lengths=(3,), seeds=(0, 1), buckets=3, search=SearchConfig(joints=2, forwards=4000), contenders=2,
    rivals=("search, by score alone", "klas", "random", "shortgpt", "replaceme", "linear patch"),
)  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[EverySize, str]:
    """A study that was interrupted in the middle of its healing, and went on."""
    folder = tmp_path_factory.mktemp("study")
    first, healed = EverySize(family(), SETTINGS, folder), 0

    def interrupted(*args, **kwargs):
        nonlocal healed
        healed += 1
        if healed > 5:
            raise KeyboardInterrupt
        return heal(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(every_size, "heal", interrupted)
        first.run(0)
        with pytest.raises(KeyboardInterrupt):
            first.run(3)
    before = (folder / "rows.jsonl").read_text()
    assert before.count('"max_steps": 3') >= 5
    study = EverySize(family(), SETTINGS, folder)
    for length in (0, 3):
        study.run(length)
    assert (folder / "rows.jsonl").read_text().startswith(before)
    return study, report(study, (0, 3))


def rows(study: EverySize) -> list[dict]:
    return [json.loads(line) for line in (study.output / "rows.jsonl").read_text().splitlines()[1:]]


def tables(text: str) -> list[list[list[str]]]:
    """Every Markdown table's lines as cells, without the rule below the heading."""
    found = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    cells = [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in one.strip().splitlines()] for one in found
    ]
    return [[one[0], *one[2:]] for one in cells]


def losses(study: EverySize, path: str, joint: str, length: int, metric: str = "loss") -> dict[int, Any]:
    """By seed, each measurement once; "items": of every test sequence."""
    found = {}
    for row in rows(study):
        if (row["path"], row["setting"]["joint"]) == (path, joint) and bool(row["training"]) == bool(length):
            value = row["details"]["items"]["quality"] if metric == "items" else row["metrics"][metric]
            assert found.setdefault(row["seed"], value) == value
    return found


def validation(study: EverySize, path: str, joint: str, seed: int) -> float:
    """The validation loss of the weights that were kept as a model was healed."""
    found = {
        row["details"]["kept"]
        for row in rows(study)
        if (row["path"], row["setting"]["joint"], row["seed"]) == (path, joint, seed) and row["training"]
    }
    (loss,) = found
    return loss


def test_choices_lie_in_their_buckets_at_the_cost_of_ours_where_a_rule_has_a_path_of_it(done) -> None:
    study, _ = done
    small, large = study.family.anchors
    edges = [share * measure_costs(large, tokens=10).macs for share in (0.2, 0.2 + 0.8 / 3, 0.2 + 1.6 / 3, 1.0)]
    found, kinds = study._found["search"], set()
    for length, seed in ((0, 0), (3, 0), (3, 1)):
        for number, of_bucket in enumerate(study.chosen(length, seed)):
            ours = of_bucket["search"]
            under = [
                n
                for n, cost in enumerate(found.costs)
                if cost.macs <= edges[number + 1] and n != found.place(Path.parse("1[:]"))
            ]
            first = min(under, key=lambda n: found.divergence[n])
            assert of_bucket["search, by score alone"].path == found.paths[first]
            if length:
                named = found.contenders(Budget(macs=max(found.costs[n].macs for n in under)), 2)
                joints = {path: found.joint(path, steps=length, known=False) for path in named}  # anchors know nothing
                ends = {path: validation(study, str(path), joints[path], seed) for path in named}
                assert ours.path == min(ends, key=ends.__getitem__) and len(named) == 2
            else:
                assert ours.path == found.paths[first]
            for rule, choice in of_bucket.items():
                kinds.add(rule)
                options = {} if choice.joint == "identity" else {"calibration": study.family.fitting}
                model = StitchedModel.from_path([small, large], choice.path, joint=choice.joint, **options)
                assert choice.macs == measure_costs(model, tokens=10).macs
                if rule.startswith("search"):
                    continue
                wanted = max(ours.macs, edges[number])
                apart = abs(choice.macs - wanted)
                assert apart <= 0.02 * wanted or edges[number] < choice.macs <= edges[number + 1]
                every = study._selections[rule][1]
                inside = [macs for macs in every if edges[number] < macs <= edges[number + 1]]
                nearest = min(abs(macs - wanted) for macs in inside or every)
                assert apart <= max(nearest, 0.02 * wanted)
    assert kinds == {"search", *SETTINGS.rivals}


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ([1.001, 1.015, 1.03], 1),  # of those of equal cost, the one of least value
        ([0.985, 1.001, 1.03], 1),
        ([0.95, 1.03, 1.04], 1),  # none of equal cost: the nearest
        ([0.1, 0.2, 1.6], None),  # none in the bucket either
    ],
)
def test_a_rival_takes_its_best_path_of_equal_cost_else_the_nearest(
    costs: list[float], expected: int | None, done, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, _ = done
    ours = study.chosen(0, 0)[1]["search"].macs
    assert study.edges[1] < 0.95 * ours < 1.04 * ours < study.edges[2]
    macs = tuple(round(share * ours) for share in costs)
    paths = tuple(Path.parse(f"0[:{number}] 1[2:]") for number in (1, 2, 3))
    selection = PathSelection(paths, macs, (3.0, 1.0, 0.0), "klas")
    monkeypatch.setitem(study._selections, "klas", (selection, np.array(macs)))
    taken = study.chosen(0, 0)[1].get("klas")
    assert (taken and taken.path) == (None if expected is None else paths[expected])


def test_every_model_is_made_once_and_measured_as_by_hand(done) -> None:
    study, _ = done
    found = rows(study)
    keys = [(row["rule"], row["path"], row["setting"]["joint"], row["seed"], bool(row["training"])) for row in found]
    assert len(keys) == len(set(keys)) and {row["seed"] for row in found} == {0, 1}
    assert len({row["path"] for row in found if row["rule"] == "anchors"}) == 2
    small, large = study.family.anchors
    shown = next(row for row in found if row["rule"] == "replaceme" and row["seed"] == 1 and row["training"])
    joint = shown["setting"]["joint"]
    assert joint == "merged"
    model = StitchedModel.from_path([small, large], shown["path"], joint=joint, calibration=study.family.fitting)
    start = next(
        row
        for row in found
        if row["path"] == shown["path"] and not row["training"] and row["setting"]["joint"] == joint
    )
    assert start["metrics"]["divergence"] == pytest.approx(
        evaluate_divergence(model, large, study.family.scored), rel=1e-4
    )
    (loss,) = losses(study, shown["path"], joint, 0).values()
    assert loss == pytest.approx(evaluate(model, study.family.test).metrics["loss"], rel=1e-5)
    config = healing_config(3, per_device_batch_size=8, eval_steps=1, seed=1)
    heal(model, study.family.train, teacher=large, validation=study.family.validation, config=config)
    assert shown["metrics"]["loss"] == pytest.approx(evaluate(model, study.family.test).metrics["loss"], rel=1e-5)


def test_the_report_says_what_the_rows_say(done) -> None:
    study, text = done
    assert (study.output / "report.md").read_text() == text and (study.output / "curve-3.png").exists()
    qualities, offers, summed = tables(text.split("## 3 steps")[1])
    chosen = [study.chosen(3, seed) for seed in (0, 1)]
    edges = [share * study.dearest for share in (0.2, 0.2 + 0.8 / 3, 0.2 + 1.6 / 3, 1.0)]
    assert qualities[0][1:] == [
        f"{a / study.dearest:.0%}–{b / study.dearest:.0%}" for a, b in zip(edges, edges[1:], strict=False)
    ]

    def of(rule: str, bucket: int, metric: str = "loss") -> list[Any]:
        """The rule's losses by seed; the random one has another path under each."""
        return [
            losses(study, str(one.path), one.joint, 3, metric)[seed]
            for seed in (0, 1) if (one := chosen[seed][bucket].get(rule)) is not None
        ]  # fmt: skip

    for rule, *cells in qualities[1:-2]:
        for bucket, cell in enumerate(cells):
            if cell == "–":
                assert rule not in chosen[0][bucket]
                continue
            mean, error = map(float, re.match(r"(\S+) ± (\S+)", cell).groups())
            assert (mean, error) == pytest.approx((fmean(of(rule, bucket)), stdev(of(rule, bucket)) / 2**0.5), abs=6e-5)
    small, large = ([*losses(study, path, "least_squares", 3).values()] for path in ("0[:]", "1[:]"))
    cheap = measure_costs(study.small, tokens=10).macs
    advantages: dict[str, list[tuple[float, float, np.ndarray]]] = {}
    for bucket, cells in enumerate(offers[1:]):
        ours, values = chosen[0][bucket]["search"], of("search", bucket)
        assert cells[:2] == [f"{ours.macs / study.dearest:.1%}", str(ours.path)]
        assert cells[3] == f"{(fmean(values) - fmean(small)) / (fmean(large) - fmean(small)):.0%}"
        along = (ours.macs - cheap) / (study.dearest - cheap)
        assert cells[4] == (f"{along:.0%}" if along >= 0 else "–")
        if along >= 0:
            line = fmean(a + along * (b - a) for a, b in zip(small, large, strict=True))
            assert float(qualities[-2][1 + bucket].split()[0]) == pytest.approx(line, abs=6e-5)
        better = {rule: fmean(of(rule, bucket)) - fmean(values) for rule in chosen[0][bucket] if rule != "search"}
        assert better[cells[5]] == pytest.approx(min(better.values()))
        items = {rule: np.mean(of(rule, bucket, "items"), axis=0) for rule in chosen[0][bucket]}
        assert items["search"].mean() == pytest.approx(fmean(values))  # all sequences are as long
        for rule, one in better.items():
            same = str(chosen[0][bucket][rule]) == str(chosen[0][bucket]["search"])
            seeds = 0.0 if same else sem([a - b for a, b in zip(values, of(rule, bucket), strict=True)])
            costs = [[one[bucket][name].macs for name in ("search", rule)] for one in chosen]
            equal = all(0.98 * of_ours <= other <= 1.02 * of_ours for of_ours, other in costs)
            advantages.setdefault(rule, []).append((one, seeds, items[rule] - items["search"], equal))
        by, shown = map(float, re.match(r"(\S+)(?: ± (\S+))?", cells[6]).groups(default="0"))
        _, seeds, apart, _ = advantages[cells[5]][-1]
        assert (by, shown) == pytest.approx((better[cells[5]], hypot(seeds, sem(apart))), abs=6e-5)
    for rule, count, mean, ahead, within, as_dear, of_these in summed[1:]:
        each, over_seeds, apart, equal = zip(*advantages[rule], strict=True)
        errors = map(hypot, over_seeds, map(sem, apart))
        assert (int(count), int(ahead)) == (len(each), sum(one > 0 for one in each))
        assert int(within) == sum(one >= -error for one, error in zip(each, errors, strict=True))
        error = hypot(hypot(*over_seeds) / len(each), sem(np.mean(apart, axis=0)))
        assert [*map(float, mean.split(" ± "))] == pytest.approx([fmean(each), error], abs=6e-5)
        assert int(as_dear) == sum(equal)
        if any(equal):
            told = fmean(one for one, alike in zip(each, equal, strict=True) if alike)
            assert float(of_these.split(" ± ")[0]) == pytest.approx(told, abs=6e-5)
        else:
            assert of_these == "–"
    assert {line[0] for line in summed[1:]} == advantages.keys()


@pytest.mark.parametrize(("times", "equal"), [(0.97, False), (0.985, True), (1.015, True), (1.03, False)])
def test_costs_are_equal_within_two_percent(done, times: float, equal: bool) -> None:
    """The mean over sizes at which a rival costs as much is over none, or over this one."""
    outcome = Outcome(done[0], 3)
    of_bucket = outcome.rows[-1]
    ours = of_bucket["search"][0].macs
    of_bucket["klas"] = [replace(row, macs=round(times * ours)) for row in of_bucket["random"]]
    outcome.rows = [{}, {}, of_bucket]
    (line,) = (line for line in tables(totals(outcome) + "\n")[0] if line[0] == "klas")
    assert line[5:] == (["1", line[2]] if equal else ["0", "–"])


@pytest.mark.parametrize("better", [-0.1, 1e-12, 0.0, 0.1])
def test_no_share_of_a_gap_is_told_where_there_is_none(done, better: float) -> None:
    outcome = Outcome(done[0], 3)
    bucket = max(number for number, of_bucket in enumerate(outcome.rows) if of_bucket)
    of_ours = fmean(row.metrics["loss"] for row in outcome.rows[bucket]["search"])
    at = of_ours + 0.02, of_ours + 0.02 - better
    outcome.anchors = tuple(
        [replace(row, metrics={"loss": loss}) for row in each] for each, loss in zip(outcome.anchors, at, strict=True)
    )
    expected = pytest.approx(0.02 / better) if abs(better) > 0.01 else None
    assert outcome.closed(bucket) == expected


def test_cascades_stand_beside(done) -> None:
    """The cascade as by a loop over sequences."""
    study, text = done
    qualities, _, _ = tables(text.split("## the least-squares start")[1].split("## 3 steps")[0])
    small, large = study.family.anchors
    seen = []
    for model in (small, large):
        of_model = []
        with torch.no_grad():
            for batch in study.family.test:
                for ids in batch["input_ids"]:
                    log_p = model(ids[None]).logits[0, :-1].log_softmax(-1)
                    loss = -log_p[range(len(ids) - 1), ids[1:]].mean()
                    of_model.append((float(log_p.exp().max(-1).values.mean()), float(loss)))
        seen.append(of_model)
    costs = [measure_costs(model, tokens=10).macs for model in (small, large)]
    for bucket, cell in enumerate(qualities[-1][1:]):
        most, best = study.chosen(0, 0)[bucket]["search"].macs, []
        for limit in [0.0, *(sure for sure, _ in seen[0]), 1.0]:
            sent = [sure < limit for sure, _ in seen[0]]
            if costs[0] + costs[1] * fmean(sent) <= most:
                best.append(fmean(b[1] if on else a[1] for a, b, on in zip(*seen, sent, strict=True)))
        assert cell == "–" if most < costs[0] else float(cell) == pytest.approx(min(best), abs=6e-5)


def test_quantised_anchors_stand_beside(done) -> None:
    pytest.importorskip("torchao")
    study, text = done
    model = StitchedModel.from_path(study.family.anchors, "1[:]")  # whose head is its own
    plain = evaluate(model, study.family.test).metrics["loss"]
    shown = re.search(r"(\S+) in int8 \((\d+)% of its bytes at 16 bits\), (\S+) in int4 \((\d+)%", text)
    found = quantised(model, lambda one: evaluate(one, study.family.test).metrics["loss"])
    for name, loss, share in (("int8", shown[1], shown[2]), ("int4", shown[3], shown[4])):
        assert float(loss) == pytest.approx(found[name]["quality"], abs=6e-5)
        assert int(share) == round(100 * found[name]["bytes"])
    assert abs(found["int4"]["quality"] - plain) > 5 * abs(found["int8"]["quality"] - plain) > 0


def test_functional_kl_is_compared_with_quality_over_every_model(done) -> None:
    study, text = done
    models: list[dict[tuple[str, str], tuple[float, float, float]]] = []
    scored = study._found["search"]
    chosen = [study.chosen(3, seed) for seed in (0, 1)]
    for bucket in range(3):
        there: dict[tuple[str, str], set[int]] = {}
        for seed in (0, 1):
            for choice in chosen[seed][bucket].values():
                there.setdefault((str(choice.path), choice.joint), set()).add(seed)
        found = {}
        for (path, joint), seeds in there.items():
            healed = losses(study, path, joint, 3)
            loss = fmean(healed[seed] for seed in seeds)
            if Path.parse(path).joints:
                merged = "merged" if study.costs.mergeable(path) else "least_squares"
                start, score = (losses(study, path, one, 0, "divergence")[0] for one in (joint, merged))
                found[path, joint] = start, loss, score
                if Path.parse(path) in scored.paths:
                    assert score == pytest.approx(scored.divergence[scored.place(Path.parse(path))], rel=1e-4)
        models.append(found)
    every = list({pair for of_bucket in models for pair in of_bucket.values()})
    regrets = [min(of_bucket.values())[1] - min(loss for _, loss, _ in of_bucket.values()) for of_bucket in models]
    shown = re.search(
        r"Spearman (\S+) over (\d+) .*bucket (\S+) in the mean, (\S+) at most.*joined: Spearman (\S+)\.",
        text.split("## 3 steps")[1],
    )
    starts, healed, scores = zip(*every, strict=True)
    for told, foretold in ((shown[1], starts), (shown[5], scores)):
        assert float(told) == pytest.approx(spearmanr(foretold, healed).statistic, abs=6e-4)
    assert int(shown[2]) == len(every)
    assert [float(shown[3]), float(shown[4])] == pytest.approx([fmean(regrets), max(regrets)], abs=6e-5)


@pytest.mark.slow
def test_the_recipe_runs_and_goes_on_without_repeating_work(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    places = ["--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache")]
    rivals = ["--rivals", "klas", "random", "shortgpt"]
    monkeypatch.setattr(sys, "argv", ["every_size.py", "--smoke", "--family", "vit", *rivals, *places])
    recipe.main()
    out = tmp_path / "out" / "vit"
    written = {path: path.read_bytes() for path in out.iterdir() if path.suffix in (".jsonl", ".md", ".safetensors")}
    assert {path.name for path in written} >= {"rows.jsonl", "search.jsonl", "report.md", "scores.safetensors"}
    rules = {json.loads(line)["rule"] for line in written[out / "rows.jsonl"].splitlines()[1:]}
    assert {one for one in rules if "contender" not in one} == {"search", *rivals[1:], "anchors", "score"}
    monkeypatch.setattr(every_size, "heal", None)
    recipe.main()
    assert {path: path.read_bytes() for path in written} == written


def test_rows_of_other_data_are_not_taken_for_these(done) -> None:
    study, _ = done
    changed = Family(**{**vars(family()), "train": study.family.train[:-1]})
    with pytest.raises(ValueError, match="train"):
        EverySize(changed, SETTINGS, study.output)
