"""Joints merged into the block before: numpy's least squares, no layer left, no cost, the anchors untouched."""

import copy
import re
from itertools import combinations
from pathlib import Path as Folder

import numpy as np
import pytest
import quick_cases
import torch
from quick_cases import quick
from tiny_models import tiny_model, token_ids
from tiny_vision import KINDS, images, tiny_pair

from klas_hf import Path, SearchConfig, StitchedModel, evaluate, measure_costs, measure_path_costs, search_paths
from klas_hf.anchors.families import DECODER_FAMILIES
from klas_hf.anchors.loading import load_anchors
from klas_hf.models.vision_features import image_size
from klas_hf.models.vision_kinds import vision_kind

pytestmark = pytest.mark.filterwarnings("ignore:.*do not determine", "ignore:.*rows per")
IDS = [token_ids(16, 12, seed=seed) for seed in range(6)]
MERGING = sorted(name for name, family in DECODER_FAMILIES.items() if family.writer)


def deep(family: str = "llama", **changes) -> torch.nn.Module:
    return tiny_model(family, large=True, **{"num_hidden_layers": 5, "intermediate_size": 96, "seed": 3} | changes)


def at(model: torch.nn.Module, block: int, ids: torch.Tensor) -> torch.Tensor:
    """The states before a block, of the tokens that count."""
    anchor = load_anchors([model])[0]
    (batch,) = anchor.read([ids])
    return anchor.rows(anchor.states(batch)[block], batch).double()


@pytest.mark.parametrize("family", sorted(DECODER_FAMILIES))
def test_what_a_writer_writes_is_added_to_the_state_as_it_is(family: str) -> None:
    model = deep(family)
    (anchor,) = load_anchors([model])
    (batch,) = anchor.read(IDS[:1])
    block, moved = anchor.blocks[1], 0.1 * torch.randn(anchor.width, generator=torch.Generator().manual_seed(0))
    before = anchor.states(batch)[2]
    writer = DECODER_FAMILIES[family].writer
    if writer is None:
        linear = [
            one for one in block.modules() if isinstance(one, torch.nn.Linear) and one.out_features == anchor.width
        ]
        handles = [linear[-1].register_forward_hook(lambda _, args, output: output + moved)] if linear else []
        after = anchor.states(batch)[2]
        assert not handles or not torch.allclose(after, before + moved, atol=1e-5)
    else:
        handles = [block.get_submodule(writer).register_forward_hook(lambda _, args, output: output + moved)]
        torch.testing.assert_close(anchor.states(batch)[2], before + moved, rtol=1e-4, atol=1e-5)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", quick(sorted(DECODER_FAMILIES), quick_cases.FAMILIES))
@pytest.mark.parametrize("saved", [False, True])
def test_a_layer_within_an_anchor_leads_to_what_the_anchor_has_behind_the_cut(
    family: str, saved: bool, tmp_path: Folder
) -> None:
    model = deep(family)
    before = copy.deepcopy(model.state_dict())
    if saved:
        model.save_pretrained(tmp_path)
    made = StitchedModel.from_path([tmp_path if saved else model], "0[:2] 0[4:]", calibration=IDS)
    x, y = (torch.cat([at(model, block, ids) for ids in IDS]) for block in (2, 4))
    found = np.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1).numpy(), y.numpy(), rcond=None)[0]
    (layer,) = made.stitching_layers()
    torch.testing.assert_close(layer.weight.double(), torch.from_numpy(found[:-1].T), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.bias.double(), torch.from_numpy(found[-1]), rtol=1e-3, atol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "phi"])  # without a bias and with one
