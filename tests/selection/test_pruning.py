"""The rules that prune one anchor, against loops over what hooks see; and what joins the blocks that are left."""

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path as Folder
from typing import Any

import numpy as np
import pytest
import quick_cases
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quick_cases import quick
from tiny_models import FAMILIES, block_list, left_padded, reference_logits, tiny_model, token_ids
from tiny_vision import KINDS, as_rows, blocks, images, logits, outputs, tiny_classifier, tiny_pair
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import LlamaConfig, LlamaForCausalLM

from klas_hf import (
    Path,
    PathSelection,
    StitchedModel,
    TrainingConfig,
    esta_stitches,
    gromov_paths,
    linear_patch_paths,
    measure_costs,
    measure_path_costs,
    measure_stitch_costs,
    model_card,
    replaceme_paths,
    save_delta,
    shortgpt_paths,
    tail_paths,
    train_stitches,
    uniform_paths,
)
from klas_hf.maths.patches import ChannelPatch, CosineMap, hadamard
from klas_hf.selection import block_distances

pytestmark = pytest.mark.filterwarnings("ignore:.*do not determine", "ignore:.*rows per")
MEASURED: list[Callable[..., PathSelection]] = [shortgpt_paths, gromov_paths, replaceme_paths, linear_patch_paths]
DEPTH = 6


def deep_model() -> Any:
    """One whose blocks 2 and 4 do little."""
    model = tiny_model(large=True, seed=3, num_hidden_layers=DEPTH)
    with torch.no_grad():
        for block, scale in ((2, 0.1), (4, 0.2)):
            block_list(model)[block].self_attn.o_proj.weight.mul_(scale)
            block_list(model)[block].mlp.down_proj.weight.mul_(scale)
    return model


def padded() -> list[dict[str, Tensor]]:
    return [left_padded(token_ids(5, 9, seed=seed), [9, 4, 7, 9, 2]) for seed in range(3)]


