"""Deltas: small files from which the same model is assembled, to the bit, over the same anchors only."""

import copy
import json
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tiny_vision
import torch
from hub_client import HubClient
from hub_server import HubServer
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from quick_cases import quick
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from klas_hf import StitchedForCausalLM, StitchedForImageClassification, StitchedModel
from klas_hf.hub.delta import merge_delta, save_delta
from klas_hf.models import StitchedBackbone

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer is random")
TEXT = {"llama": ("llama", "llama"), "mixtral": ("mixtral", "gemma3_text"), "phi": ("gpt_neox", "phi")}
KINDS = [*TEXT, "vit", "swin", "levit", "resnet"]
LORA_TARGETS = {"llama": ["q_proj", "down_proj"], "vit": ["q_proj", "fc1"], "resnet": ["convolution"]}


def anchors(kind: str, root: Path) -> tuple[Path, Path, tuple[int, int]]:
    """Two anchors in folders, and a stitch."""
    if kind in TEXT:
        small, large = TEXT[kind]
        tiny_models.save_with_tokenizer(tiny_models.tiny_model(small, seed=1), root / "small")
        tiny_models.save_with_tokenizer(tiny_models.tiny_model(large, large=True, seed=2), root / "large")
        return root / "small", root / "large", (2, 3)
    source, target, stitch = tiny_vision.middle(kind)
    source.save_pretrained(root / "small")
    target.save_pretrained(root / "large")
    return root / "small", root / "large", stitch


def stitched(kind: str, root: Path, **options: Any) -> StitchedModel:
    model = StitchedModel.from_anchors(*anchors(kind, root), **options)
    with torch.no_grad():
        for tensor in model.stitching_layers()[0].parameters():
            tensor += 0.1 * torch.randn_like(tensor)
    return model


def loaders(kind: str) -> list[Any]:
    if kind in TEXT:
        return [StitchedModel, StitchedForCausalLM, AutoModelForCausalLM]
    return [StitchedModel, StitchedForImageClassification, AutoModelForImageClassification]


@torch.no_grad()
def outputs(kind: str, model: PreTrainedModel) -> torch.Tensor:
    """Of a copy, whose tensors are aligned in memory as a copy's are."""
    model = copy.deepcopy(model)
    if kind in TEXT:
        return model(tiny_models.token_ids(2, 9)).logits
    return model(tiny_vision.images(kind, dtype=model.dtype)).logits


