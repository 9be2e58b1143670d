"""A comparison chooses what the plain functions choose, measures it once, and goes on where it was interrupted."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experiments import image_comparison
from experiments.image_comparison import ComparisonSettings, ImageComparison, ImageTask
from image_examples import Interrupt, interrupted_after
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from klas_hf import (
    Stitch,
    TrainingConfig,
    measure_costs,
    measure_stitch_costs,
    min_kl_stitches,
    random_stitches,
    score_stitches,
    select_stitches,
)
from klas_hf.data.images import ImageSet, image_batches
from klas_hf.evaluation import evaluate
from klas_hf.probes import ImageProbeNet
from klas_hf.rows import ResultRow
from klas_hf.scores.compared import ImageScoring
from klas_hf.selection.choice import StitchSelection
from klas_hf.selection.snnet import snnet_groups, snnet_stitches
from klas_hf.stitching import StitchedSupernet
from klas_hf.training import recalibrate_batch_norm

CLASSES, SIDE = 4, 8
MEAN, STD = (0.4,), (0.3,)
TRAINING = TrainingConfig(
    trainable="full",
    gradient_accumulation_steps=1,
    max_steps=2,
    per_device_batch_size=8,
    learning_rate=1e-2,
    save_steps=1,
)
SETTINGS = ComparisonSettings(
    rules=["klas", "snnet"], pairs="all", buckets=3, threshold=0.1, batch_size=12, calibration_images=20, probe_epochs=2
)
SHAPES = [(3, 8), (3, 12), (4, 16)]


def vit(place: int, **changes: Any) -> PreTrainedModel:
    depth, width = SHAPES[place]
    torch.manual_seed(place)
    config = ViTConfig(
        image_size=SIDE, patch_size=4, num_channels=1, num_labels=CLASSES, num_hidden_layers=depth, hidden_size=width,
        num_attention_heads=2, intermediate_size=2 * width, initializer_range=0.5, **changes,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def resnet(place: int) -> PreTrainedModel:
    torch.manual_seed(place)
    width, depth = 4 + 4 * place, 1 + place
    config = ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[width, width, 2 * width], depths=[depth, 2, 2],
        layer_type="basic", num_labels=CLASSES,
    )  # fmt: skip
    return ResNetForImageClassification(config).eval()


def images(count: int, seed: int, side: int = SIDE) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 1, side, side), generator=generator, dtype=torch.uint8)
    return ImageSet(pixels, [n % CLASSES for n in range(count)], [str(n) for n in range(CLASSES)])


def task(side: int = SIDE, **changes: Any) -> ImageTask:
    return replace(ImageTask(images(40, 1, side), images(24, 2, side), images(25, 3, side), MEAN, STD), **changes)


@pytest.fixture(scope="module")
def vits() -> list[PreTrainedModel]:
    return [vit(place) for place in range(3)]


@pytest.fixture
def make(vits: list[PreTrainedModel], tmp_path: Path) -> Callable[..., ImageComparison]:
    """A comparison of three tiny ViTs, or of other anchors."""

    def made(
        settings: ComparisonSettings = SETTINGS,
        folder: str = "out",
        *,
        anchors: list[Any] | None = None,
        names: list[str] | None = None,
        data: ImageTask | None = None,
        training: TrainingConfig = TRAINING,
        about: dict[str, Any] | None = None,
    ) -> ImageComparison:
        anchors = vits if anchors is None else anchors
        names = [f"anchor {n}" for n in range(len(anchors))] if names is None else names
        return ImageComparison(anchors, names, data or task(), settings, training, tmp_path / folder, about)

    return made


def normalised(data: ImageSet, count: int | None = None) -> Any:
    return image_batches(data, 7, MEAN, STD, count)


def same(one: StitchSelection, other: StitchSelection) -> bool:
    return list(one) == list(other) and one.macs == other.macs and len(one) > 0


# ---- what is chosen


@pytest.mark.parametrize(("pairs", "scoring_images"), [("all", None), ("nearest", 16)])
def test_rules_choose_what_the_plain_functions_choose(
    make: Callable[..., ImageComparison], vits: list[PreTrainedModel], pairs: Any, scoring_images: int | None
) -> None:
    settings = replace(SETTINGS, pairs=pairs, scoring_images=scoring_images)
    comparison = make(settings)
    joined = {"all": [(0, 1), (0, 2), (1, 2)], "nearest": [(0, 1), (1, 2)]}[pairs]
    scores = []
    for pair in joined:
        anchors = [vits[place] for place in pair]
        kinds = [
            tuple(ImageProbeNet.from_pretrained(comparison.output / f"probes-{place}{kind}") for place in pair)
            for kind in ("", "-shuffled")
            if comparison.selection("klas", 0)  # which makes them
        ]
        data = normalised(comparison.task.validation, scoring_images)
        scores.append(
            score_stitches(
                *anchors, data, probes=kinds[0], images=ImageScoring(shuffled=kinds[1]), positions=pair, score="klas"
            )
        )  # fmt: skip
        assert [[one.config.shuffled_labels for one in pair] for pair in kinds] == [[False] * 2, [True] * 2]
    costs = [one.costs for one in scores]
    klas = select_stitches(scores, buckets=3, threshold=0.1)
    assert same(comparison.selection("klas", 0), klas) and len(klas) < klas.candidates
    for rule in ("theta", "mse", "cka", "dm", "class_cka", "klas_shuffled"):
        expected = select_stitches([one.with_score(rule) for one in scores], buckets=3, threshold=0.1)
        assert same(comparison.selection(rule, 0), expected), rule
    assert same(comparison.selection("min_kl", 0), min_kl_stitches(scores, count=len(klas)))
    for seed in (0, 3):
        assert same(comparison.selection("random", seed), random_stitches(costs, buckets=3, seed=seed))
    neighbours = [
        measure_stitch_costs(vits[n].config, vits[n + 1].config, positions=(n, n + 1)) for n in (0, 1)
    ]  # whatever the pairs are
    assert same(comparison.selection("snnet", 0), snnet_stitches(neighbours))


def test_probes_learn_from_the_training_images_and_stop_by_the_validation_images(
    make: Callable[..., ImageComparison], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, ...]] = []
    trained = image_comparison.train_probes

    def spied(anchor: Any, data: Any, config: Any, *, validation: Any) -> Any:
        seen.append((data.images, validation.images, config.epochs, config.shuffled_labels))
        return trained(anchor, data, config, validation=validation)

    monkeypatch.setattr(image_comparison, "train_probes", spied)
    comparison = make()
    assert all(len(one.config.accuracy) == depth for one, (depth, _) in zip(comparison.probes, SHAPES, strict=True))
    assert seen == [(comparison.task.train, comparison.task.validation, 2, False)] * 3


def test_every_takes_all_candidates_or_some_spread_over_cost(
    make: Callable[..., ImageComparison], vits: list[PreTrainedModel]
) -> None:
    expected = set()
    for pair in ((0, 1), (0, 2), (1, 2)):
        costs = measure_stitch_costs(*(vits[place].config for place in pair), positions=pair)
        for i, row in enumerate(costs.macs.tolist(), start=1):
            expected |= {
                Stitch(i, j, *pair)
                for j, macs in enumerate(row)
                if j and costs.source_total <= macs <= costs.target_total
            }
    every = make(replace(SETTINGS, rules=["every"])).selection("every", 0)
    assert set(every) == expected and len(every) == len(expected)
    fewer = make(replace(SETTINGS, rules=["every"], most_stitches=4), "fewer").selection("every", 0)
    assert len(fewer) == 4 and set(fewer) < expected
    assert (fewer[0], fewer[-1]) == (every[0], every[-1])


@pytest.mark.parametrize(("stages", "stitched"), [("all_but_last", {0, 1}), ("middle", {1})])
def test_stages_of_snnet(make: Callable[..., ImageComparison], stages: Any, stitched: set[int]) -> None:
    comparison = make(
        replace(SETTINGS, rules=["snnet"], snnet_stages=stages), anchors=[resnet(0), resnet(1)], data=task(32)
    )
    stage_of = [0, 0, 1, 1, 2, 2]  # of the target's blocks
    assert {stage_of[stitch.target_start] for stitch in comparison.selection("snnet", 0)} == stitched


# ---- what is measured


@pytest.mark.slow
def test_rows_hold_the_anchors_and_every_path_of_every_rule(
    make: Callable[..., ImageComparison], vits: list[PreTrainedModel]
) -> None:
    settings = replace(SETTINGS, rules=["snnet", "random"], seeds=[0, 5])
    comparison = make(settings)
    comparison.run()
    expected = [("anchor", f"{n}[:]", 0) for n in range(3)]
    for seed in (0, 5):
        for rule in ("snnet", "random"):
            chosen = comparison.selection(rule, seed)
            joined = {place for stitch in chosen for place in (stitch.source, stitch.target)}
            expected += [(rule, f"{n}[:]", seed) for n in joined]
            expected += [(rule, str(s.path), seed) for s in chosen]
    assert Counter((row.rule, row.path, row.seed) for row in comparison.rows) == Counter(expected)
    for place, row in enumerate(comparison.anchor_rows()):
        pixels = torch.cat([batch["pixel_values"] for batch in normalised(comparison.task.test)])
        with torch.no_grad():
            right = vits[place](pixels).logits.argmax(-1) == torch.tensor(comparison.task.test.labels)
        assert row.metrics["accuracy"] == pytest.approx(float(right.double().mean()))
        assert row.macs == measure_costs(vits[place].config).macs == comparison.macs[place]
        assert row.details["name"] == f"anchor {place}"


def test_accuracy_among_some_classes(make: Callable[..., ImageComparison], vits: list[PreTrainedModel]) -> None:
    test = images(25, 3)
    test = test.select([n for n, label in enumerate(test.labels) if label in (1, 3)])
    comparison = make(data=task(test=test, classes=(1, 3)))
    pixels = torch.cat([batch["pixel_values"] for batch in normalised(test)])
    for place, row in enumerate(comparison.anchor_rows()):
        with torch.no_grad():
            logits = vits[place](pixels).logits[:, [1, 3]].numpy()
        truth = (np.array(test.labels) == 3).astype(int)
        assert row.metrics["accuracy_among"] == pytest.approx(float((logits.argmax(1) == truth).mean()))
    # A threshold of 1 sends every image on.
    (all_sent,) = [row for row in comparison.cascade_rows() if row.setting["threshold"] == 1]
    assert all_sent.metrics["accuracy"] == comparison.anchor_rows()[-1].metrics["accuracy_among"]


def test_cascades_of_the_cheapest_and_the_dearest(
    make: Callable[..., ImageComparison], vits: list[PreTrainedModel]
) -> None:
    comparison = make()
    pixels = torch.cat([batch["pixel_values"] for batch in normalised(comparison.task.test)])
    with torch.no_grad():
        small, large = (vits[place](pixels).logits.softmax(-1) for place in (0, 2))
    rows = comparison.cascade_rows()
    assert min(row.details["sent"] for row in rows) == 0 < max(row.details["sent"] for row in rows)
    for row in rows:
        right, cost = 0, 0.0
        for one, other, label in zip(small, large, comparison.task.test.labels, strict=True):
            sends = float(one.max()) < row.setting["threshold"]
            cost += comparison.macs[0] + comparison.macs[2] * sends
            right += int(int((other if sends else one).argmax()) == label)
        assert row.metrics["accuracy"] == pytest.approx(right / 25)
        assert row.macs == pytest.approx(cost / 25, abs=1)


@pytest.fixture
def measured_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[StitchedSupernet]]:
    """The supernets that were measured, as they were then."""
    seen: list[StitchedSupernet] = []
    evaluated = image_comparison.evaluate_supernet

    def spied(supernet: StitchedSupernet, *args: Any, **options: Any) -> list[ResultRow]:
        seen.append(copy.deepcopy(supernet))
        return evaluated(supernet, *args, **options)

    monkeypatch.setattr(image_comparison, "evaluate_supernet", spied)
    yield seen


@pytest.mark.parametrize("recalibrate", [False, True])
def test_batch_norm_is_taken_anew_for_each_stitch_if_asked(
    make: Callable[..., ImageComparison], measured_with: list[StitchedSupernet], recalibrate: bool
) -> None:
    settings = replace(SETTINGS, rules=["snnet"], recalibrate=recalibrate)
    comparison = make(settings, anchors=[resnet(0), resnet(1)], data=task(32))
    rows = comparison.measured("snnet", 0)
    stitch = comparison.selection("snnet", 0)[0]
    model = measured_with[0].extract(stitch)
    if recalibrate:
        # In the comparison's own batches: their statistics are averaged.
        recalibrate_batch_norm(model, image_batches(comparison.task.train, 12, MEAN, STD, 20))
    expected = evaluate(model, normalised(comparison.task.test)).metrics["loss"]
    (row,) = [row for row in rows if row.is_of(stitch)]
    assert row.metrics["loss"] == pytest.approx(expected, rel=1e-4)


def test_supernets_start_from_the_anchors_and_learn_under_the_seed(
    make: Callable[..., ImageComparison],
    measured_with: list[StitchedSupernet],
    vits: list[PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = [copy.deepcopy(anchor.state_dict()) for anchor in vits]
    configs: list[TrainingConfig] = []
    trained = image_comparison.train_stitches

    def spied(model: Any, data: Any, config: TrainingConfig, **options: Any) -> Any:
        configs.append(config)
        return trained(model, data, config, **options)

    monkeypatch.setattr(image_comparison, "train_stitches", spied)
    comparison = make(replace(SETTINGS, rules=["random"], seeds=[0, 1]))
    monkeypatch.setattr(comparison, "selection", lambda rule, seed: random_stitches(comparison.costs(), buckets=3))
    comparison.run()
    assert configs == [replace(TRAINING, seed=seed, mean=list(MEAN), std=list(STD)) for seed in (0, 1)]
    one, other = (supernet.state_dict() for supernet in measured_with)
    assert not all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    for anchor, state in zip(vits, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in anchor.state_dict().items())
    fits = measured_with[0].config.joint_fits
    assert [fit["rows"] for fit in fits] == [20 * 5] * len(measured_with[0].joints)  # images × tokens


@pytest.mark.slow
def test_only_the_stitches_of_snnet_share_layers(
    make: Callable[..., ImageComparison], measured_with: list[StitchedSupernet]
) -> None:
    comparison = make(replace(SETTINGS, rules=["snnet", "klas"]))
    comparison.run()
    chosen = comparison.selection("snnet", 0)
    one, other = measured_with
    assert tuple(number for (number,) in one.config.joint_of) == snnet_groups(chosen, comparison.costs("nearest"))
    assert len(one.joints) < len(chosen) and len(other.joints) == len(comparison.selection("klas", 0))


@pytest.mark.parametrize("teacher", ["target", "folder"])
def test_teachers(make: Callable[..., ImageComparison], tmp_path: Path, teacher: str, monkeypatch) -> None:
    seen: list[PreTrainedModel] = []
    monkeypatch.setattr(image_comparison, "train_stitches", lambda *_, teacher, **__: seen.append(teacher) or _stop())
    vit(1, qkv_bias=False).save_pretrained(tmp_path / "teacher")
    name = str(tmp_path / "teacher") if teacher == "folder" else teacher
    training = replace(TRAINING, distillation_weight=0.5)
    comparison = make(replace(SETTINGS, rules=["snnet"], teacher=name), training=training)
    with pytest.raises(Interrupt):
        comparison.run()
    if teacher == "target":
        assert seen[0] is comparison.anchors[2].model
    else:
        assert seen[0].config.qkv_bias is False


def _stop() -> None:
    raise Interrupt


# ---- interruption


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each costly step was begun."""
    counts: Counter = Counter()
    for name in ("train_stitches", "train_probes", "score_stitches", "evaluate"):
        original = getattr(image_comparison, name)

        def spied(*args: Any, original: Any = original, name: str = name, **options: Any) -> Any:
            key = name if name != "train_stitches" else f"{name} {options['output_dir'].name}"
            counts[key] += 1
            return original(*args, **options)

        monkeypatch.setattr(image_comparison, name, spied)
    return counts


