"""Saving, loading, resizing, copying and training a stitched model as any other model of transformers."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quick_cases import quick
from tiny_models import VOCABULARY, randomise_joints, tiny_model, token_ids
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from klas_hf import StitchedConfig, StitchedForCausalLM, StitchedModel
from klas_hf.models import StitchedTextModel

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer is random")

PAIRS = [
    ("llama", "llama"),
    ("gemma2", "gemma3_text"),
    ("mixtral", "mixtral"),
    ("gpt_neox", "phi"),
    ("smollm3", "granite"),
]
STITCH = (2, 3)
PATHS = ["0[:2] 1[3:]", "0[:2] 1[1:3] 1[4:]", "0[:1] 1[2:4] 0[2:]", "1[:4] 1[2:]", "1[:]"]


def stitched(
    source_family: str = "llama", target_family: str = "llama", path: str = PATHS[0], **options: Any
) -> StitchedForCausalLM:
    anchors = tiny_model(source_family, seed=1), tiny_model(target_family, large=True, seed=2)
    model = StitchedModel.from_path(anchors, path, **options)
    randomise_joints(model)
    return model


@torch.no_grad()
def outputs(model: PreTrainedModel) -> Tensor:
    """Logits, or the last hidden states of a model without a head."""
    return model(token_ids(2, 9))[0]


def assert_same(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Same class, tensors and outputs, bit for bit."""
    assert type(model) is type(other)
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    assert not other.training
    assert torch.equal(outputs(model), outputs(other))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(("source_family", "target_family"), quick(PAIRS, [PAIRS[1], PAIRS[3]]))
def test_every_loader_gives_the_saved_model(
    source_family: str, target_family: str, sharded: bool, path: str, tmp_path: Path
) -> None:
    model = stitched(source_family, target_family, path)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == sharded
    for loader in (StitchedModel, StitchedForCausalLM, AutoModelForCausalLM):
        assert_same(model, loader.from_pretrained(tmp_path))
    assert_same(model, StitchedModel.from_pretrained(tmp_path, device_map={"": "cpu"}))
    assert_same(model.model, AutoModel.from_pretrained(tmp_path))


def test_a_model_without_its_head_is_saved_and_loaded(tmp_path: Path) -> None:
    model = stitched()
    model.model.save_pretrained(tmp_path)
    for loader in (AutoModel, StitchedModel):
        loaded = loader.from_pretrained(tmp_path)
        assert isinstance(loaded, StitchedTextModel)
        assert_same(model.model, loaded)
    assert torch.equal(loaded.stitching_layers()[0].weight, model.stitching_layers()[0].weight)


def test_a_device_map_is_followed() -> None:
    batches = [token_ids(8, 16)]
    assert_same(stitched(calibration=batches), stitched(calibration=batches, device_map={"": "cpu"}))


def test_bfloat16(tmp_path: Path) -> None:
    model = stitched(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = StitchedModel.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert_same(model, loaded)
    assert StitchedModel.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(("source_family", "target_family"), PAIRS)
def test_config_survives_json_with_its_derived_fields(source_family: str, target_family: str, tmp_path: Path) -> None:
    model = stitched(source_family, target_family)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    expected = {
        "model_type": "stitched",
        "architectures": ["StitchedForCausalLM"],
        "num_hidden_layers": 2 + 2,
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "embedding_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if source_family == "gpt_neox" else None,  # elsewhere they differ
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "format_version": 3,
        "path": "0[:2] 1[3:]",
        "slices": [[0, 0, 2], [1, 3, 5]],
        "anchor_blocks": [3, 5],
        "eos_token_id": 2,
    }
    if source_family == target_family == "llama":
        expected |= {"layer_types": ["full_attention"] * 4, "sliding_window": None, "head_dim": None}
    if target_family == "gemma3_text":
        expected |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
        expected["layer_types"][2:] = ["full_attention", "sliding_attention"]
    assert {name: written[name] for name in expected} == expected
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, StitchedConfig)
    assert loaded.to_dict() | {"_name_or_path": ""} == model.config.to_dict()
    assert [type(one) for one in loaded.slice_configs] == [type(one) for one in model.config.slice_configs]
    assert StitchedConfig.from_dict(loaded.to_dict()).to_dict() == loaded.to_dict()
    assert copy.deepcopy(loaded).to_dict() == loaded.to_dict()


def test_top_level_says_what_all_layers_share() -> None:
    shape = {"head_dim": 8, "num_key_value_heads": 1}
    config = StitchedModel.from_anchors(tiny_model(**shape), tiny_model("mistral", large=True, **shape), (1, 4)).config
    assert (config.num_key_value_heads, config.head_dim, config.sliding_window) == (1, 8, 6)
    assert config.layer_types == ["full_attention", "sliding_attention"]


def test_a_config_alone_makes_a_model_of_the_same_shape() -> None:
    model = stitched("gemma2", "phi")
    for made in (AutoModelForCausalLM.from_config(model.config), StitchedForCausalLM(copy.deepcopy(model.config))):
        assert {name: p.shape for name, p in made.named_parameters()} == {
            name: p.shape for name, p in model.named_parameters()
        }
        assert outputs(made).isfinite().all()