def assert_same(kind: str, model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Same class, bits and outputs."""
    assert type(model) is type(other)
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        raw = [one.contiguous().reshape(-1).view(torch.uint8) for one in (tensor, theirs[name])]
        assert torch.equal(*raw), name
    assert torch.equal(outputs(kind, model), outputs(kind, other))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "delta.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_a_delta_of_a_trained_stitch_holds_the_stitch_alone(kind: str, tmp_path: Path) -> None:
    model = stitched(kind, tmp_path)
    save_delta(model, tmp_path / "delta")
    held = tensors_of(tmp_path / "delta")
    stitch = {name: tensor for name, tensor in model.state_dict().items() if "joints." in name}
    assert held.keys() == stitch.keys()
    header = 1500  # bytes
    assert (
        size(stitch.values())
        < (tmp_path / "delta" / "delta.safetensors").stat().st_size
        < size(stitch.values()) + header
    )
    for loader in loaders(kind):
        loaded = loader.from_pretrained(tmp_path / "delta")
        assert_same(kind, loaded, model)
        assert not loaded.training
        assert loaded.config.delta is None
        assert loaded.name_or_path == str(tmp_path / "delta")


@pytest.mark.parametrize("path", ["0[:2] 2[1:3] 2[4:]", "2[:4] 2[2:]", "2[:1] 0[1:2] 2[5:]", "2[:]"])
def test_a_delta_of_any_path(path: str, tmp_path: Path) -> None:
    """The first of three anchors that it may not use is neither named nor read."""
    small, large, _ = anchors("mixtral", tmp_path)
    model = StitchedModel.from_path([small, tmp_path / "none", large], path)
    with torch.no_grad():
        for tensor in (*model.model.joints.parameters(), model.lm_head.weight):
            tensor += 0.1
    save_delta(model, tmp_path / "delta")
    joints = {name for name in model.state_dict() if "joints." in name}
    head = "model.slices.0.embed_tokens.weight" if model.config.tie_word_embeddings else "lm_head.weight"
    assert tensors_of(tmp_path / "delta").keys() == joints | {head}
    loaded = StitchedModel.from_pretrained(tmp_path / "delta")
    assert_same("mixtral", loaded, model)
    assert loaded.config.path == path
    written = json.loads((tmp_path / "delta" / "config.json").read_text())
    assert len(written["delta"]["fingerprints"]) == len(model.config.slices)


def tied(root: Path) -> StitchedModel:
    """A path that begins and ends with one anchor, whose head is its embedding."""
    tiny_models.tiny_model(large=True, seed=2, tie_word_embeddings=True).save_pretrained(root / "large")
    return StitchedModel.from_path([root / "large"], "0[:2] 0[4:]")


def test_a_delta_of_one_tensor_that_is_embedding_and_head(tmp_path: Path) -> None:
    model = tied(tmp_path)
    for number, changed in enumerate([set(), {"model.slices.0.embed_tokens.weight"}]):
        with torch.no_grad():
            model.lm_head.weight += len(changed)
        save_delta(model, tmp_path / f"delta{number}")
        assert {name for name in tensors_of(tmp_path / f"delta{number}") if "joints" not in name} == changed
        loaded = StitchedModel.from_pretrained(tmp_path / f"delta{number}")
        assert_same("llama", loaded, model)
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize("change", [0.0, 0.5])
def test_a_delta_of_the_format_before_has_a_head_of_its_own(change: float, tmp_path: Path) -> None:
    """It was made when the anchor's one tensor was two in every path."""
    model = tied(tmp_path)
    model.config.tie_word_embeddings, model.all_tied_weights_keys = False, {}
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + change)
    save_delta(model, tmp_path / "delta")
    assert ("lm_head.weight" in tensors_of(tmp_path / "delta")) == bool(change)
    loaded = StitchedModel.from_pretrained(tmp_path / "delta")
    assert_same("llama", loaded, model)
    assert loaded.lm_head.weight.data_ptr() != loaded.get_input_embeddings().weight.data_ptr()
    loaded.save_pretrained(tmp_path / "whole")
    assert_same("llama", StitchedModel.from_pretrained(tmp_path / "whole"), model)


@pytest.mark.filterwarnings("ignore:Model .* tie_word_embeddings")
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_an_adapter_may_part_the_head_from_the_embedding(targets: list[str], tmp_path: Path) -> None:
    adapted = get_peft_model(tied(tmp_path), LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    save_delta(adapted, tmp_path / "delta")
    loaded = StitchedModel.from_pretrained(tmp_path / "delta")
    ids = tiny_models.token_ids(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, adapted.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    assert loaded.config.tie_word_embeddings == ("lm_head" not in targets)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "resnet"])
def test_a_delta_holds_whatever_has_changed_and_nothing_else(kind: str, tmp_path: Path) -> None:
    model = stitched(kind, tmp_path)
    state = model.state_dict()
    chosen = [name for name in state if "joints" not in name][3::5]
    for name in chosen:
        state[name].reshape(-1)[0] += 1
    save_delta(model, tmp_path / "delta")
    stitch = {name for name in state if "joints" in name}
    assert tensors_of(tmp_path / "delta").keys() == {*chosen, *stitch}
    assert_same(kind, StitchedModel.from_pretrained(tmp_path / "delta"), model)