def metrics(comparison: ImageComparison) -> dict[tuple[Any, ...], tuple[float, ...]]:
    return {(row.rule, row.measurement): tuple(row.metrics.values()) for row in comparison.rows}


def assert_alike(one: ImageComparison, other: ImageComparison) -> None:
    assert metrics(one).keys() == metrics(other).keys()
    for key, values in metrics(other).items():
        assert metrics(one)[key] == pytest.approx(values, rel=1e-5), key


@pytest.mark.slow
def test_nothing_is_done_twice_after_an_interruption_between_rules(
    make: Callable[..., ImageComparison], counted: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, rules=["klas", "snnet"], pairs="nearest")
    evaluated = image_comparison.evaluate_supernet
    with monkeypatch.context() as patch:
        patch.setattr(
            image_comparison, "evaluate_supernet",
            lambda *args, rule, **options: _stop() if rule == "snnet" else evaluated(*args, rule=rule, **options),
        )  # fmt: skip
        with pytest.raises(Interrupt):
            make(settings).run()
    once = {"train_stitches klas-seed-0": 1, "train_stitches snnet-seed-0": 1}
    assert counted == once | {"train_probes": 6, "score_stitches": 2, "evaluate": 3}
    counted.clear()
    with pytest.MonkeyPatch.context() as patch:
        _refuse_steps(patch)
        resumed = make(settings)
        resumed.run()
    # The second rule's supernet comes from its last checkpoint: the call takes no step.
    assert counted == {"train_stitches snnet-seed-0": 1}
    again = make(settings)
    counted.clear()
    again.run()
    again.plot()
    assert not counted and metrics(again) == metrics(resumed)


