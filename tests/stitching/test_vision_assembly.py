"""Stitching two classifiers: what is read, and for which images."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_vision import (
    KINDS,
    blocks,
    images,
    logits,
    possible,
    randomise_stitch,
    reference_logits,
    sized,
    tiny_classifier,
    tiny_pair,
    used_tensors,
    values,
)
from torch import Tensor

from klas_hf import Stitch, StitchedForImageClassification, StitchedModel
from klas_hf.anchors import checkpoints
from klas_hf.anchors.checkpoints import AnchorCheckpoint

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer is random")


# ---- from folders


@pytest.mark.parametrize("kind", KINDS)
def test_anchors_from_folders_are_stitched_as_those_in_memory(kind: str, tmp_path: Path) -> None:
    """The tensors of some families have other names in files than in memory; they are renamed on loading."""
    source, target = tiny_pair(kind)
    source.save_pretrained(tmp_path / "source")
    target.save_pretrained(tmp_path / "target", max_shard_size="20KB")
    every = possible(source, target, images(kind))
    for stitch in (every[len(every) // 2], every[-1]):
        model = StitchedModel.from_anchors(str(tmp_path / "source"), tmp_path / "target", stitch, **sized(kind))
        assert type(model) is StitchedForImageClassification
        assert not model.training
        assert model.dtype == torch.float64
        weight, bias = randomise_stitch(model.stitching_layers()[0])
        expected = reference_logits(source, target, stitch, weight, bias, images(kind))
        torch.testing.assert_close(logits(model, images(kind)), expected, rtol=1e-9, atol=1e-9)
        model.save_pretrained(tmp_path / "stitched")
        loaded = StitchedModel.from_pretrained(tmp_path / "stitched")
        state = loaded.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
        torch.testing.assert_close(logits(loaded, images(kind)), expected, rtol=1e-9, atol=1e-9)


def test_the_dtype_is_the_targets_or_the_one_asked_for(tmp_path: Path) -> None:
    source, target = tiny_pair("swin")
    source.save_pretrained(tmp_path / "source")
    target.to(torch.bfloat16).save_pretrained(tmp_path / "target")
    for options, expected in (
        ({}, torch.bfloat16),
        ({"dtype": "auto"}, torch.bfloat16),
        ({"dtype": torch.float32}, torch.float32),
    ):
        for anchors in ((tmp_path / "source", tmp_path / "target"), (source, target)):
            model = StitchedModel.from_anchors(*anchors, (1, 1), calibration=[images("swin", 8)], **options)
            assert {tensor.dtype for tensor in model.parameters()} == {expected}
            assert logits(model, images("swin", dtype=expected)).isfinite().all()
    assert source.dtype == torch.float64


def test_config_records_where_the_anchors_came_from(tmp_path: Path) -> None:
    source, target = tiny_pair("swin")
    source.save_pretrained(tmp_path / "source")
    target.save_pretrained(tmp_path / "target")
    config = StitchedModel.from_anchors(tmp_path / "source", tmp_path / "target", Stitch(2, 3)).config
    assert config.anchor_names == [str(tmp_path / "source"), str(tmp_path / "target")]
    assert config.path == "0[:2] 1[3:]"
    assert config.slices == [[0, 0, 2], [1, 3, 4]]
    assert config.anchor_blocks == [3, 4]
    assert config.joint_channels == [[16, 24]]
    assert config.image_size == [32, 32]
    assert config.name_or_path == ""
    assert StitchedModel.from_anchors(source, target, (2, 3)).config.anchor_names == [None, None]


def test_the_anchors_and_their_configurations_are_left_as_they_were() -> None:
    for kind in ("levit", "swin", "mobilenet_v1"):
        pair = tiny_pair(kind, **({"drop_path_rate": 0.5} if kind == "swin" else {}))
        states = [copy.deepcopy(anchor.state_dict()) for anchor in pair]
        configs = [anchor.config.to_dict() for anchor in pair]
        model = StitchedModel.from_anchors(*pair, (1, 1), calibration=[images(kind, 16)], **sized(kind))
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.zero_()
        for anchor, state, config in zip(pair, states, configs, strict=True):
            assert anchor.config.to_dict() == config
            assert all(torch.equal(state[name], tensor) for name, tensor in anchor.state_dict().items())


# ---- only what is used is read


@pytest.mark.parametrize(
    ("kind", "in_memory"), [*((kind, False) for kind in KINDS), ("vit", True), ("levit", True), ("convnext", True)]
)
def test_only_tensors_that_are_used_are_read_each_once(
    kind: str, in_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[int, list[Tensor]] = {}
    tensor = AnchorCheckpoint.tensor

    def counted(self: AnchorCheckpoint, key: str, **options: Any) -> Any:
        found = tensor(self, key, **options)
        read.setdefault(id(self), []).append(found[...])
        return found

    source, target = tiny_pair(kind)
    stitch = [pair for pair in possible(source, target, images(kind)) if pair[0] < len(blocks(source)) and pair[1]][-1]
    anchors: list[Any] = [source, target]
    if not in_memory:
        anchors = [tmp_path / "source", tmp_path / "target"]
        source.save_pretrained(anchors[0])
        target.save_pretrained(anchors[1])
    monkeypatch.setattr(AnchorCheckpoint, "tensor", counted)
    StitchedModel.from_anchors(*anchors, stitch, **sized(kind))
    used = (
        used_tensors(source, 0, stitch[0], embed=True, head=False),
        used_tensors(target, stitch[1], len(blocks(target)), embed=False, head=True),
    )
    # Names in files differ from those in memory, so tensors are known by their values.
    for found, anchor, names in zip(read.values(), (source, target), used, strict=True):
        expected = [anchor.state_dict()[name] for name in names]
        assert sorted(map(values, found)) == sorted(map(values, expected))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no advice")
def test_the_system_is_told_which_bytes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly those of the tensors that are used, of the anchor that is not in memory."""
    told: list[bytes] = []
    source, target = tiny_pair("swin")
    target.save_pretrained(tmp_path)
    monkeypatch.setattr(checkpoints, "ADVISED", 64)
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, length, _: told.append(os.pread(file, length, start)))
    StitchedModel.from_anchors(source, tmp_path, (3, 4))
    names = used_tensors(target, 4, len(blocks(target)), embed=False, head=True)
    held = [target.state_dict()[name].numpy().tobytes() for name in names]
    assert sorted(told) == sorted(part[n : n + 64] for part in held for n in range(0, len(part), 64))
    assert max(map(len, held)) > 64