def test_what_differs_is_a_matter_of_bits(tmp_path: Path) -> None:
    """Minus zero is not zero, and NaN is NaN."""
    source, target, stitch = anchors("llama", tmp_path)
    tensors = load_file(target / "model.safetensors")
    tensors["model.norm.weight"][0], tensors["model.embed_tokens.weight"][0, 0] = 0.0, float("nan")
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    model = StitchedModel.from_anchors(source, target, stitch)
    for number, changed in enumerate([set(), {"model.slices.1.norm.weight"}]):
        with torch.no_grad():
            model.model.slices[1].norm.weight[0] *= -1 if changed else 1
        save_delta(model, tmp_path / f"delta{number}")
        held = tensors_of(tmp_path / f"delta{number}")
        assert {name for name in held if "joints" not in name} == changed
        loaded = StitchedModel.from_pretrained(tmp_path / f"delta{number}")
        assert loaded.model.slices[1].norm.weight[0].signbit().item() == bool(changed)
        assert loaded.lm_head.weight[0, 0].isnan()


@pytest.mark.parametrize(
    ("dtype", "in_float32"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)]
)
@pytest.mark.parametrize("with_stitch", [True, False])
@pytest.mark.parametrize("kind", quick(LORA_TARGETS, ["llama"]))
def test_a_delta_of_lora_is_the_merged_model(
    kind: str, dtype: torch.dtype, with_stitch: bool, in_float32: bool, tmp_path: Path
) -> None:
    """Whether PEFT trains the adapter in float32, and whether the stitching layer is the adapter's or not."""
    model = stitched(kind, tmp_path, dtype=dtype)
    config = LoraConfig(
        r=2, target_modules=LORA_TARGETS[kind], init_lora_weights=False, modules_to_save=["joints.0"] * with_stitch
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=in_float32)
    trained = {name: one for name, one in adapted.named_parameters() if one.requires_grad}
    with torch.no_grad():
        for tensor in trained.values():
            tensor += 0.1 * torch.randn_like(tensor)
    save_delta(adapted, tmp_path / "delta")
    held = tensors_of(tmp_path / "delta")
    adapter = load_file(tmp_path / "delta" / "adapter" / "adapter_model.safetensors")
    assert size(adapter.values()) == size(trained.values())
    assert all("joints" in name for name in held)
    assert bool(held) != with_stitch
    merged = adapted.merge_and_unload()
    assert_same(kind, loaders(kind)[-1].from_pretrained(tmp_path / "delta"), merged)
    merge_delta(tmp_path / "delta", tmp_path / "whole")
    shutil.rmtree(tmp_path / "large")
    assert_same(kind, StitchedModel.from_pretrained(tmp_path / "whole"), merged)


@pytest.mark.parametrize("name", ["default", "mine"])
def test_other_adapters_and_names(name: str, tmp_path: Path) -> None:
    model = stitched("llama", tmp_path)
    config = IA3Config(
        target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    )
    adapted = get_peft_model(model, config, adapter_name=name)
    save_delta(adapted, tmp_path / "delta")
    assert_same("llama", StitchedModel.from_pretrained(tmp_path / "delta"), adapted.merge_and_unload())


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_loading_options_are_those_of_any_model(kind: str, tmp_path: Path) -> None:
    model = stitched(kind, tmp_path, dtype=torch.bfloat16)
    save_delta(model, tmp_path / "delta")
    wider = copy.deepcopy(model).float()
    for loader in loaders(kind):
        assert_same(kind, loader.from_pretrained(tmp_path / "delta", dtype=torch.float32), wider)
        assert_same(kind, loader.from_pretrained(tmp_path / "delta", dtype="float32", device_map={"": "cpu"}), wider)
        loaded, info = loader.from_pretrained(
            tmp_path / "delta", output_loading_info=True, output_hidden_states=True, attn_implementation="eager"
        )
        assert torch.equal(loaded.stitching_layers()[0].weight, model.stitching_layers()[0].weight)
        assert not info["missing_keys"]
        assert loaded.config.output_hidden_states
        assert loaded.config._attn_implementation == "eager"
    changed = copy.deepcopy(model.config)
    changed.output_hidden_states = True
    assert StitchedModel.from_pretrained(tmp_path / "delta", config=changed).config.output_hidden_states