def _refuse_steps(patch: pytest.MonkeyPatch) -> None:
    from klas_hf.training import loop

    def step(*_: Any, **__: Any) -> float:
        raise AssertionError("an optimiser step was taken")

    patch.setattr(loop._Run, "_step", step)


@pytest.mark.slow
def test_an_interrupted_run_ends_as_one_without_a_break(make: Callable[..., ImageComparison]) -> None:
    whole = make(folder="whole")
    whole.run()
    for steps in (1, 2):  # in the first rule's training, then in the second's
        with interrupted_after(steps):
            make().run()
    resumed = make()
    resumed.run()
    assert_alike(resumed, whole)


@pytest.mark.slow
def test_an_interruption_while_measuring_keeps_the_rows(
    make: Callable[..., ImageComparison], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, rules=["snnet"])
    comparison = make(settings)
    append, written = comparison.rows.append, []

    def interrupted(row: ResultRow, **options: Any) -> None:
        if len(written) == 7:
            raise Interrupt
        written.append(row)
        append(row, **options)

    monkeypatch.setattr(comparison.rows, "append", interrupted)
    with pytest.raises(Interrupt):
        comparison.run()
    resumed = make(settings)
    assert list(resumed.rows) == written
    resumed.run()
    whole = make(settings, "whole")
    whole.run()
    assert_alike(resumed, whole)


