"""Accuracy, loss and probabilities of classifiers; a supernet's rows are those of its extracted models."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_examples import changed
from labelled_images import Batch, joined, labelled, split
from scipy.stats import sem
from tiny_supernets import stitches_of, supernet_of, three_vits, tiny_supernet
from tiny_vision import blocks, embedding, tiny_classifier, tiny_pair
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from klas_hf import (
    ResultRow,
    RowFile,
    Stitch,
    StitchedSupernet,
    evaluate,
    evaluate_supernet,
    measure_costs,
    recalibrate_batch_norm,
)
from klas_hf.evaluation import Measurement, evaluate_anchor, predict_probabilities
from klas_hf.evaluation import supernets as evaluation

AMONG = [3, 0, 1]


def naive(model: PreTrainedModel, batches: list[Batch], classes: list[int] | None = None) -> dict[str, float]:
    """Means over images, in numpy."""
    return {name: np.mean(values) for name, values in naive_terms(model, batches, classes).items()}


@torch.no_grad()
def naive_terms(model: PreTrainedModel, batches: list[Batch], classes: list[int] | None) -> dict[str, list[float]]:
    """One image at a time."""
    correct, among, losses = [], [], []
    for pixels, label in zip(*joined(batches), strict=True):
        logits = model(pixels[None].to(model.dtype)).logits[0].double().numpy()
        correct.append(logits.argmax() == int(label))
        losses.append(np.log(np.exp(logits).sum()) - logits[int(label)])
        if classes:
            among.append(max(classes, key=lambda number: logits[number]) == int(label))
    return {"accuracy": correct, "loss": losses} | ({"accuracy_among": among} if classes else {})


def informed(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """A model whose accuracy is far from chance and from 1."""
    with torch.no_grad():
        pixels, labels = joined(labelled(kind, 3, seed=8))
        model.eval()
        got = model(pixels.to(model.dtype)).logits
        one_hot = torch.nn.functional.one_hot(labels, 5).to(got)
        # The least-squares map of its own logits to the labels, put into its head.
        centred = got - got.mean(0)
        turn = torch.linalg.lstsq(centred, one_hot).solution.T
        head = [module for module in model.classifier.modules() if isinstance(module, nn.Linear)][-1]
        head.weight.copy_(4 * turn @ head.weight)
        head.bias.copy_(4 * turn @ (head.bias - got.mean(0)))
    return model


@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize("classes", [None, AMONG])
def test_accuracy_and_loss_are_those_of_single_images(kind: str, classes: list[int] | None) -> None:
    model, data = informed(tiny_classifier(kind), kind), labelled(kind, 2, 12)
    expected = naive(model, data, classes)
    assert 0.2 < expected["accuracy"] < 1
    for size in (1, 5, 24):
        got = evaluate(model, iter(split(data, size)), classes=classes)
        assert got.metrics == pytest.approx(expected, rel=1e-5) and got.details["images"] == 24
        errors = {name: sem(values) for name, values in naive_terms(model, data, classes).items()}
        assert got.details["standard_errors"] == pytest.approx(errors, rel=1e-5)


def test_a_model_is_measured_in_evaluation_mode_and_its_own_precision() -> None:
    model, data = tiny_classifier("vit", hidden_dropout_prob=0.5).to(torch.bfloat16), labelled("vit", 1, 12)
    expected = naive(model, data)
    model.train()
    model.vit.layers[0].eval()
    modes = [module.training for module in model.modules()]
    assert evaluate(model, data).metrics == pytest.approx(expected, rel=1e-3)
    assert [module.training for module in model.modules()] == modes


def test_data_without_images_or_labels_are_refused() -> None:
    model, (supernet, _) = tiny_classifier("vit"), supernet_of("vit")
    bare = [torch.zeros(2, 3, 32, 32)]
    for measure in (evaluate, predict_probabilities):
        with pytest.raises(ValueError, match="got a batch of images without 'labels'"):
            measure(model, bare)
        with pytest.raises(ValueError, match="got no images to"):
            measure(model, [])
    for data, message in ((bare, "without 'labels'"), ([], "got no images to measure on")):
        with pytest.raises(ValueError, match=message):
            evaluate_supernet(supernet, data, rule="klas", rows=RowFile("unwritten.jsonl", {}))
    assert not Path("unwritten.jsonl").exists()


def test_labels_that_a_model_does_not_have_are_refused() -> None:
    model, (batch,) = tiny_classifier("vit"), labelled("vit", 1, 4)
    for label in (-100, 5):
        batch["labels"] = torch.tensor([0, 1, label, 2])
        with pytest.raises(ValueError, match=f"got the label {label} for a model of 5 classes; expected 0 to 4"):
            evaluate(model, [batch])
    with pytest.raises(TypeError, match="got labels of torch.float32; expected whole numbers"):
        evaluate(model, [batch | {"labels": torch.zeros(4)}])


def test_one_image_has_no_standard_error() -> None:
    measured = evaluate(tiny_classifier("vit"), labelled("vit", 1, 1))
    assert measured.details == {"images": 1, "standard_errors": {"accuracy": None, "loss": None}}


@pytest.mark.parametrize("classes", [None, AMONG])
def test_probabilities_are_softmax_over_the_classes_asked_for(classes: list[int] | None) -> None:
    model, data = tiny_classifier("vit"), labelled("vit", 2, 12)
    if classes:
        for batch in data:
            batch["labels"] = torch.tensor(classes)[batch["labels"] % 3]
    model.train()
    got, labels = predict_probabilities(model, split(data, 7), classes=classes)
    assert model.training and got.dtype == np.float64
    pixels, truth = joined(data)
    with torch.no_grad():
        expected = model.eval()(pixels.double()).logits.softmax(-1).numpy()
    columns = classes or list(range(5))
    expected = expected[:, columns] / expected[:, columns].sum(-1, keepdims=True)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert [columns[place] for place in labels] == truth.tolist()


def test_a_label_that_is_not_among_the_classes_is_refused() -> None:
    model, data = tiny_classifier("vit"), labelled("vit", 1, 4)
    data[0]["labels"] = torch.tensor([0, 3, 4, 1])
    with pytest.raises(ValueError, match="got label 4, which is not among the 3 classes to predict"):
        predict_probabilities(model, data, classes=AMONG)


def rows_in(folder: Path) -> RowFile:
    return RowFile(folder / "rows.jsonl", {"run": 1})


@pytest.mark.parametrize(
    ("source", "target"), [("vit", "vit"), ("swin", "swin"), ("levit", "levit"), ("resnet", "swin")]
)
def test_rows_are_those_of_the_extracted_models(source: str, target: str, tmp_path: Path) -> None:
    supernet, _ = supernet_of(source, target)
    for anchor in supernet.anchors:
        if "levit" not in source:
            informed(anchor, target)
    data = labelled(target, 2, 12)
    supernet.train()
    rows = evaluate_supernet(supernet, data, rule="klas", rows=rows_in(tmp_path), seed=3, classes=AMONG)
    assert supernet.training and len(rows) == len(supernet.paths)
    for path, row in zip(supernet.paths, rows, strict=True):
        alone = supernet.extract(path) if path.joints else supernet.anchors[path.anchors[0]]
        expected = evaluate(alone, data, classes=AMONG)
        assert (
            row.metrics == pytest.approx(expected.metrics, rel=1e-6) and row.metrics.keys() == expected.metrics.keys()
        )
        assert row.parameters == sum(parameter.numel() for parameter in alone.parameters())
        assert (row.seed, row.rule, row.details["images"]) == (3, "klas", 24)
        if source == "vit":
            assert row.macs == measure_costs(alone).macs
        assert row.is_of(path)
    assert len({row.metrics["loss"] for row in rows}) == len(rows)
    assert list(rows_in(tmp_path)) == rows


def test_rows_of_three_anchors(tmp_path: Path) -> None:
    stitches = [Stitch(1, 1), Stitch(1, 1, 0, 2), Stitch(1, 1, 1, 2), Stitch(2, 3, 0, 2)]
    supernet, data = tiny_supernet(three_vits(), stitches), labelled("vit", 2, 6)
    rows = evaluate_supernet(supernet, data, rule="all", rows=rows_in(tmp_path))
    assert [row.path for row in rows] == [
        "0[:]", "1[:]", "2[:]", "0[:1] 1[1:]", "0[:1] 2[1:]", "1[:1] 2[1:]", "0[:2] 2[3:]",
    ]  # fmt: skip
    for stitch, row in zip(stitches, rows[3:], strict=True):
        assert row.is_of(stitch)
        assert row.metrics == pytest.approx(evaluate(supernet.extract(stitch), data).metrics, rel=1e-6)


def ran(supernet: StitchedSupernet) -> list[tuple[int, int]]:
    """A list that grows by (anchor, block) with each block that runs from now on; block 0 is the embedding."""
    seen: list[tuple[int, int]] = []
    for place, model in enumerate(supernet.anchors):
        embedding(model).register_forward_hook(lambda *_, place=place: seen.append((place, 0)))
        for number, block in enumerate(blocks(model), 1):
            block[0].register_forward_hook(lambda *_, place=place, number=number: seen.append((place, number)))
    return seen


def test_paths_share_the_fronts_of_their_anchors(tmp_path: Path) -> None:
    supernet, _ = supernet_of("vit")
    seen, data = ran(supernet), labelled("vit", 2, 6)
    evaluate_supernet(supernet, data, rule="all", rows=rows_in(tmp_path))
    rears = sum(3 - stitch.target_start for stitch in stitches_of(supernet))
    assert len(seen) == 2 * ((1 + 2) + (1 + 3) + rears)


def test_what_a_file_has_is_not_measured_again(tmp_path: Path) -> None:
    supernet, _ = supernet_of("vit")
    data, seen = labelled("vit", 1, 6), ran(supernet)
    first = evaluate_supernet(supernet, data, rule="all", rows=rows_in(tmp_path))
    seen.clear()
    assert evaluate_supernet(supernet, data, rule="all", rows=rows_in(tmp_path)) == first
    assert evaluate_supernet(supernet, [], rule="all", rows=rows_in(tmp_path)) == first
    assert not seen
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    place = supernet.paths.index(Stitch(1, 2).path)
    (tmp_path / "rows.jsonl").write_text("".join(lines[: 1 + place] + lines[2 + place :]))
    assert evaluate_supernet(supernet, data, rule="all", rows=rows_in(tmp_path)) == first
    assert seen == [(0, 0), (0, 1), (1, 3)]
    evaluate_supernet(supernet, data, rule="all", rows=rows_in(tmp_path), seed=1)
    evaluate_supernet(supernet, data, rule="other", rows=rows_in(tmp_path))
    assert len(rows_in(tmp_path)) == 3 * len(first)


def test_rows_of_another_supernet_are_not_taken_for_its_own(tmp_path: Path) -> None:
    """After more training, or measured otherwise, every path is measured anew."""
    supernet, _ = supernet_of("vit")
    data = labelled("vit", 1, 6)
    first = evaluate_supernet(supernet, data, rule="all", rows=rows_in(tmp_path))
    with torch.no_grad():
        supernet.joints[0].projection.weight.mul_(3)
    trained = {"max_steps": 3}
    second = evaluate_supernet(supernet, data, rule="all", rows=rows_in(tmp_path), training=trained)
    assert [row.training for row in first + second] == [None] * len(first) + [trained] * len(first)
    assert [row.metrics for row in first] != [row.metrics for row in second]
    among = evaluate_supernet(supernet, data, rule="all", rows=rows_in(tmp_path), training=trained, classes=AMONG)
    assert all("accuracy_among" in row.metrics for row in among)
    assert list(rows_in(tmp_path)) == first + second + among


def test_an_interrupted_measurement_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "GROUP", 3)
    supernet, _ = supernet_of("vit")  # 8 paths
    data, passes = labelled("vit", 2, 6), []

    class Failing:
        def __iter__(self) -> Iterator[Batch]:
            passes.append(1)
            yield data[0]
            if len(passes) == 2:
                raise KeyboardInterrupt
            yield data[1]

    with pytest.raises(KeyboardInterrupt):
        evaluate_supernet(supernet, Failing(), rule="all", rows=rows_in(tmp_path))
    assert len(rows_in(tmp_path)) == 3
    rows = evaluate_supernet(supernet, Failing(), rule="all", rows=rows_in(tmp_path))
    assert len(passes) == 4 and len(rows) == 8
    whole = evaluate_supernet(supernet, data, rule="all", rows=RowFile(tmp_path / "whole.jsonl", {}))
    assert [row.metrics for row in rows] == [row.metrics for row in whole]


@pytest.mark.parametrize("kind", ["resnet", "levit"])
def test_recalibrated_rows_are_those_of_recalibrated_models(kind: str, tmp_path: Path) -> None:
    supernet, _ = supernet_of(kind)
    before = copy.deepcopy(supernet)
    fresh, data = labelled(kind, 3, 8, seed=5), labelled(kind, 2, 12)
    rows = evaluate_supernet(supernet, data, rule="all", rows=rows_in(tmp_path), recalibration=fresh)
    assert not changed(supernet, before)
    plain = evaluate_supernet(supernet, data, rule="plain", rows=rows_in(tmp_path))
    for path, row, other in zip(supernet.paths, rows, plain, strict=True):
        alone = supernet.extract(path) if path.joints else copy.deepcopy(supernet.anchors[path.anchors[0]])
        assert other.metrics == pytest.approx(evaluate(alone, data).metrics, rel=1e-6)
        assert recalibrate_batch_norm(alone, fresh) > 0
        assert row.metrics == pytest.approx(evaluate(alone, data).metrics, rel=1e-6)
        assert row.metrics["loss"] != pytest.approx(other.metrics["loss"], rel=1e-3)


@pytest.mark.parametrize("where", ["recalibration", "batches"])
def test_a_failure_puts_the_statistics_back(where: str, tmp_path: Path) -> None:
    supernet, _ = supernet_of("resnet")
    before, good = copy.deepcopy(supernet), labelled("resnet", 2, 6)
    bad = [good[0], {"pixel_values": torch.zeros(2, 1, 32, 32), "labels": torch.zeros(2, dtype=torch.long)}]
    options: dict[str, Any] = {"batches": good, "recalibration": good} | {where: bad}
    with pytest.raises(ValueError, match="expected .batch, 3, height, width"):
        evaluate_supernet(supernet, rule="all", rows=rows_in(tmp_path), **options)
    assert not changed(supernet, before)
    with pytest.raises(ValueError, match="got no batches to take BatchNorm statistics from"):
        evaluate_supernet(supernet, good, rule="all", rows=rows_in(tmp_path), recalibration=[])
    assert not changed(supernet, before) and not len(rows_in(tmp_path))


def test_recalibration_leaves_a_supernet_without_batch_norm_alone(tmp_path: Path) -> None:
    supernet, data = tiny_supernet(tiny_pair("vit"), [(1, 1)]), labelled("vit", 1, 6)
    rows = evaluate_supernet(supernet, data, rule="all", rows=rows_in(tmp_path), recalibration=data)
    plain = evaluate_supernet(supernet, data, rule="plain", rows=rows_in(tmp_path))

    def key(row: ResultRow) -> tuple[Any, ...]:
        return row.path, row.metrics["accuracy"], row.metrics["loss"]

    assert [key(row) for row in rows] == [key(row) for row in plain]


def test_images_that_a_target_does_not_take_are_refused(tmp_path: Path) -> None:
    supernet = tiny_supernet(tiny_pair("dinov2", "vit"), [(1, 1)])
    large = [{"pixel_values": torch.zeros(2, 3, 48, 48), "labels": torch.tensor([0, 1])}]
    with pytest.raises(ValueError, match=r"got images of \(48, 48\) pixels for a vit"):
        evaluate_supernet(supernet, large, rule="all", rows=rows_in(tmp_path))


def test_an_anchors_row_counts_the_images_that_it_is_given(tmp_path: Path) -> None:
    model, rows = tiny_classifier("resnet"), RowFile(tmp_path / "rows.jsonl", {})
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 96, 96, dtype=model.dtype))
    options: dict[str, Any] = {"rule": "source", "rows": rows, "position": 0}
    given = [evaluate_anchor(model, lambda _: Measurement({}), image_size=size, **options) for size in (96, None, 96)]
    assert given[0].macs == pytest.approx(counter.get_total_flops() / 2, rel=1e-6)
    assert given[1].macs == measure_costs(model).macs > given[0].macs == given[2].macs and len(rows) == 2