def test_parts_and_other_heads_load(tmp_path: Path) -> None:
    for kind in ("llama", "vit"):
        save_delta(stitched(kind, tmp_path / kind), tmp_path / kind / "delta")
    model = StitchedModel.from_pretrained(tmp_path / "llama" / "delta")
    body = AutoModel.from_pretrained(tmp_path / "llama" / "delta")
    assert {f"model.{name}" for name in body.state_dict()} | {"lm_head.weight"} == set(model.state_dict())
    assert all(torch.equal(tensor, model.state_dict()[f"model.{name}"]) for name, tensor in body.state_dict().items())
    model = StitchedModel.from_pretrained(tmp_path / "vit" / "delta")
    backbone = StitchedBackbone.from_pretrained(tmp_path / "vit" / "delta")
    shared = backbone.state_dict().keys() & model.state_dict().keys()
    assert len(shared) > 20
    assert all(torch.equal(backbone.state_dict()[name], model.state_dict()[name]) for name in shared)
    for loader in loaders("vit"):
        wider = loader.from_pretrained(tmp_path / "vit" / "delta", num_labels=7, ignore_mismatched_sizes=True)
        assert outputs("vit", wider).shape == (2, 7)


def test_a_new_vocabulary_and_the_generation_config_are_kept(tmp_path: Path) -> None:
    model = stitched("llama", tmp_path)
    model.resize_token_embeddings(80)
    model.generation_config.update(do_sample=True, temperature=0.6)
    save_delta(model, tmp_path / "delta")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "delta")
    assert_same("llama", loaded, model)
    assert loaded.config.vocab_size == 80
    assert loaded.generation_config.temperature == 0.6
    merge_delta(tmp_path / "delta", tmp_path / "whole")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "whole").generation_config.temperature == 0.6


def test_other_labels_are_kept(tmp_path: Path) -> None:
    stitched("resnet", tmp_path).save_pretrained(tmp_path / "first")
    model = StitchedModel.from_pretrained(tmp_path / "first", num_labels=7, ignore_mismatched_sizes=True)
    save_delta(model, tmp_path / "delta")
    assert_same("resnet", StitchedModel.from_pretrained(tmp_path / "delta"), model)
    head = {"slices.1.classifier.1.weight", "slices.1.classifier.1.bias"}
    assert {name for name in tensors_of(tmp_path / "delta") if "joints" not in name} == head


def test_the_image_size_is_kept(tmp_path: Path) -> None:
    """At the size that the target's configuration is for, the two grids would not be equal."""
    source = tiny_vision.tiny_classifier("resnet", seed=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1])
    target = tiny_vision.tiny_classifier("convnext", large=True, seed=2, image_size=34)
    stitch = next(one for one in tiny_vision.possible(source, target, tiny_vision.images("resnet")) if one[1] > 0)
    source.save_pretrained(tmp_path / "small")
    target.save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match="equal grids"):
        StitchedModel.from_anchors(tmp_path / "small", tmp_path / "large", stitch)
    model = StitchedModel.from_anchors(tmp_path / "small", tmp_path / "large", stitch, image_size=32)
    save_delta(model, tmp_path / "delta")
    loaded = StitchedModel.from_pretrained(tmp_path / "delta")
    assert_same("resnet", loaded, model)
    assert loaded.config.image_size == [32, 32]


def test_a_merged_delta_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    model = stitched("llama", tmp_path)
    AutoTokenizer.from_pretrained(tmp_path / "large").save_pretrained(tmp_path / "delta")
    (tmp_path / "delta" / "README.md").write_text("the delta's")
    save_delta(model, tmp_path / "delta")
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "README.md").write_text("mine")
    merge_delta(tmp_path / "delta", tmp_path / "whole")
    shutil.rmtree(tmp_path / "large")
    shutil.rmtree(tmp_path / "delta")
    for loader in loaders("llama"):
        assert_same("llama", loader.from_pretrained(tmp_path / "whole"), model)
    assert (tmp_path / "whole" / "README.md").read_text() == "mine"
    assert AutoTokenizer.from_pretrained(tmp_path / "whole")("word7 word8")["input_ids"] == [7, 8]
    assert not (tmp_path / "whole" / "delta.safetensors").exists()
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["delta"] is None
    with pytest.raises(ValueError, match=r"no delta\.safetensors.*save_delta"):
        merge_delta(tmp_path / "whole", tmp_path / "again")