def test_half_saved_probes_are_made_again(make: Callable[..., ImageComparison], counted: Counter) -> None:
    comparison = make()
    saved = ImageProbeNet.save_pretrained
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageProbeNet, "save_pretrained", lambda self, folder: saved(self, folder) or _stop())
        with pytest.raises(Interrupt):
            comparison.probes  # noqa: B018
    counted.clear()
    assert len(make().probes) == 3 and counted["train_probes"] == 3


# ---- what is refused


def test_changed_settings_are_refused(make: Callable[..., ImageComparison], vits: list[PreTrainedModel]) -> None:
    make().anchor_rows()
    make(replace(SETTINGS, rules=["random"], seeds=[7]))  # other rules and seeds go on in the same folder
    others = [
        ("buckets", {"settings": replace(SETTINGS, buckets=4)}),
        ("calibration_images", {"settings": replace(SETTINGS, calibration_images=21)}),
        ("training", {"training": replace(TRAINING, learning_rate=1e-3)}),
        ("images", {"data": task(test=images(26, 3))}),
        ("classes", {"data": task(classes=(0, 2))}),
        ("fingerprints", {"anchors": [vits[0], vits[1], vit(2, layer_norm_eps=0.1, hidden_act="relu").train()]}),
        ("anchors", {"names": ["x", "y", "z"]}),
        ("data", {"about": {"data": "elsewhere"}}),
    ]
    with torch.no_grad():
        others[5][1]["anchors"][2].classifier.bias += 1
    for what, changes in others:
        with pytest.raises(ValueError, match=f"another run, which differs in .*{what}.*another output folder"):
            make(**changes)