def test_generation_config_comes_from_the_target_and_is_saved(tmp_path: Path) -> None:
    source, target = tiny_model(seed=1), tiny_model(large=True, seed=2)
    target.generation_config.update(eos_token_id=[2, 9, 11], do_sample=True, temperature=0.6, top_p=0.9)
    target.save_pretrained(tmp_path / "target")
    source.save_pretrained(tmp_path / "source")
    for anchors in ((tmp_path / "source", tmp_path / "target"), (source, target)):
        model = StitchedModel.from_anchors(*anchors, STITCH)
        model.save_pretrained(tmp_path / "stitched")
        settings = StitchedModel.from_pretrained(tmp_path / "stitched").generation_config
        assert (settings.eos_token_id, settings.do_sample) == ([2, 9, 11], True)
        assert (settings.temperature, settings.top_p) == (0.6, 0.9)
    model.generation_config.temperature = 1.0
    assert target.generation_config.temperature == 0.6


def test_a_target_without_generation_config_passes_its_token_ids_on(tmp_path: Path) -> None:
    target = tiny_model(large=True)
    target.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    settings = StitchedModel.from_anchors(tiny_model(), tmp_path, STITCH).generation_config
    assert (settings.eos_token_id, settings.bos_token_id, settings.pad_token_id) == (2, 1, 0)


@pytest.mark.parametrize("size", [VOCABULARY + 13, VOCABULARY - 13])
def test_resized_vocabulary(size: int, tmp_path: Path) -> None:
    model = stitched("gemma2", "phi")
    before = outputs(stitched("gemma2", "phi"))
    model.resize_token_embeddings(size)
    assert (model.config.vocab_size, model.config.slice_configs[0].vocab_size) == (size, size)
    model.save_pretrained(tmp_path)
    loaded = StitchedModel.from_pretrained(tmp_path)
    ids = token_ids(2, 9).clamp_max(size - 1)
    with torch.no_grad():
        logits = loaded(ids).logits
        assert torch.equal(logits, model(ids).logits)
    assert logits.shape == (2, 9, size)
    assert before.shape == (2, 9, VOCABULARY)
    if size > VOCABULARY:
        torch.testing.assert_close(logits[..., :VOCABULARY], before, rtol=1e-4, atol=1e-4)


def test_stitched_model_and_anchors_share_no_memory() -> None:
    """Neither with the anchors, nor between the two sides of an anchor that is stitched to itself."""
    source, target = tiny_model(seed=1), tiny_model(large=True, seed=2)
    for first, last in ((source, target), (target, target)):
        model = StitchedModel.from_anchors(first, last, (3, 2), calibration=[token_ids(8, 16)])
        anchors = [parameter.clone() for anchor in (first, last) for parameter in anchor.parameters()]
        ours = outputs(model)
        model.train()
        model(token_ids(2, 9), labels=token_ids(2, 9)).loss.backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        model.eval()
        assert not torch.equal(outputs(model), ours)
        now = [parameter for anchor in (first, last) for parameter in anchor.parameters()]
        assert all(torch.equal(one, other) for one, other in zip(anchors, now, strict=True))
        assert all(parameter.grad is None for parameter in now)
        pointers = [parameter.data_ptr() for parameter in model.parameters()]
        assert len(set(pointers)) == len(pointers)

    model = StitchedModel.from_anchors(source, target, STITCH)
    ours = outputs(model)
    with torch.no_grad():
        for parameter in (*source.parameters(), *target.parameters()):
            parameter.add_(1.0)
    assert torch.equal(outputs(model), ours)


def test_deepcopy_is_independent() -> None:
    model = stitched()
    twin = copy.deepcopy(model)
    assert_same(model, twin)
    with torch.no_grad():
        twin.stitching_layers()[0].weight.zero_()
    assert model.stitching_layers()[0].weight.abs().sum() > 0
    assert not torch.equal(outputs(model), outputs(twin))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("trained", ["all", "stitch"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("source_family", "target_family"), [("llama", "llama"), ("gemma2", "mixtral")])
def test_gradient_checkpointing_gives_the_same_gradients(
    source_family: str, target_family: str, reentrant: bool, trained: str
) -> None:
    model = stitched(source_family, target_family).train()
    model.requires_grad_(trained == "all")
    model.stitching_layers()[0].requires_grad_(True)
    ids = token_ids(2, 9)
    runs: list[int] = []
    for side in (model.model.slices[0], model.model.slices[1]):
        side.layers[0].self_attn.register_forward_pre_hook(lambda *_: runs.append(1))

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        runs.clear()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert len(runs) == 2
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    checkpointed = gradients()
    assert len(runs) > 2  # blocks ran again in the backward pass
    assert len(plain) == (2 if trained == "stitch" else len(list(model.parameters())))
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-6)


def test_compiles_without_a_graph_break() -> None:
    model = stitched("gemma2", "llama")
    expected = outputs(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(token_ids(2, 9)).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_of_an_unknown_class_is_refused(tmp_path: Path) -> None:
    model = stitched()
    model.config.architectures = ["StitchedForNothing"]
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="StitchedForNothing.*StitchedForCausalLM"):
        StitchedModel.from_pretrained(tmp_path)