def on_meta(depth: int) -> Any:
    """A model whose weights are not there: the rules that use none need none."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=depth, hidden_size=64, intermediate_size=96))


@torch.no_grad()
def hooked_rows(model: Any, batch: dict[str, Tensor]) -> list[list[Tensor]]:
    """Of each sequence, `(tokens, width)` of every state at the tokens that count, from hooks."""
    kept: list[Tensor] = []
    blocks = block_list(model)
    handles = [blocks[0].register_forward_pre_hook(lambda m, args, kw: kept.append(args[0]), with_kwargs=True)]
    handles += [one.register_forward_hook(lambda m, args, out: kept.append(out)) for one in blocks]
    model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    found = []
    for row, mask in enumerate(batch["attention_mask"]):
        tokens = mask.nonzero().flatten().tolist()[1:]  # the first is a sink
        tokens = [t for t in tokens if batch["input_ids"][row, t] != model.config.bos_token_id]
        found.append([state[row, tokens].double() for state in kept])
    return [of_one for of_one in found if len(of_one[0])]


def sequences(model: Any) -> list[list[Tensor]]:
    return [one for batch in padded() for one in hooked_rows(model, batch)]


def mean_distance(found: list[list[Tensor]], start: int, stop: int) -> float:
    return np.mean(
        [1 - float(cosine_similarity(x, y, dim=0)) for one in found for x, y in zip(one[start], one[stop], strict=True)]
    )


def removed(path: Path) -> list[int]:
    kept = {b for _, start, stop in path.bounds([DEPTH]) for b in range(start, stop)}
    return [b for b in range(DEPTH) if b not in kept]


def test_the_tail_is_dropped_as_in_the_published_example(tmp_path: Folder) -> None:
    # Lu et al. keep the first 24 of 32 blocks; Gromov et al.'s simple rule keeps the very last one too.
    model = on_meta(32)
    paths = tail_paths(model)
    assert Path.parse("0[:24] 0[32:]") in paths.paths and len(paths) == 31 and paths.rule == "tail"
    assert Path.parse("0[:23] 0[31:]") in tail_paths(model, final=1).paths
    model.config.save_pretrained(tmp_path)  # no weights
    assert tail_paths(tmp_path).paths == paths.paths == tail_paths(str(tmp_path)).paths


@given(st.integers(2, 24))
@settings(max_examples=15, deadline=None)
def test_blocks_are_spaced_evenly(depth: int) -> None:
    if depth == 2:
        with pytest.raises(ValueError, match="uniform can leave out none"):
            uniform_paths(on_meta(depth))
        return
    paths = uniform_paths(on_meta(depth))
    assert [path.depth([depth]) for path in paths] == list(range(2, depth))
    for path in paths:
        kept = [b for _, start, stop in path.bounds([depth]) for b in range(start, stop)]
        gone = sorted(set(range(depth)) - set(kept))
        assert kept[0] == 0 and kept[-1] == depth - 1
        assert max(np.diff(gone), default=0) - min(np.diff(gone), default=0) <= 1
        assert abs((gone[0] - 1) - (depth - 2 - gone[-1])) <= 1 + (depth - 2) / len(gone) % 1


def test_half_of_the_blocks_is_every_other() -> None:
    assert str(uniform_paths(on_meta(8))[3]) == "0[:2] 0[3:4] 0[5:6] 0[7:]"  # 8 − 3: blocks 2, 4 and 6 are gone


@pytest.mark.parametrize("rows", [7, 256])
def test_influence_is_shortgpts(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_distances, "ROWS", rows)
    model = deep_model()
    found = sequences(model)
    influence = {b: mean_distance(found, b, b + 1) for b in range(1, DEPTH)}
    order = sorted(influence, key=influence.__getitem__)
    paths = shortgpt_paths(model, padded())
    assert [removed(path) for path in paths] == [sorted(order[:count]) for count in range(DEPTH - 1, 0, -1)]
    wanted = [sum(influence[b] for b in order[:count]) for count in range(DEPTH - 1, 0, -1)]
    assert paths.values == pytest.approx(wanted)
    assert max(path.joints for path in paths) > 1


def test_runs_are_those_of_least_angle_at_the_last_token() -> None:
    model = deep_model()
    found = sequences(model)

    def angle(start: int, stop: int) -> float:
        cosines = [float(cosine_similarity(one[start][-1], one[stop][-1], dim=0)) for one in found]
        return float(np.mean(np.arccos(cosines)) / np.pi)

    paths = gromov_paths(model, padded())
    for path, value in zip(paths, paths.values, strict=True):
        gone = removed(path)
        every = {(i, i + len(gone)): angle(i, i + len(gone)) for i in range(1, DEPTH - len(gone) + 1)}
        assert (gone[0], gone[-1] + 1) == min(every, key=every.__getitem__)
        assert value == pytest.approx(min(every.values()))
    assert [len(removed(path)) for path in paths] == list(range(DEPTH - 1, 0, -1))


@pytest.mark.parametrize(("rule", "final"), [(replaceme_paths, 0), (linear_patch_paths, 1)])
def test_runs_are_those_of_least_cosine_distance(rule: Callable[..., PathSelection], final: int) -> None:
    model = deep_model()
    found = sequences(model)
    paths = rule(model, padded())
    assert [len(removed(path)) for path in paths] == list(range(DEPTH - 1 - final, 0, -1))
    for path, value in zip(paths, paths.values, strict=True):
        gone = removed(path)
        every = {i: mean_distance(found, i, i + len(gone)) for i in range(1, DEPTH - final - len(gone) + 1)}
        assert gone == list(range(gone[0], gone[-1] + 1)) and gone[0] == min(every, key=every.__getitem__)
        assert value == pytest.approx(min(every.values()))


@pytest.mark.parametrize("rule", [tail_paths, uniform_paths, *MEASURED])
def test_paths_cost_what_their_models_do_and_go_up(rule: Callable[..., PathSelection]) -> None:
    model, data = deep_model(), [padded()] if rule in MEASURED else []
    paths = rule(model, *data, tokens=9)
    whole = measure_costs(model, tokens=9).macs
    assert all(one < other for one, other in pairwise([*paths.macs, whole]))
    for path, macs in zip(paths, paths.macs, strict=True):
        assert path.slices[0].start == 0 and all(one.stop < other.start for one, other in pairwise(path.slices))
        made = StitchedModel.from_path([model], path, joint=paths.joint, calibration=padded())
        assert measure_costs(made, tokens=9).macs == macs
        assert measure_costs(made, tokens=9) == measure_path_costs([model], tokens=9).of(
            path, identity=paths.joint in ("identity", "merged")
        )
    shares = [macs / whole for macs in paths.macs]
    some = rule(model, *data, tokens=9, shares=[shares[2] + 1e-6, shares[1], 1.0], place=2)
    chosen = [str(paths[place]).replace("0[", "2[") for place in (1, 2, len(paths) - 1)]
    assert [str(path) for path in some] == chosen
    with pytest.raises(ValueError, match="expected at least"):
        rule(model, *data, tokens=9, shares=[0.5, shares[0] / 2])


@pytest.mark.parametrize(
    "kind", quick(["vit", "swin", "resnet", "convnext", "levit", "mobilenet_v1"], ["swin", "mobilenet_v1"])
)
@pytest.mark.parametrize("rule", [tail_paths, uniform_paths, *MEASURED])
def test_images(kind: str, rule: Callable[..., PathSelection]) -> None:
    model = tiny_classifier(kind, large=True, seed=2)
    data = [images(kind, 4, seed=seed) for seed in range(3)]
    states = [[as_rows(model, state, bare=False) for state in outputs(model, batch)[0]] for batch in data]
    shapes = [tuple(state.shape[1:]) for state in states[0]]
    runs = [(i, j) for i in range(1, len(shapes)) for j in range(i + 1, len(shapes)) if shapes[i] == shapes[j]]
    try:
        paths = rule(model, *([data] if rule in MEASURED else []))
    except ValueError as error:
        assert "can leave out none" in str(error)
        assert all(rule not in (shortgpt_paths, gromov_paths) or j == 0 for _, j in runs)
        return
    for path in paths:
        for one, other in pairwise(path.bounds([len(shapes) - 1])):
            assert (one[2], other[1]) in runs
        made = StitchedModel.from_path([model], path, joint=paths.joint, calibration=data)
        assert made(data[0]).logits.isfinite().all()
    if rule is replaceme_paths:
        for path, value in zip(paths, paths.values, strict=True):
            start, stop = path.bounds([len(shapes) - 1])[0][2], path.bounds([len(shapes) - 1])[1][1]
            distances = {
                run: np.mean([float(1 - cosine_similarity(s[run[0]], s[run[1]], dim=-1).mean()) for s in states])
                for run in runs
                if run[1] - run[0] == stop - start
            }
            assert (start, stop) == min(distances, key=distances.__getitem__)
            assert value == pytest.approx(distances[start, stop])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("path", ["0[:1] 0[2:3] 0[4:]", "0[:2] 0[5:]"])
def test_identities_leave_the_anchor_without_the_blocks(family: str, path: str) -> None:
    anchor, ids = tiny_model(family, large=True, seed=2), token_ids(2, 12)
    made = StitchedModel.from_path([anchor], path, joint="identity")
    assert made.stitching_layers() == [] and made.config.joint_fits is None
    assert torch.equal(made(ids).logits, reference_logits([anchor], path, [nn.Identity()] * 2, input_ids=ids))


def test_identities_are_the_anchor_with_its_layers_deleted(tmp_path: Folder) -> None:
    anchor, ids = tiny_model(large=True, seed=2), token_ids(2, 12)
    made = StitchedModel.from_path([anchor], "0[:1] 0[3:4] 0[5:]", joint="identity")
    cut = copy.deepcopy(anchor)
    cut.model.layers = nn.ModuleList(cut.model.layers[number] for number in (0, 3))
    for number, layer in enumerate(cut.model.layers):
        layer.self_attn.layer_idx = number
    cut.config.num_hidden_layers = 2
    assert torch.equal(made(ids).logits, cut(ids).logits)
    made.save_pretrained(tmp_path)
    again = StitchedModel.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, made(ids).logits)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in made.parameters())
    assert torch.equal(*(one.generate(ids, max_new_tokens=6, do_sample=False) for one in (again, cut)))


def test_identities_travel_as_a_delta(tmp_path: Folder) -> None:
    deep_model().save_pretrained(tmp_path / "anchor")
    tiny_classifier("vit", large=True).save_pretrained(tmp_path / "classifier")
    for name, pixels in (("anchor", token_ids(2, 12)), ("classifier", images("vit"))):
        made = StitchedModel.from_path([str(tmp_path / name)], "0[:1] 0[2:]", joint="identity")
        save_delta(made, tmp_path / f"{name}-delta")
        again = StitchedModel.from_pretrained(tmp_path / f"{name}-delta")
        assert again.stitching_layers() == [] and torch.equal(again(pixels).logits, made(pixels).logits)


def test_identities_are_trained_without_joints() -> None:
    examples = [{"input_ids": ids, "labels": ids} for ids in token_ids(4, 12).tolist()]
    made = StitchedModel.from_path([deep_model()], "0[:2] 0[4:]", joint="identity")
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    train_stitches(made, examples, TrainingConfig(max_steps=3, trainable="lora", per_device_batch_size=2))
    assert made.state_dict().keys() == before.keys() and not any("joints" in name for name in before)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())
    with pytest.raises(ValueError, match="no stitching layer"):
        train_stitches(made, examples, TrainingConfig(max_steps=1, trainable="stitch", per_device_batch_size=2))


@pytest.mark.parametrize("kind", quick(KINDS, quick_cases.KINDS))
def test_identities_leave_a_classifier_without_the_blocks(kind: str) -> None:
    model, pixels = tiny_classifier(kind, large=True, seed=2), images(kind)
    for path in (*uniform_or_none(model), *tail_or_none(model)):
        made = StitchedModel.from_path([model], path, joint="identity", image_size=pixels.shape[-1])
        assert not made.stitching_layers()
        assert torch.equal(logits(made, pixels), logits_without(model, path, pixels))


@torch.no_grad()
def logits_without(model: Any, path: Path, pixels: Tensor) -> Tensor:
    """Of a whole forward, in which each block left out gives what enters it."""
    every, entered = blocks(model), {}
    kept = {b for _, start, stop in path.bounds([len(every)]) for b in range(start, stop)}
    handles = []

    def enter(number: int, module: nn.Module, args: tuple) -> None:
        entered[number] = args[0]

    def give(number: int, module: nn.Module, args: tuple, output: Any) -> Any:
        return (entered[number], *output[1:]) if isinstance(output, tuple) else entered[number]

    for number in set(range(len(every))) - kept:
        handles += [every[number][0].register_forward_pre_hook(partial(enter, number))]
        handles += [every[number][-1].register_forward_hook(partial(give, number))]
    found = model(pixels).logits
    for handle in handles:
        handle.remove()
    return found


def uniform_or_none(model: Any) -> list[Path]:
    try:
        return list(uniform_paths(model))
    except ValueError:
        return []


def tail_or_none(model: Any) -> list[Path]:
    try:
        return list(tail_paths(model))
    except ValueError:
        return []


def test_linear_patch_is_the_papers() -> None:
    """P = H D Hᵀ, D the mean over sequences of the ratio of mean magnitudes of rotated channels."""
    model = tiny_model(large=True, seed=2, hidden_size=64, num_hidden_layers=DEPTH)
    made = StitchedModel.from_path([model], "0[:2] 0[4:]", joint="linear_patch", calibration=padded())
    rotation = scipy.linalg.hadamard(64) / 8
    ratios = []
    for states in sequences(model):
        x, y = (np.abs(states[place].numpy() @ rotation).mean(0) for place in (2, 4))
        ratios.append(y / x)
    patch = rotation @ np.diag(np.mean(ratios, 0)) @ rotation.T
    (layer,) = made.stitching_layers()
    np.testing.assert_allclose(layer.weight.detach().numpy(), patch, atol=2e-6)
    assert not layer.bias.any() and np.isfinite(made.config.joint_fits[0]["r2"])


def test_linear_patch_of_images_takes_each_image_for_a_sample() -> None:
    model, data = tiny_classifier("vit", large=True, seed=2), [images("vit", 3, seed=seed) for seed in range(2)]
    width = model.config.hidden_size
    rotation = hadamard(width)
    made = StitchedModel.from_path([model], "0[:1] 0[2:]", joint="linear_patch", calibration=data)
    ratios = []
    for batch in data:
        states = outputs(model, batch)[0]
        ratios += [
            (y @ rotation).abs().mean(0) / (x @ rotation).abs().mean(0) for x, y in zip(*states[1:3], strict=True)
        ]
    expected = rotation @ torch.diag(torch.stack(ratios).mean(0)) @ rotation.T
    torch.testing.assert_close(made.stitching_layers()[0].weight, expected)


def test_processes_together_find_the_patch_that_one_would() -> None:
    x, y, items = torch.randn(12, 8), torch.randn(12, 8), torch.arange(12) // 3
    whole, *parts = (ChannelPatch(8) for _ in range(3))
    whole.update(x, y, items)
    for part, rows in zip(parts, (slice(0, 3), slice(3, 12)), strict=True):
        part.update(x[rows], y[rows], items[rows])
    others = iter((parts[1]._ratios, parts[1]._items))
    torch.testing.assert_close(parts[0].solve(lambda value: value + next(others)), whole.solve(lambda value: value))


def test_the_cosine_map_is_adams_from_the_identity() -> None:
    """Ten steps on all rows, with the gradient of 1 − cos(W x, y) written out."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 8))
    y = x @ rng.normal(size=(8, 8)) + x
    weight, first, second = np.eye(8), np.zeros((8, 8)), np.zeros((8, 8))
    losses = []
    for step in range(1, 11):
        z = x @ weight.T
        norm_z, norm_y = (np.linalg.norm(of, axis=1, keepdims=True) for of in (z, y))
        cosine = (z * y).sum(1, keepdims=True) / norm_z / norm_y
        losses.append(1 - cosine.mean())
        gradient = -((y / norm_y - cosine * z / norm_z) / norm_z).T @ x / len(x)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        weight = weight - 1e-4 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    found = CosineMap(8)
    found.update(torch.tensor(x[:20]), torch.tensor(y[:20]), torch.zeros(20))
    found.update(torch.tensor(x[20:]), torch.tensor(y[20:]), torch.zeros(30))
    np.testing.assert_allclose(found.solve(lambda value: value).numpy(), weight, atol=1e-6)
    assert losses[-1] < losses[0]