def test_anchors_out_of_order_are_refused(make: Callable[..., ImageComparison], vits: list[PreTrainedModel]) -> None:
    with pytest.raises(ValueError, match="cheapest first"):
        make(anchors=[vits[0], vits[2], vits[1]])


def test_wrong_arguments_are_refused_before_any_work(make: Callable[..., ImageComparison], counted: Counter) -> None:
    with pytest.raises(ValueError, match="2 names for 3 anchors"):
        make(names=["small", "large"])
    with pytest.raises(ValueError, match=r"teacher='target'.*distillation_weight=0\.0"):
        make(replace(SETTINGS, teacher="target"))
    with pytest.raises(ValueError, match=r"teacher='none'.*distillation_weight=0\.5"):
        make(training=replace(TRAINING, distillation_weight=0.5))
    for wrong, message in [
        ({"rules": ["klas", "best"]}, r"\['best'\].*snnet"),
        ({"seeds": []}, "at least one"),
        ({"seeds": [1, 1]}, "each once"),
        ({"pairs": "some"}, "pairs='some'.*least_kl"),
        ({"snnet_stages": "first"}, "snnet_stages='first'.*middle"),
        ({"buckets": 0}, "buckets=0"),
        ({"threshold": -0.1}, "threshold=-0.1"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(SETTINGS, **wrong)
    assert not counted


def test_models_in_memory_are_told_apart_by_their_names(make: Callable[..., ImageComparison]) -> None:
    comparison = make(names=["tiny", "small", "large"])
    assert comparison.pairs.names == ("tiny", "small", "large")
    assert comparison.probes[1].config.anchor_name == "small"
