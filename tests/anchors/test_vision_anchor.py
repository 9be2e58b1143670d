"""Image classifiers as anchors: reading them without changing them, loading, and what identifies them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vision import (
    KINDS,
    LABELS,
    SIDE,
    blocks,
    images,
    outputs,
    tiny_classifier,
    tiny_config,
)
from transformers import BeitConfig, BertConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from klas_hf.anchors import weights
from klas_hf.anchors.anchor import check_anchors
from klas_hf.anchors.images import ImageBatch
from klas_hf.anchors.vision import VisionAnchor, check_labels, is_vision, load_vision_anchor
from klas_hf.anchors.weights import evaluating, fingerprint
from klas_hf.models.vision_shapes import trace

# ---- features


@pytest.mark.parametrize("kind", KINDS)
def test_only_as_many_blocks_run_as_are_asked_for(kind: str) -> None:
    model = tiny_classifier(kind)
    expected, _ = outputs(model, images(kind))
    ran: list[int] = []
    for number, block in enumerate(blocks(model)):
        block[-1].register_forward_hook(lambda *_, number=number: ran.append(number))
    for stop in (0, 1, 2):
        ran.clear()
        found = VisionAnchor(model).states(ImageBatch(images(kind)), stop)
        assert ran == list(range(stop))
        assert len(found) == stop + 1
        assert all(torch.equal(one.hidden, hidden) for one, hidden in zip(found, expected, strict=False))
        assert not any(one.hidden.requires_grad for one in found)


def test_pixels_take_the_models_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        anchor = VisionAnchor(tiny_classifier("swin").to(dtype))
        features = anchor.states(ImageBatch(images("swin")))
        assert features[-1].hidden.dtype == dtype
        assert anchor.logits(features[-1]).dtype == dtype


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("vit", {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}),
        ("swin", {"drop_path_rate": 0.9, "hidden_dropout_prob": 0.5}),
        ("convnext", {"drop_path_rate": 0.9}),
        ("mobilenet_v1", {"classifier_dropout_prob": 0.9}),
        ("resnet", {}),
        ("levit", {}),
    ],
)
def test_a_model_in_training_is_read_in_eval_mode_and_put_back(kind: str, changes: dict[str, Any]) -> None:
    model = tiny_classifier(kind, **changes)
    expected, logits = outputs(model, images(kind))
    state = copy.deepcopy(model.state_dict())
    model.train()
    blocks(model)[1][-1].eval()
    modes = [module.training for module in model.modules()]
    anchor = VisionAnchor(model)
    found = anchor.states(ImageBatch(images(kind)))
    assert all(torch.equal(one.hidden, hidden) for one, hidden in zip(found, expected, strict=True))
    assert torch.equal(anchor.answers(found[-1], ImageBatch(images(kind))), logits)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_levit_read_between_steps_of_training_shows_its_new_weights() -> None:
    """It keeps its attention biases while it evaluates, and forgets them only where `train` is called."""
    model = tiny_classifier("levit").train()
    anchor = VisionAnchor(model)
    anchor.states(ImageBatch(images("levit")))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("attention_biases"):
                parameter += 3 * torch.randn_like(parameter)
    found = anchor.states(ImageBatch(images("levit")))
    fresh = tiny_classifier("levit")
    fresh.load_state_dict(model.state_dict())
    expected, _ = outputs(fresh, images("levit"))
    assert all(torch.equal(one.hidden, hidden) for one, hidden in zip(found, expected, strict=True))


def test_modes_are_put_back_after_an_error() -> None:
    model = tiny_classifier("vit").train()
    blocks(model)[0][0].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match="expected"):
        VisionAnchor(model).states(ImageBatch(torch.zeros(1, 3, 8, 8)))
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == modes


def test_shared_modules_are_put_back_as_they_were() -> None:
    shared = torch.nn.Dropout()
    model = torch.nn.Sequential(torch.nn.Sequential(shared), torch.nn.Sequential(shared))
    model[1].eval()
    shared.train()
    with evaluating(model):
        assert not shared.training
    assert shared.training
    assert [part.training for part in model] == [True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_traced(kind: str) -> None:
    anchor = VisionAnchor(tiny_classifier(kind))
    size = (SIDE[kind], SIDE[kind])
    assert anchor.shapes(size) == trace(tiny_config(kind), size)
    assert len(anchor.shapes()) == anchor.num_blocks + 1 == len(anchor.blocks) + 1
    assert anchor.device == torch.device("cpu")


def test_an_unknown_kind_is_told_the_known_ones() -> None:
    class Unknown:
        config = BertConfig()

    with pytest.raises(ValueError, match="unknown type 'bert'; expected one of .*'convnext'.*'vit'"):
        VisionAnchor(Unknown())  # type: ignore[arg-type]


# ---- loading


@pytest.mark.parametrize("kind", KINDS)
def test_anchors_are_loaded_from_folders(kind: str, tmp_path: Path) -> None:
    model = tiny_classifier(kind)
    _, logits = outputs(model, images(kind))
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, str(tmp_path)):
        anchor = load_vision_anchor(folder)
        assert type(anchor.model).__name__ == KINDS[kind][0]
        assert not anchor.model.training
        assert anchor.path == anchor.name == str(tmp_path)
        assert anchor.revision is None
        found = anchor.logits(anchor.states(ImageBatch(images(kind)))[-1])
        torch.testing.assert_close(found, logits, rtol=1e-10, atol=1e-10)
    assert load_vision_anchor(tmp_path, dtype=torch.float32).model.dtype == torch.float32


def test_models_and_anchors_are_taken_as_they_are() -> None:
    model = tiny_classifier("vit").train()
    anchor = load_vision_anchor(model)
    assert anchor.model is model
    assert model.training
    assert load_vision_anchor(anchor) is anchor
    assert anchor.path is None
    assert anchor.name == "ViTForImageClassification"
    assert VisionAnchor(model, revision="abc").revision == "abc"


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"could not load the anchor './no/folder'(.|\n)*Pass the path of a local folder"):
        load_vision_anchor("./no/folder")
    BeitConfig().save_pretrained(tmp_path)  # without weights: the kind is checked first
    with pytest.raises(ValueError, match="unknown type 'beit'.*'vit'"):
        load_vision_anchor(tmp_path)


def test_what_is_an_image_classifier(tmp_path: Path) -> None:
    model = tiny_classifier("vit")
    model.config.save_pretrained(tmp_path / "vit")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))
    llama.config.save_pretrained(tmp_path / "llama")
    for anchor in (model, model.config, VisionAnchor(model), tmp_path / "vit", str(tmp_path / "vit")):
        assert is_vision(anchor)
    for anchor in (llama, llama.config, tmp_path / "llama", str(tmp_path / "llama")):
        assert not is_vision(anchor)
    assert is_vision(BeitConfig())  # which cannot be stitched, and is to be told so among images
    for kind in KINDS:
        assert is_vision(tiny_config(kind))


# ---- identity


def test_a_fingerprint_is_taken_once_until_the_weights_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = tiny_classifier("resnet"), []
    update = weights._update
    monkeypatch.setattr(
        weights, "_update", lambda digest, tensor: (read.append(tensor.numel()), update(digest, tensor))
    )
    size = sum(tensor.numel() for tensor in model.state_dict().values())
    known = fingerprint(model)
    assert sum(read) > size
    read.clear()
    assert fingerprint(model) == known and max(read) < 2 * weights.SAMPLED
    parameter = max(model.parameters(), key=torch.Tensor.numel)
    assert parameter.numel() > 4 * weights.SAMPLED
    changes = {
        "one value": lambda: parameter.view(-1)[3:4].add_(1.0),
        "a step": lambda: torch.optim.SGD([parameter], lr=0.1).step(),
        "unseen by torch": lambda: parameter.data.mul_(1.5),
        "other tensors": lambda: model.load_state_dict({n: t + 1 for n, t in model.state_dict().items()}, assign=True),
        "statistics": lambda: next(b for b in model.buffers() if b.is_floating_point()).add_(1.0),
    }
    for name, change in changes.items():
        parameter.grad = torch.ones_like(parameter)
        before = fingerprint(model)
        with torch.no_grad():
            change()
        found = fingerprint(model)
        assert found != before and found == fingerprint(copy.deepcopy(model)), name
    with torch.inference_mode():
        untracked = tiny_classifier("resnet", seed=5)
    before = fingerprint(untracked)
    with torch.inference_mode():
        next(untracked.parameters()).view(-1)[1:2].add_(1.0)
    assert fingerprint(untracked) != before


def test_fingerprints_tell_weights_apart_and_nothing_else(tmp_path: Path) -> None:
    model = tiny_classifier("resnet")
    known = VisionAnchor(model).fingerprint
    assert VisionAnchor(copy.deepcopy(model).train()).fingerprint == known
    rounded = tiny_classifier("resnet").to(torch.bfloat16)
    single = tiny_classifier("resnet").float()
    assert fingerprint(single) == fingerprint(copy.deepcopy(single).to(torch.bfloat16))
    assert fingerprint(rounded) == fingerprint(rounded.float()) == fingerprint(rounded.double())
    model.save_pretrained(tmp_path)
    assert load_vision_anchor(tmp_path).fingerprint == known
    for name in ("resnet.embedder.embedder.convolution.weight", "resnet.embedder.embedder.normalization.running_var"):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.state_dict()[name].flatten()[-1] += 1
        assert VisionAnchor(other).fingerprint != known
    assert VisionAnchor(tiny_classifier("resnet", seed=3)).fingerprint != known


def renamed(names: dict[int, str]) -> PreTrainedModel:
    return tiny_classifier("vit", seed=5, id2label=names)


def test_labels_must_be_the_same_in_the_same_order() -> None:
    one, same = tiny_classifier("vit").config, tiny_classifier("swin").config
    unnamed = tiny_classifier("vit", num_labels=5).config
    check_labels(one, same)
    check_labels(one, unnamed, same)
    swapped = renamed(LABELS | {1: "cat", 2: "bee"}).config
    for anchors in ((one, swapped), (one, unnamed, swapped)):
        with pytest.raises(ValueError, match="name 2 classes differently, class 1 as 'bee' and as 'cat'"):
            check_labels(*anchors)
    with pytest.raises(ValueError, match="anchors of 5 and 4 classes"):
        check_labels(one, tiny_classifier("vit", num_labels=4).config)


def test_anchors_with_some_unnamed_classes_are_compared_by_the_others() -> None:
    one = tiny_classifier("vit").config
    check_labels(one, renamed(LABELS | {3: "LABEL_3"}).config)
    with pytest.raises(ValueError, match="name 1 classes differently, class 3 as 'dog' and as 'LABEL_2'"):
        check_labels(one, renamed(LABELS | {3: "LABEL_2"}).config)


def test_anchors_must_be_two_different_ones() -> None:
    one, other = (VisionAnchor(tiny_classifier("vit", seed=seed)) for seed in (1, 2))
    check_anchors([one, other])
    with pytest.raises(ValueError, match="got 1 anchors; expected at least 2"):
        check_anchors([one])
    with pytest.raises(ValueError, match="got 0 anchor"):
        check_anchors([])
    with pytest.raises(ValueError, match="twice.*List each one once"):
        check_anchors([one, other, VisionAnchor(copy.deepcopy(one.model).float().double())])
    with pytest.raises(ValueError, match="5 and 4 classes"):
        check_anchors([one, VisionAnchor(tiny_classifier("vit", num_labels=4))])