def test_merging_into_the_deltas_own_folder_is_refused(tmp_path: Path) -> None:
    save_delta(stitched("llama", tmp_path), tmp_path / "delta")
    held = contents(tmp_path / "delta")
    with pytest.raises(ValueError, match="expected another folder"):
        merge_delta(tmp_path / "delta", tmp_path / "small" / ".." / "delta")
    assert contents(tmp_path / "delta") == held


def test_a_loaded_delta_is_saved_whole_or_as_a_delta_again(tmp_path: Path) -> None:
    model = stitched("llama", tmp_path)
    save_delta(model, tmp_path / "delta")
    loaded = StitchedModel.from_pretrained(tmp_path / "delta")
    loaded.save_pretrained(tmp_path / "whole")
    save_delta(loaded, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "delta")
    assert_same("llama", StitchedModel.from_pretrained(tmp_path / "whole"), model)


def test_folders_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, _, stitch = anchors("llama", tmp_path)
    model = StitchedModel.from_anchors("small", "large", stitch)
    save_delta(model, "delta")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert_same("llama", StitchedModel.from_pretrained(tmp_path / "delta"), model)
    assert model.config.anchor_names[0] == "small"  # the model in memory is as it was
    assert model.config.delta is None


# Anchors that are others than they were.


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_a_changed_anchor_is_refused(kind: str, side: str, tmp_path: Path) -> None:
    model = stitched(kind, tmp_path)
    save_delta(model, tmp_path / "delta")
    file = tmp_path / {"source": "small", "target": "large"}[side] / "model.safetensors"
    tensors, used = (
        load_file(file),
        {"source": ("layers.0.", "layer.0."), "target": ("model.norm.weight", "classifier.weight")},
    )
    name = next(name for name in tensors if any(part in name for part in used[side]))
    tensors[name].reshape(-1)[0] += 1e-3
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"another anchor [01], .*fingerprint.*Restore the anchor"):
        StitchedModel.from_pretrained(tmp_path / "delta")
    with pytest.raises(ValueError, match="another anchor [01],"):
        merge_delta(tmp_path / "delta", tmp_path / "whole")


def test_blocks_that_are_not_used_may_change(tmp_path: Path) -> None:
    model = stitched("llama", tmp_path)
    save_delta(model, tmp_path / "delta")
    file = tmp_path / "large" / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if "layers.0." in name:
            tensors[name] += 1
    save_file(tensors, file, {"format": "pt"})
    assert_same("llama", StitchedModel.from_pretrained(tmp_path / "delta"), model)


def test_an_anchor_that_is_gone_is_named(tmp_path: Path) -> None:
    save_delta(stitched("llama", tmp_path), tmp_path / "delta")
    shutil.rmtree(tmp_path / "small")
    with pytest.raises(OSError, match="could not load the anchor '.*small'"):
        StitchedModel.from_pretrained(tmp_path / "delta")


# What cannot be a delta.