def test_the_cosine_map_turns_states_towards_the_anchors() -> None:
    model, data = deep_model(), [token_ids(64, 12, seed=seed) for seed in range(8)]
    made = StitchedModel.from_path([model], "0[:2] 0[4:]", joint="cosine", calibration=data, calibration_items=512)
    weight = made.stitching_layers()[0].weight.detach().double()
    states = [one for ids in data for one in hooked_rows(model, {"input_ids": ids, "attention_mask": ids * 0 + 1})]
    x, y = (torch.cat([one[place] for one in states]) for place in (2, 4))
    with_map, without = (1 - cosine_similarity(rows, y, dim=1).mean() for rows in (x @ weight.T, x))
    assert with_map < without and made.stitching_layers()[0].bias.abs().max() == 0
    error = ((x @ weight.T - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    assert made.config.joint_fits[0]["r2"] == pytest.approx(float(1 - error), abs=1e-5)


@pytest.mark.parametrize("width", [1, 2, 4, 12, 16, 20, 24, 28, 36, 48, 60, 64, 96, 192, 384, 576, 768, 896, 2304])
def test_hadamard_matrices_are_orthogonal_and_of_one_magnitude(width: int) -> None:
    found = hadamard(width)
    torch.testing.assert_close(found @ found.T, torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(found.abs(), torch.full_like(found, width**-0.5))
    if width & (width - 1) == 0:
        assert np.array_equal(found.mul(width**0.5).round().numpy(), scipy.linalg.hadamard(width))


def test_widths_without_a_matrix_are_refused() -> None:
    with pytest.raises(ValueError, match="got states 18 wide"):
        hadamard(18)
    with pytest.raises(ValueError, match="least_squares"):
        ChannelPatch(7)


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("1[:2] 1[3:]", {"joint": "eye"}, "got joint='eye'; expected one of"),
        ("0[:1] 1[3:]", {"joint": "identity"}, "from 16 to 48 features"),
        ("2[:1] 1[3:]", {"joint": "identity"}, "between two anchors"),
        ("0[:1] 1[3:]", {"joint": "linear_patch"}, "from 16 to 48 features"),
        ("1[:2] 1[3:]", {"joint": "cosine"}, "no calibration"),
        ("1[:2] 1[3:]", {"joint": "linear_patch"}, "no calibration"),
    ],
)
def test_joints_that_cannot_be_are_refused(path: str, options: dict[str, Any], message: str) -> None:
    anchors = [tiny_model(seed=1), tiny_model(large=True, seed=2), tiny_model(large=True, seed=3)]
    with pytest.raises(ValueError, match=message):
        StitchedModel.from_path(anchors, path, **options)


def test_joints_of_images_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="expected as many on both sides"):
        StitchedModel.from_path(list(tiny_pair("vit")), "0[:1] 1[2:]", joint="identity")