@pytest.mark.parametrize("kind", ["vit", "levit", "resnet"])
def test_shards_that_hold_only_unused_tensors_are_not_needed(kind: str, tmp_path: Path) -> None:
    """On the Hub they are not even downloaded."""
    stitch = {"vit": (1, 2), "levit": (2, 3), "resnet": (2, 2)}[kind]
    source, target = tiny_pair(kind)
    used = (
        used_tensors(source, 0, stitch[0], embed=True, head=False),
        used_tensors(target, stitch[1], len(blocks(target)), embed=False, head=True),
    )
    missing = 0
    for side, anchor, names in zip(("source", "target"), (source, target), used, strict=True):
        anchor.save_pretrained(tmp_path / side, max_shard_size=100)
        needed = {values(anchor.state_dict()[name]) for name in names}
        for path in (tmp_path / side).glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                held = {values(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
            if not held & needed:
                path.unlink()
                missing += 1
    assert missing > 15
    model = StitchedModel.from_anchors(tmp_path / "source", tmp_path / "target", stitch, **sized(kind))
    weight, bias = randomise_stitch(model.stitching_layers()[0])
    expected = reference_logits(source, target, stitch, weight, bias, images(kind))
    torch.testing.assert_close(logits(model, images(kind)), expected, rtol=1e-9, atol=1e-9)


# ---- image sizes


def test_anchors_of_any_size_are_stitched_for_the_size_asked_for() -> None:
    source, target = tiny_classifier("resnet", seed=1), tiny_classifier("convnext", large=True, hidden_sizes=[24, 48])
    for size, expected in ((64, [64, 64]), ((32, 64), [32, 64]), ([64, 32], [64, 32]), (None, [32, 32])):
        model = StitchedModel.from_anchors(source, target, (2, 2), image_size=size)
        assert model.config.image_size == expected
        pixels = torch.randn(2, 3, *expected, dtype=torch.float64)
        weight, bias = randomise_stitch(model.stitching_layers()[0])
        reference = reference_logits(source, target, (2, 2), weight, bias, pixels)
        torch.testing.assert_close(logits(model, pixels), reference, rtol=1e-9, atol=1e-9)


def test_the_grids_that_must_be_equal_are_those_of_the_size_asked_for() -> None:
    """Swin's grids are rounded up where DINOv2's are rounded down."""
    dinov2, swin = tiny_classifier("dinov2"), tiny_classifier("swin", large=True, embed_dim=48)
    StitchedModel.from_anchors(dinov2, swin, (1, 3), image_size=32)
    with pytest.raises(ValueError, match="from a grid of 4×4 to one of 5×5"):
        StitchedModel.from_anchors(dinov2, swin, (1, 3), image_size=36)


def test_the_size_is_that_of_the_anchor_that_takes_only_one() -> None:
    source, target = tiny_classifier("vit", seed=1), tiny_classifier("swin", large=True, image_size=64, patch_size=4)
    assert StitchedModel.from_anchors(source, target, (1, 3)).config.image_size == [32, 32]
    resnet = tiny_classifier("resnet", embedding_size=4, hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1])
    assert StitchedModel.from_anchors(resnet, tiny_classifier("levit", large=True), (3, 2)).config.image_size == [
        64,
        64,
    ]