def test_anchors_in_memory_are_refused(tmp_path: Path) -> None:
    source, target = tiny_models.tiny_model(), tiny_models.tiny_model(large=True)
    model = StitchedModel.from_anchors(source, target, (2, 3))
    with pytest.raises(ValueError, match="anchor 0 was only in memory.*pass its folder"):
        save_delta(model, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def test_what_is_no_stitched_model_with_plain_tensors_is_refused(tmp_path: Path) -> None:
    model = stitched("llama", tmp_path)
    adapted = get_peft_model(tiny_models.tiny_model(), LoraConfig(target_modules=["q_proj"]))
    for wrong in (model.model, tiny_models.tiny_model(), adapted, torch.nn.Linear(1, 1)):
        with pytest.raises(TypeError, match="expected one of .*StitchedForCausalLM"):
            save_delta(wrong, tmp_path / "delta")
    quantised = copy.deepcopy(model)
    quantised.config.quantization_config = {"quant_method": "torchao"}
    with pytest.raises(ValueError, match="quantised"):
        save_delta(quantised, tmp_path / "delta")
    offloaded = copy.deepcopy(model)
    offloaded.lm_head.to("meta")
    with pytest.raises(ValueError, match=r"offloaded the tensors \['lm_head.weight'\]"):
        save_delta(offloaded, tmp_path / "delta")
    more = copy.deepcopy(model)
    more.lm_head.extra = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="has in addition"):
        save_delta(more, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def test_adapters_that_cannot_be_merged_are_refused(tmp_path: Path) -> None:
    model = stitched("llama", tmp_path)
    lora = LoraConfig(target_modules=["q_proj"])
    injected = copy.deepcopy(model)
    injected.add_adapter(lora)
    with pytest.raises(ValueError, match="Pass the PeftModel itself"):
        save_delta(injected, tmp_path / "delta")
    two = get_peft_model(copy.deepcopy(model), lora)
    two.add_adapter("other", lora)
    with pytest.raises(ValueError, match=r"adapters \['default', 'other'\].*delete_adapter"):
        save_delta(two, tmp_path / "delta")
    two.delete_adapter("other")
    save_delta(two, tmp_path / "delta")
    prompts = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=16, num_layers=4, num_attention_heads=2
    )
    with pytest.raises(ValueError, match="PROMPT_TUNING, which cannot be merged"):
        save_delta(PeftModel(model, prompts), tmp_path / "other")


def test_a_whole_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    model = stitched("llama", tmp_path)
    for number, limit in enumerate(["1GB", "20KB"]):
        model.save_pretrained(tmp_path / f"whole{number}", max_shard_size=limit)
        held = contents(tmp_path / f"whole{number}")
        with pytest.raises(ValueError, match="holds a whole model.*Choose another one"):
            save_delta(model, tmp_path / f"whole{number}")
        assert contents(tmp_path / f"whole{number}") == held


# Damage.


