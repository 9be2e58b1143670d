"""Supernets: every path is what its anchors compute, costs what it runs, and trains nothing else."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from image_examples import changed
from quick_cases import quick
from tiny_supernets import alone, by_hooks, stitches_of, supernet_of, three_vits, tiny_supernet
from tiny_vision import CLASSES, LABELS, SIDE, images, possible, sample_paths, sized, tiny_pair, used_tensors
from torch import Tensor, nn

from klas_hf import Stitch, StitchedForImageClassification, StitchedSupernet, measure_costs

KINDS = ["vit", "deit_teacher", "dinov2", "swin", "swinv2", "levit", "resnet", "convnext"]
ACROSS = [("resnet", "swin"), ("dinov2", "swin"), ("swin", "resnet"), ("mobilenet_v1", "convnext")]
OFTEN = [("vit", "vit"), ("levit", "levit"), ("resnet", "swin"), ("mobilenet_v1", "convnext")]


@torch.no_grad()
def logits(model: nn.Module, pixels: Tensor, **options: Any) -> Tensor:
    return model(pixels, **options).logits


@pytest.mark.parametrize(("source", "target"), quick([*((kind, kind) for kind in KINDS), *ACROSS], OFTEN))
def test_every_path_equals_hooks_on_the_whole_anchors(source: str, target: str) -> None:
    supernet, anchors = supernet_of(source, target)
    pixels = images(target, 3)
    assert supernet.paths[:2] == (alone(0), alone(1)) and len(supernet.paths) > 3
    for path in supernet.paths:
        got, expected = logits(supernet, pixels, path=path), by_hooks(supernet, anchors, path, pixels)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        if not path.joints:
            assert torch.equal(got, expected)
        assert torch.equal(logits(supernet.extract(path), pixels), got)


@pytest.mark.parametrize("kind", quick(["vit", "swin", "resnet"], ["vit"]))
def test_paths_of_any_number_of_slices(kind: str) -> None:
    anchors, pixels = tiny_pair(kind), images(kind, 3)
    paths = [path for path in sample_paths(anchors, pixels) if path.joints]
    supernet = tiny_supernet(anchors, paths, **sized(kind))
    assert {path.joints for path in paths} == {1, 2} and supernet.paths[2:] == tuple(paths)
    assert len(supernet.joints) == sum(path.joints for path in paths)
    for path, cost in zip(supernet.paths, supernet.path_costs, strict=True):
        got, model = logits(supernet, pixels, path=str(path)), supernet.extract(path)
        torch.testing.assert_close(got, by_hooks(supernet, anchors, path, pixels), rtol=1e-9, atol=1e-9)
        assert torch.equal(logits(model, pixels), got) and model.config.path == str(path)
        assert cost == measure_costs(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", quick(["vit", "swinv2", "levit", "resnet"], ["vit", "resnet"]))
def test_every_path_equals_the_extracted_model_in_any_precision(kind: str, dtype: torch.dtype) -> None:
    anchors = [model.to(dtype) for model in tiny_pair(kind)]
    pixels = images(kind, 2).to(dtype)
    supernet = tiny_supernet(anchors, possible(*anchors, pixels), image_size=SIDE[kind])
    assert supernet.dtype == dtype and all(parameter.dtype == dtype for parameter in supernet.parameters())
    for path in supernet.paths:
        got = logits(supernet, pixels, path=path)
        assert got.dtype == dtype and torch.equal(got, logits(supernet.extract(path), pixels))


def test_three_anchors_join_in_any_order() -> None:
    anchors, pixels = three_vits(), images("vit", 3)
    stitches = [Stitch(1, 1), Stitch(2, 1, 1, 2), Stitch(1, 3, 0, 2), Stitch(1, 2, 0, 2)]
    supernet = tiny_supernet(anchors, stitches)
    assert supernet.paths == (alone(0), alone(1), alone(2), *(stitch.path for stitch in stitches))
    for path in supernet.paths:
        expected = by_hooks(supernet, anchors, path, pixels)
        torch.testing.assert_close(logits(supernet, pixels, path=path), expected, rtol=1e-9, atol=1e-9)
        assert torch.equal(logits(supernet.extract(path), pixels), logits(supernet, pixels, path=path))


def test_paths_list_only_the_anchors_that_a_stitch_joins() -> None:
    supernet = tiny_supernet(three_vits(), [(1, 2, 0, 2)])
    assert supernet.paths == (alone(0), alone(2), Stitch(1, 2, 0, 2).path)
    assert len(supernet.path_costs) == 3
    whole = logits(three_vits()[1], images("vit"))
    assert torch.equal(logits(supernet, images("vit"), path="1[:]"), whole)  # it is there


@pytest.mark.parametrize("kind", quick(["vit", "swin", "resnet"], ["swin"]))
def test_paths_cost_what_the_models_cost_by_themselves(kind: str) -> None:
    supernet, anchors = supernet_of(kind)
    for path, cost in zip(supernet.paths, supernet.path_costs, strict=True):
        model = supernet.extract(path) if path.joints else anchors[path.anchors[0]]
        assert cost == measure_costs(model, image_size=SIDE[kind])
        assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_costs_of_three_anchors_are_those_of_their_pairs() -> None:
    supernet = tiny_supernet(three_vits(), [(1, 1, 0, 1), (1, 1, 0, 2), (1, 1, 1, 2)])
    expected = [measure_costs(model) for model in three_vits()]
    expected += [measure_costs(supernet.extract(stitch)) for stitch in stitches_of(supernet)]
    assert supernet.path_costs == tuple(expected)


def test_outputs_as_tuples_the_loss_and_the_default_path() -> None:
    supernet, anchors = supernet_of("vit")
    pixels, labels = images("vit", 4), torch.tensor([0, 3, 1, 4])
    output = supernet(pixels, labels=labels)
    assert torch.equal(output.logits, logits(anchors[1], pixels))
    assert output.loss.item() == pytest.approx(F.cross_entropy(output.logits, labels).item())
    loss, values = supernet(pixels, labels=labels, path=Stitch(1, 1), return_dict=False)
    assert torch.equal(values, logits(supernet, pixels, path=Stitch(1, 1)))
    assert loss.item() == pytest.approx(F.cross_entropy(values, labels).item())
    assert supernet(pixels, path=alone(0)).loss is None
    assert supernet.config.id2label == LABELS and supernet.num_labels == CLASSES


@pytest.mark.parametrize("kind", ["vit", "swin", "convnext", "resnet", "levit"])
def test_a_step_on_a_path_trains_what_the_path_runs_and_nothing_else(kind: str) -> None:
    supernet, (source, target) = supernet_of(kind)
    pixels, labels = images(kind, 4), torch.tensor([0, 3, 1, 4])
    for number, path in enumerate(supernet.paths[:4]):
        trained = copy.deepcopy(supernet).train()
        optimizer = torch.optim.AdamW(trained.parameters(), lr=0.1, weight_decay=0.1)
        trained(pixels, labels=labels, path=path).loss.backward()
        optimizer.step()
        if stitch := path.stitch:
            parts = {
                "anchors.0": used_tensors(source, 0, stitch.source_stop, embed=True, head=False),
                "anchors.1": used_tensors(target, stitch.target_start, 99, embed=False, head=True),
                f"joints.{number - 2}": set(trained.joints_of(path)[0].state_dict()),
            }
        else:
            parts = {f"anchors.{path.anchors[0]}": set((source, target)[path.anchors[0]].state_dict())}
        used = {f"{part}.{name}" for part, names in parts.items() for name in names}
        # Attention index tables and the like are never written to.
        fixed = {
            name for name, tensor in trained.named_buffers() if "running" not in name and "num_batches" not in name
        }
        assert changed(trained, supernet) == used - fixed


def test_training_mode_drops_blocks_as_the_extracted_model_does() -> None:
    supernet, _ = supernet_of("vit")
    pixels, path = images("vit", 6), Stitch(1, 1)
    extracted = supernet.extract(path)

    def run(model: nn.Module, is_training: bool, seed: int = 5, **options: Any) -> Tensor:
        torch.manual_seed(seed)
        return logits(model.train(is_training), pixels, **options)

    plain = run(supernet, False, path=path)
    assert torch.equal(run(supernet, True, path=path), plain)
    dropped = run(supernet, True, path=path, drop_path=0.5)
    assert not torch.equal(dropped, plain)
    assert torch.equal(dropped, run(extracted, True, drop_path=0.5))
    assert torch.equal(run(supernet, False, path=path, drop_path=0.5), plain)
    supernet.config.drop_path_rate = 0.5
    assert torch.equal(run(supernet, True, path=path), dropped)
    assert torch.equal(run(supernet, True, path=path, drop_path=0.0), plain)
    assert supernet.extract(path).config.drop_path_rate == 0.5
    assert not torch.equal(run(supernet, True, path=alone(1)), run(supernet, False, path=alone(1)))  # an anchor too


def test_blocks_without_a_residual_connection_cannot_be_dropped() -> None:
    supernet, _ = supernet_of("mobilenet_v1", "convnext")
    with pytest.raises(ValueError, match=r"got a stochastic depth of 0.1 for mobilenet_v1"):
        supernet.train()(images("convnext"), path=stitches_of(supernet)[0], drop_path=0.1)


def test_paths_that_are_not_there_are_refused() -> None:
    supernet = tiny_supernet(tiny_pair("vit"), [(1, 1), (2, 1)])
    pixels = images("vit")
    for path in (2, -1, (1, 1, 1)):
        with pytest.raises(TypeError, match=r"expected Stitch\(i, j\)"):
            supernet(pixels, path=path)
    with pytest.raises(ValueError, match="expected slices of anchors"):
        supernet(pixels, path="0")
    for path in (Stitch(1, 2), Stitch(1, 1, 0, 2), "2[:]", "1[:1] 1[2:]"):
        for use in (lambda path: supernet(pixels, path=path), supernet.extract, supernet.joints_of):
            with pytest.raises(
                ValueError, match=r"not made with; expected one of 0\[:1\] 1\[1:\], 0\[:2\] 1\[1:\], or"
            ):
                use(path)
    assert supernet.joints_of(Stitch(2, 1)) == [supernet.joints[1]]


def test_images_that_an_end_of_the_path_does_not_take_are_refused() -> None:
    supernet, _ = supernet_of("dinov2", "vit")  # the first takes any size
    stitch, large = stitches_of(supernet)[0], torch.zeros(1, 3, 48, 48, dtype=torch.float64)
    supernet(large, path=alone(0))
    cases = [(supernet, {"path": stitch}), (supernet.extract(stitch), {}), (supernet, {"path": alone(1)})]
    for model, options in cases:
        with pytest.raises(ValueError, match=r"got images of \(48, 48\) pixels for a vit"):
            model(large, **options)
    with pytest.raises(ValueError, match=r"expected \(batch, 3, height, width\)"):
        supernet(large[:, :2], path=alone(0))


@pytest.mark.parametrize("kind", quick(["vit", "swinv2", "levit", "resnet"], ["vit", "resnet"]))
def test_save_and_load_gives_the_same_supernet(kind: str, tmp_path: Path) -> None:
    supernet, _ = supernet_of(kind)
    supernet.config.drop_path_rate = 0.25
    supernet.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = StitchedSupernet.from_pretrained(tmp_path, dtype=torch.float64)
    assert not again.training and again.paths == supernet.paths
    assert again.state_dict().keys() == supernet.state_dict().keys()
    assert not changed(again, supernet)
    assert again.path_costs == supernet.path_costs
    assert again.config.drop_path_rate == 0.25 and again.config.id2label == LABELS
    assert again.config.image_size == supernet.config.image_size
    pixels = images(kind)
    again = copy.deepcopy(again)  # what safetensors maps into memory may be aligned otherwise, and so rounded
    for path in supernet.paths:
        assert torch.equal(logits(again, pixels, path=path), logits(supernet, pixels, path=path))
    first = stitches_of(supernet)[0]
    assert torch.equal(logits(again.extract(first), pixels), logits(supernet, pixels, path=first))


def test_an_extracted_model_is_a_copy_that_saves_by_itself(tmp_path: Path) -> None:
    supernet, _ = supernet_of("swin")
    path, pixels = stitches_of(supernet)[1], images("swin")
    model = supernet.extract((path.source_stop, path.target_start))
    before = logits(supernet, pixels, path=path)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(supernet, pixels, path=path), before)
    again = StitchedForImageClassification.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(logits(again, pixels), before, rtol=1e-12, atol=1e-12)


def test_a_deep_copy_is_a_supernet_of_its_own() -> None:
    supernet, anchors = supernet_of("vit")
    assert supernet.path_costs
    other, pixels = copy.deepcopy(supernet), images("vit")
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.zero_()
    assert (other.paths, other.path_costs) == (supernet.paths, supernet.path_costs)
    for path in other.paths:
        expected = by_hooks(other, anchors, path, pixels)
        torch.testing.assert_close(logits(other, pixels, path=path), expected, rtol=1e-9, atol=1e-9)


def test_gradients_with_checkpointing_are_those_without() -> None:
    supernet, _ = supernet_of("vit")
    pixels, labels, path = images("vit", 4), torch.tensor([0, 3, 1, 4]), Stitch(1, 1)
    supernet.train()(pixels, labels=labels, path=path).loss.backward()
    expected = {name: p.grad for name, p in supernet.named_parameters() if p.grad is not None}
    supernet.zero_grad()
    supernet.gradient_checkpointing_enable({"use_reentrant": False})
    calls: list[int] = []
    supernet.anchors[0].vit.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    supernet(pixels, labels=labels, path=path).loss.backward()
    assert len(calls) == 2  # run again for the backward
    got = {name: p.grad for name, p in supernet.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, msg=name)
    assert not supernet_of("resnet")[0].supports_gradient_checkpointing