def test_bad_input_is_refused() -> None:
    model = deep_model()
    with pytest.raises(ValueError, match="got final=-1"):
        tail_paths(model, final=-1)
    with pytest.raises(ValueError, match="can leave out none"):
        tail_paths(model, final=DEPTH)
    with pytest.raises(ValueError, match="got objective='l2'"):
        replaceme_paths(model, padded(), objective="l2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got no data to measure on"):
        shortgpt_paths(model, [])
    with pytest.raises(ValueError, match="can leave out none"):
        gromov_paths(tiny_model(num_hidden_layers=1), padded())


def test_stitches_are_paths_too() -> None:
    chosen = esta_stitches(measure_stitch_costs(tiny_model(seed=1), tiny_model(large=True, seed=2)))
    paths = chosen.as_paths()
    assert list(paths) == [stitch.path for stitch in chosen] and paths.macs == chosen.macs
    assert paths.rule == chosen.rule and paths.joint == "least_squares" and paths[0] == chosen[0].path


@pytest.mark.parametrize(
    ("joint", "said"),
    [
        ("identity", ["no stitching layer, and", "It has no stitching layer."]),
        ("linear_patch", ["a linear stitching layer between", "started from LinearPatch's map"]),
        ("cosine", ["started from the map of largest cosine"]),
        ("least_squares", ["started from least squares"]),
    ],
)
def test_cards_say_how_blocks_are_joined(joint: str, said: list[str]) -> None:
    model = StitchedModel.from_path([deep_model()], "0[:2] 0[4:]", joint=joint, calibration=padded())
    card = model_card(model, "someone/pruned").text
    assert all(one in card for one in said)