def lora_delta(root: Path) -> Path:
    adapted = get_peft_model(stitched("llama", root), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    save_delta(adapted, root / "delta")
    return root / "delta"


@pytest.mark.parametrize("file", ["delta.safetensors", "adapter/adapter_model.safetensors"])
def test_missing_and_truncated_files_are_named(file: str, tmp_path: Path) -> None:
    path = lora_delta(tmp_path) / file
    path.write_bytes(path.read_bytes()[:-10])
    for action in (StitchedModel.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(OSError, match=f"{file} is damaged"):
            action(tmp_path / "delta")
    path.unlink()
    with pytest.raises(OSError, match=f"{file} is missing"):
        StitchedModel.from_pretrained(tmp_path / "delta")
    (path.parent / "adapter_model.bin").write_bytes(b"pickled")
    with pytest.raises(OSError, match=f"{file} is missing"):
        StitchedModel.from_pretrained(tmp_path / "delta")


@pytest.mark.parametrize("file", ["delta.safetensors", "adapter/adapter_model.safetensors"])
def test_a_flipped_bit_is_found_by_its_hash(file: str, tmp_path: Path) -> None:
    path = lora_delta(tmp_path) / file
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    for action in (StitchedModel.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(OSError, match=f"{file} is damaged .its SHA-256 is .*, expected"):
            action(tmp_path / "delta")


@pytest.mark.parametrize("adapter", ["../adapter", "/etc", "adapter/../../x", 7])
def test_an_adapter_outside_the_folder_is_refused(adapter: object, tmp_path: Path) -> None:
    folder = lora_delta(tmp_path)
    written = json.loads((folder / "config.json").read_text())
    written["delta"]["adapter"] = adapter
    (folder / "config.json").write_text(json.dumps(written))
    with pytest.raises(OSError, match="delta.*which names the file .*; expected names of files inside its folder"):
        StitchedModel.from_pretrained(folder)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_stitching_layer_is_not_made_up(adapted: bool, tmp_path: Path) -> None:
    folder = lora_delta(tmp_path) if adapted else tmp_path / "delta"
    if not adapted:
        save_delta(stitched("llama", tmp_path), folder)
    save_file({"model.joints.0.weight": tensors_of(folder)["model.joints.0.weight"]}, folder / "delta.safetensors")
    written = json.loads((folder / "config.json").read_text())
    written["delta"]["files"] = None  # as of one that was saved without, or this would be found first
    (folder / "config.json").write_text(json.dumps(written))
    with pytest.raises(OSError, match=r"1 tensors are missing from it \(model.joints.0.bias\)"):
        StitchedModel.from_pretrained(folder)


def test_the_old_delta_survives_a_full_disk(tmp_path: Path) -> None:
    folder = lora_delta(tmp_path)
    old, held = StitchedModel.from_pretrained(folder), contents(folder)
    new = StitchedModel.from_pretrained(folder)
    with torch.no_grad():
        new.model.joints[0].weight += 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # it would be cut short too
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        with pytest.raises(SafetensorError, match="File too large"):
            save_delta(new, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        sys.dont_write_bytecode = writes_bytecode
    assert contents(folder) == held
    assert_same("llama", StitchedModel.from_pretrained(folder), old)
    save_delta(new, folder)
    assert_same("llama", StitchedModel.from_pretrained(folder), new)
    assert not (folder / "adapter").exists()  # it was merged
    adapted = get_peft_model(new, LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    for _ in range(2):
        save_delta(adapted, folder)
    assert_same("llama", StitchedModel.from_pretrained(folder), adapted.merge_and_unload())


# By Hub id.


def files_in(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if not name.startswith(".")}


def save_hub_delta(folder: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Deltas of a model made from Hub ids, and of one made from models that came from there."""
    names = "me/delta-small", "me/delta-large"
    loaded = StitchedModel.from_anchors(*map(AutoModelForCausalLM.from_pretrained, names), (2, 3))
    save_delta(loaded, folder / ".." / "of-models")
    model = StitchedModel.from_anchors(*names, (2, 3))
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    save_delta(adapted, folder)
    configs = [json.loads((one / "config.json").read_text()) for one in (folder, folder / ".." / "of-models")]
    return configs, adapted.merge_and_unload().state_dict()


def load_hub_delta(output: Path, revision: str | None) -> list[dict[str, torch.Tensor]]:
    hub = {} if revision is None else {"revision": revision}
    merge_delta("me/delta", output, **hub)
    models = [loader.from_pretrained("me/delta", **hub) for loader in loaders("llama")]
    return [model.state_dict() for model in (*models, StitchedModel.from_pretrained(output))]


@pytest.mark.slow
def test_hub_anchors_are_pinned(hub: HubServer, client: HubClient, tmp_path: Path) -> None:
    source, target, _ = anchors("llama", tmp_path)
    repos = [hub.make(f"me/delta-{folder.name}", files_in(folder)) for folder in (source, target)]
    commits = [repo.head().oid for repo in repos]
    configs, expected = client(save_hub_delta, tmp_path / "delta")
    for config in configs:
        assert config["anchor_names"] == ["me/delta-small", "me/delta-large"]
        assert config["anchor_revisions"] == commits
    for repo in repos:  # main goes on
        broken = repo.files() | {"model.safetensors": b"broken"}
        repo.add(broken, frozenset(["model.safetensors"]))
    delta = hub.make("me/delta", files_in(tmp_path / "delta"))
    first = delta.head().oid
    for number, revision in enumerate([None, first]):
        for state in client(load_hub_delta, tmp_path / f"whole{number}", revision):
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[name], expected[name]) for name in expected)
        assert (tmp_path / f"whole{number}" / "model.safetensors").is_file()
        delta.add(delta.files() | {"delta.safetensors": b"broken"}, frozenset(["delta.safetensors"]))
