"""What bad input is told where two classifiers are to be stitched, before any long work."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vision import (
    KINDS,
    LABELS,
    sized,
    tiny_classifier,
    tiny_config,
    tiny_pair,
)
from torch import nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from klas_hf import StitchedForImageClassification, StitchedModel

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer is random")


def tiny_llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))


@pytest.mark.usefixtures("no_vision_loading")
@pytest.mark.parametrize(
    ("stitch", "error", "message"),
    [
        (
            (4, 0),
            ValueError,
            r"path 0\[:4\] 1\[:\], out of range: 0\[:4\] of an anchor of 3 blocks; expected",
        ),
        ((3, 5), ValueError, r"out of range: 1\[5:\] of an anchor of 4 blocks"),
        ((0, 1), ValueError, "source_stop >= 1"),
        ((1, -1), ValueError, "target_start >= 0"),
        ((1, 2, 3), TypeError, r"expected Stitch\(i, j\) or a pair"),
        (
            (1, 3),
            ValueError,
            r"joint 0\[:1\] → 1\[3:\] is from a grid of 8×8 to one of 4×4; .* expected a start in \[0, 1, 2\]",
        ),
        ((2, 1), ValueError, r"4×4 to one of 8×8; .*expected a start in \[3, 4\]. .*1: 8×8 → 2: 4×4 → 3: 4×4"),
    ],
)
def test_stitches_that_are_not_possible(stitch: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        StitchedModel.from_anchors(*tiny_pair("swin"), stitch)


@pytest.mark.usefixtures("no_vision_loading")
def test_anchors_without_a_common_grid() -> None:
    source = tiny_classifier("dinov2", patch_size=16)
    with pytest.raises(ValueError, match="from a grid of 2×2.*its anchor has no block on that grid"):
        StitchedModel.from_anchors(source, tiny_classifier("swin", large=True), (1, 1))


@pytest.mark.usefixtures("no_vision_loading")
@pytest.mark.parametrize("kind", KINDS)
def test_reversed_anchors(kind: str) -> None:
    source, target = tiny_pair(kind)
    with pytest.raises(ValueError, match="MACs and a target of .*: reversed; .*Swap source and target"):
        StitchedModel.from_anchors(target, source, (1, 1), **sized(kind))


@pytest.mark.usefixtures("no_vision_loading")
@pytest.mark.parametrize(
    ("source", "target"), [("vit", "deit"), ("swin", "vit"), ("resnet", "dinov2"), ("deit", "vit")]
)
def test_class_tokens_that_the_source_lacks(source: str, target: str) -> None:
    pair = tiny_classifier(source), tiny_classifier(target, large=True, hidden_size=48)
    with pytest.raises(ValueError, match=r"source with [0-2] class tokens and a target with [1-2]"):
        StitchedModel.from_anchors(*pair, (1, 1))


@pytest.mark.usefixtures("no_vision_loading")
def test_anchors_of_different_classes() -> None:
    source, target = tiny_pair("vit")
    more = tiny_classifier("vit", large=True, num_labels=6)
    with pytest.raises(ValueError, match="5 and 6 classes; expected the same classes.*Fine-tune both"):
        StitchedModel.from_anchors(source, more, (1, 1))
    names = list(LABELS.values())
    names[1], names[3] = names[3], names[1]
    renamed = tiny_classifier("vit", large=True, id2label=dict(enumerate(names)))
    with pytest.raises(ValueError, match="name 2 classes differently, class 1 as 'bee' and as 'dog'.*same id2label"):
        StitchedModel.from_anchors(source, renamed, (1, 1))


def test_classes_without_names_are_taken_to_be_the_same() -> None:
    unnamed = tiny_classifier("vit", large=True, num_labels=5)
    assert unnamed.config.id2label[1] == "LABEL_1"
    model = StitchedModel.from_anchors(tiny_classifier("vit"), unnamed, (1, 1))
    assert model.config.id2label == unnamed.config.id2label


@pytest.mark.usefixtures("no_vision_loading")
def test_an_image_classifier_and_a_language_model() -> None:
    with pytest.raises(ValueError, match="image classifier and language model; expected all of one kind"):
        StitchedModel.from_anchors(tiny_classifier("vit"), tiny_llama(), (1, 1))
    with pytest.raises(ValueError, match="language model and image classifier; expected all of one kind"):
        StitchedModel.from_anchors(tiny_llama(), tiny_classifier("vit"), (1, 1))


@pytest.mark.usefixtures("no_vision_loading")
@pytest.mark.parametrize("side", ["source", "target"])
def test_unknown_kinds_are_told_the_known_ones(side: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = BeitConfig(image_size=32, patch_size=8, num_labels=5, **sizes)
    config.save_pretrained(tmp_path)  # without weights: the kind is checked first
    for anchor in (tmp_path, BeitForImageClassification(config)):
        anchors = {"source": tiny_classifier("vit"), "target": tiny_classifier("vit", large=True)} | {side: anchor}
        with pytest.raises(ValueError, match="unknown type 'beit'; expected one of .*'resnet'.*'vit'"):
            StitchedModel.from_anchors(anchors["source"], anchors["target"], (1, 1))


@pytest.mark.usefixtures("no_vision_loading")
def test_a_stitched_model_is_no_anchor() -> None:
    config = StitchedForImageClassification.config_class(anchor_configs=[tiny_config("vit")])
    with pytest.raises(ValueError, match="unknown type 'stitched_vision'; expected one of .*'vit'"):
        StitchedModel.from_anchors(StitchedForImageClassification(config), tiny_classifier("vit", large=True), (1, 1))


@pytest.mark.usefixtures("no_vision_loading")
def test_anchors_for_different_image_sizes() -> None:
    source, target = tiny_classifier("vit", image_size=16, patch_size=4), tiny_classifier("vit", large=True)
    with pytest.raises(ValueError, match=r"\(32, 32\) pixels for a vit that takes \(16, 16\) only.*same resolution"):
        StitchedModel.from_anchors(source, target, (1, 1))
    with pytest.raises(ValueError, match=r"\(48, 48\) pixels for a vit that takes \(32, 32\) only"):
        StitchedModel.from_anchors(*tiny_pair("vit"), (1, 1), image_size=48)


@pytest.mark.usefixtures("no_vision_loading")
@pytest.mark.parametrize("side", ["source", "target"])
def test_an_anchor_that_cannot_be_reached_is_named(side: str) -> None:
    anchors = {"source": tiny_classifier("vit"), "target": tiny_classifier("vit", large=True)} | {side: "./no/folder"}
    with pytest.raises(OSError, match=r"could not load the anchor './no/folder'(.|\n)*Pass the path of a local folder"):
        StitchedModel.from_anchors(anchors["source"], anchors["target"], (1, 1))


@pytest.mark.usefixtures("no_vision_loading")
def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    source, target = tiny_pair("vit")
    target.config.save_pretrained(tmp_path)
    torch.save(target.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="only safetensors weights are read, never pickled ones"):
        StitchedModel.from_anchors(source, tmp_path, (1, 1))


@pytest.mark.parametrize("shard_size", ["1GB", "2KB"])
def test_a_truncated_file_is_named(shard_size: str, tmp_path: Path) -> None:
    source, target = tiny_pair("vit")
    target.save_pretrained(tmp_path, max_shard_size=shard_size)
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match=r"model.*\.safetensors is damaged.*Download or save it again"):
        StitchedModel.from_anchors(source, tmp_path, (1, 1))


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_checkpoint_that_lacks_tensors_names_them(side: str, tmp_path: Path) -> None:
    anchors: dict[str, Any] = dict(zip(("source", "target"), tiny_pair("swin"), strict=True))
    lacking = {
        "source": "swin.embeddings.patch_embeddings.projection.weight",
        "target": "swin.encoder.layers.1.blocks.1.layernorm_after.bias",
    }[side]
    state = {name: tensor for name, tensor in anchors[side].state_dict().items() if name != lacking}
    assert len(state) == len(anchors[side].state_dict()) - 1
    anchors[side].save_pretrained(tmp_path, state_dict=state)
    anchors[side] = tmp_path
    number = list(anchors).index(side)
    with pytest.raises(ValueError, match=rf"missing_keys.*slices.{number}\.{lacking}.*expected complete checkpoints"):
        StitchedModel.from_anchors(anchors["source"], anchors["target"], (1, 1))


def test_a_body_without_its_head_is_no_target(tmp_path: Path) -> None:
    source, target = tiny_pair("vit")
    target.vit.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["ViTForImageClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="missing_keys.*slices.1.classifier.weight.*expected complete checkpoints"):
        StitchedModel.from_anchors(source, tmp_path, (1, 1))


def test_the_stitching_layer_is_the_projection() -> None:
    for kind, expected in (("vit", nn.Linear), ("resnet", nn.Conv2d)):
        model = StitchedModel.from_anchors(*tiny_pair(kind), (1, 1), **sized(kind))
        assert type(model.stitching_layers()[0]) is expected
        assert model.stitching_layers()[0] is model.joints[0].projection