def test_the_weight_is_what_numpy_finds(family: str) -> None:
    model = deep(family)
    before = copy.deepcopy(model.state_dict())
    made = StitchedModel.from_path([model], "0[:2] 0[4:]", joint="merged", calibration=IDS)
    writer = DECODER_FAMILIES[family].writer
    old = load_anchors([model])[0].blocks[1].get_submodule(writer)
    new = made.model.slices[0].get_submodule(DECODER_FAMILIES[family].blocks)[-1].get_submodule(writer)
    written: list[torch.Tensor] = []
    handle = old.register_forward_hook(lambda _, args, output: written.append(output))
    states, wanted = (torch.cat([at(model, block, ids) for ids in IDS]) for block in (2, 4))
    handle.remove()
    counted = [next(iter(load_anchors([model])[0].read([ids]))).counted for ids in IDS]
    m = torch.cat([one[mask] for one, mask in zip(written, counted, strict=False)]).double()
    r = wanted - (states - m)
    x = m if old.bias is None else torch.cat([m, torch.ones(len(m), 1, dtype=torch.float64)], 1)
    found = np.linalg.lstsq(x.numpy(), r.numpy(), rcond=None)[0]
    expected = torch.from_numpy(found[: m.shape[1]].T) @ old.weight.double()
    torch.testing.assert_close(new.weight.double(), expected, rtol=1e-3, atol=1e-4)
    if old.bias is not None:
        bias = torch.from_numpy(found[: m.shape[1]].T) @ old.bias.double() + torch.from_numpy(found[-1])
        torch.testing.assert_close(new.bias.double(), bias, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not made.stitching_layers() and [fit["joint"] for fit in made.config.joint_fits] == ["merged"]
    assert made.config.joint_fits[0]["rows"] == len(m)


@pytest.mark.parametrize("path", ["0[:2] 0[3:]", "0[:1] 0[2:3] 0[4:]", "0[:2] 0[5:]"])
def test_merged_joints_start_nearer_than_none_and_cost_nothing(path: str) -> None:
    model = deep()
    merged, none = (
        StitchedModel.from_path([model], path, joint=joint, calibration=IDS if joint == "merged" else None)
        for joint in ("merged", "identity")
    )
    ids = token_ids(32, 12, seed=77)

    def distance(made: StitchedModel) -> float:
        # What the merging makes smaller: the distance of the states that the head reads, on other data.
        states = [one(ids, output_hidden_states=True).hidden_states[-1] for one in (made, model)]
        return float((states[0] - states[1]).square().mean())

    with torch.no_grad():
        assert distance(merged) < distance(none)
    assert merged.num_parameters() == none.num_parameters() < model.num_parameters()
    costs = measure_path_costs([model], tokens=12)
    assert costs.mergeable(path) and costs.of(path, identity=True) == measure_costs(merged, tokens=12)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_classifier_s_writer_writes_is_added_as_it_is(kind: str) -> None:
    model = tiny_pair(kind)[1]
    one = vision_kind(model.config)
    (anchor,) = load_anchors([model])
    (batch,) = anchor.read([images(kind, 2)])
    block = one.blocks(model.config)[0]
    names = [
        n for n, part in model.get_submodule(block.modules[-1]).named_modules() if isinstance(part, torch.nn.Linear)
    ]
    before = anchor.states(batch)[1].hidden
    moved = 0.1 * torch.randn(before.shape[-1], generator=torch.Generator().manual_seed(0))
    for name in [one.writer] if one.writer else names:
        layer = model.get_submodule(f"{block.modules[-1]}.{name}")
        if len(layer.weight) != before.shape[-1]:
            continue
        handle = layer.register_forward_hook(lambda _, args, output: output + moved)
        after = anchor.states(batch)[1].hidden
        handle.remove()
        assert torch.allclose(after, before + moved, rtol=1e-4, atol=1e-5) == (one.writer is not None)


@pytest.mark.parametrize(("kind", "path"), [("vit", "0[:1] 0[3:]"), ("deit", "0[:2] 0[3:]"), ("swin", "0[:3] 0[4:]")])
def test_classifiers_start_nearer_than_without_and_cost_nothing(kind: str, path: str) -> None:
    model = tiny_pair(kind)[1]
    size = image_size(model.config)
    merged, none = (
        StitchedModel.from_path([model], path, joint=joint, image_size=size, calibration=calibration)
        for joint, calibration in (("merged", [images(kind, 64)]), ("identity", None))
    )
    unseen = images(kind, 32, seed=9)
    with torch.no_grad():
        states = [one.run_slices(unseen)[0][-1].hidden if one is not model else None for one in (merged, none)]
    (anchor,) = load_anchors([model])
    (batch,) = anchor.read([unseen])
    wanted = anchor.states(batch)[-1].hidden
    assert (states[0] - wanted).square().mean() < (states[1] - wanted).square().mean()
    assert merged.num_parameters() == none.num_parameters() and not merged.stitching_layers()
    costs = measure_path_costs([model], image_size=size)
    assert costs.mergeable(path) and costs.of(path, identity=True).macs == measure_costs(merged, image_size=size).macs


@pytest.mark.parametrize("kind", KINDS)
def test_where_slices_of_a_classifier_fit_it_is_known_without_making_them(kind: str) -> None:
    model = tiny_pair(kind)[1]
    one, size = vision_kind(model.config), image_size(model.config)
    costs, found = measure_path_costs([model], image_size=size), []
    for stop, start in combinations(range(1, len(one.blocks(model.config))), 2):
        path = f"0[:{stop}] 0[{start}:]"
        try:
            made = StitchedModel.from_path([model], path, joint="identity", image_size=size)
        except ValueError as error:
            assert re.search("features|equal grids", str(error)) and not costs.seamless(path)
            continue
        assert costs.seamless(path) == one.residual  # MobileNetV1's blocks cannot be skipped
        assert costs.of(path, identity=True).macs == measure_costs(made, image_size=size).macs
        found.append(path)
    assert found and not costs.seamless("0[:]")
    assert not measure_path_costs([model, model], image_size=size).seamless("0[:1] 1[1:]")  # of two anchors


def test_it_is_saved_and_generates(tmp_path: Folder) -> None:
    made = StitchedModel.from_path([deep()], "0[:1] 0[2:3] 0[4:]", joint="merged", calibration=IDS)
    made.save_pretrained(tmp_path)
    again = StitchedModel.from_pretrained(tmp_path)
    ids = torch.tensor([[1, 5, 6]])
    assert torch.equal(again.generate(ids, max_new_tokens=4), made.generate(ids, max_new_tokens=4))
    assert evaluate(again, [{"input_ids": IDS[0], "labels": IDS[0]}]) == evaluate(
        made, [{"input_ids": IDS[0], "labels": IDS[0]}]
    )


def test_a_search_costs_paths_of_one_anchor_without_layers_and_makes_them_so() -> None:
    models = [tiny_model(seed=1), deep()]
    found = search_paths(models, IDS, SearchConfig(buckets=5), tokens=12)
    layered = search_paths(models, IDS, SearchConfig(buckets=5, merged=False), tokens=12)
    costs = measure_path_costs(models, tokens=12)
    for scores, kind in ((found, "merged"), (layered, "least_squares")):
        for path, cost in zip(scores.paths, scores.costs, strict=True):
            one = len(path.anchors) == 1 and path.joints > 0
            assert scores.joint(path) == (kind if one else "least_squares")
            assert cost == costs.of(path, identity=one and kind == "merged")
    made = StitchedModel.from_anchors(*models, budget="80%", calibration=IDS, search=SearchConfig(buckets=5))
    assert not made.stitching_layers() or len(Path.parse(made.config.path).anchors) == 2
    assert measure_costs(made, tokens=12).macs <= 0.8 * found.dearest.macs


def test_what_cannot_be_merged_is_refused() -> None:
    model = deep()
    with pytest.raises(ValueError, match="joint='merged' and no calibration"):
        StitchedModel.from_path([model], "0[:2] 0[3:]", joint="merged")
    with pytest.raises(ValueError, match=r"joint='merged'.*between two anchors"):
        StitchedModel.from_path([deep(seed=5), model], "0[:2] 1[3:]", joint="merged", calibration=IDS)
    with pytest.raises(ValueError, match=r"'olmo2'.*expected one of"):
        StitchedModel.from_path([deep("olmo2")], "0[:2] 0[3:]", joint="merged", calibration=IDS)
    with pytest.raises(ValueError, match=r"'resnet'.*expected a ViT, DeiT or Swin"):
        StitchedModel.from_path([tiny_pair("resnet")[1]], "0[:1] 0[2:]", joint="merged", calibration=[images("resnet")])


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_ridge_leaves_the_layer_as_it_is(family: str) -> None:
    model = deep(family)
    made = StitchedModel.from_path([model], "0[:2] 0[4:]", joint="merged", calibration=IDS, ridge=1e9)
    names = DECODER_FAMILIES[family]
    blocks = made.model.slices[0].get_submodule(names.blocks)
    old, new = (one.get_submodule(names.writer) for one in (load_anchors([model])[0].blocks[1], blocks[-1]))
    torch.testing.assert_close(new.weight, old.weight, rtol=1e-4, atol=1e-6)
