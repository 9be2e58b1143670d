"""Paths of every family, alone and across families, against hooks on whole anchors (`tiny_models.reference_logits`)."""

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_models import FAMILIES, left_padded, randomise_joints, reference_logits, tiny_model, token_ids
from torch import Tensor
from transformers import PreTrainedModel

from klas_hf import StitchedForCausalLM, StitchedModel
from klas_hf.anchors import DECODER_FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer is random")

ACROSS = [
    ("qwen2", "llama"),
    ("mistral", "llama"),
    ("llama", "gemma3_text"),
    ("gemma2", "qwen3"),
    ("granite", "phi"),
    ("gpt_neox", "granite"),
    ("smollm3", "mixtral"),
    ("gemma", "olmo2"),
    ("phi3", "starcoder2"),
]
PAIRS = [(family, family) for family in FAMILIES] + ACROSS
# Of anchors of 3 and 5 blocks.
STITCHES = ["0[:1] 1[:]", "0[:2] 1[3:]", "0[:3] 1[4:]"]
PATHS = [
    "0[:1] 1[1:3] 1[4:]",  # a stitch, then a block left out
    "0[:1] 1[2:4] 0[2:]",  # small, large, small
    "1[:4] 1[2:]",  # repeated blocks
    "1[:1] 0[1:2] 1[1:2] 1[3:4] 0[3:]",  # an empty last slice
    "1[:]",  # an anchor alone
]


def padded_inputs() -> dict[str, Tensor]:
    """Rows longer than any window, one of them padded on the left."""
    return left_padded(token_ids(3, 12), [12, 7, 10])


def largest_difference(
    model: StitchedForCausalLM, source: PreTrainedModel, target: PreTrainedModel, path: str | tuple[int, int]
) -> float:
    """Over all tokens but padding, whose rows attend to nothing."""
    inputs = padded_inputs()
    expected = reference_logits([source, target], path, randomise_joints(model), **inputs)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert expected.std() > 0.5
    assert logits.shape == expected.shape
    return (logits - expected)[inputs["attention_mask"].bool()].abs().max().item()


def test_every_family_of_the_table_is_tried() -> None:
    assert set(FAMILIES) == set(DECODER_FAMILIES)


@pytest.mark.parametrize(("source_family", "target_family"), PAIRS)
def test_equals_whole_anchors(source_family: str, target_family: str, tmp_path: Path) -> None:
    source = tiny_model(source_family, seed=1)
    target = tiny_model(target_family, large=True, seed=2)
    source.save_pretrained(tmp_path / "source")
    target.save_pretrained(tmp_path / "target")
    for path in STITCHES + PATHS:
        model = StitchedModel.from_path([source, target], path)
        assert model.config.path == path
        assert largest_difference(model, source, target, path) == 0.0, path
    folders = [tmp_path / "source", str(tmp_path / "target")]
    model = StitchedModel.from_path(folders, PATHS[1])
    assert largest_difference(model, source, target, PATHS[1]) == 0.0
    model = StitchedModel.from_anchors(tmp_path / "source", str(tmp_path / "target"), (2, 1))
    assert largest_difference(model, source, target, (2, 1)) == 0.0


@pytest.mark.parametrize("changed", ["source", "target"])
def test_each_side_keeps_its_own_rope(changed: str) -> None:
    """With one head_dim on both sides a mixed-up RoPE would run without an error."""
    ropes = {"source": 100.0, "target": 3.0}
    shape = {"head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    anchors = {
        side: tiny_model(
            large=side == "target", seed=3, rope_parameters={"rope_type": "default", "rope_theta": theta}, **shape
        )
        for side, theta in ropes.items()
    }
    model = StitchedModel.from_anchors(anchors["source"], anchors["target"], (2, 2))
    assert largest_difference(model, anchors["source"], anchors["target"], (2, 2)) == 0.0
    other = {"rope_type": "default", "rope_theta": ropes["target" if changed == "source" else "source"]}
    mixed_up = anchors | {changed: tiny_model(large=changed == "target", seed=3, rope_parameters=other, **shape)}
    assert largest_difference(model, mixed_up["source"], mixed_up["target"], (2, 2)) > 1e-3


@pytest.mark.parametrize("source_tied", [True, False])
@pytest.mark.parametrize("target_tied", [True, False])
def test_tied_and_untied_heads(source_tied: bool, target_tied: bool, tmp_path: Path) -> None:
    source = tiny_model(seed=1, tie_word_embeddings=source_tied)
    target = tiny_model(large=True, seed=2, tie_word_embeddings=target_tied)
    target.save_pretrained(tmp_path)
    for anchor in (target, tmp_path):
        model = StitchedModel.from_anchors(source, anchor, (1, 2))
        assert largest_difference(model, source, target, (1, 2)) == 0.0
        assert not model.config.tie_word_embeddings
        assert torch.equal(model.lm_head.weight, target.lm_head.weight)
        assert torch.equal(model.get_input_embeddings().weight, source.get_input_embeddings().weight)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gemma3_text", "smollm3"])
def test_lists_with_an_entry_per_block_are_cut(family: str) -> None:
    source, target = tiny_model(family), tiny_model(family, large=True)
    model = StitchedModel.from_anchors(source, target, (2, 3))
    one, other = source.config.layer_types[:2], target.config.layer_types[3:]
    assert model.model.slices[0].config.layer_types == one
    assert model.model.slices[1].config.layer_types == other
    assert model.config.layer_types == one + other
    if family == "smollm3":
        assert model.model.slices[0].config.no_rope_layers == [1, 0]
        assert model.model.slices[1].config.no_rope_layers == [0, 1]


def test_a_list_of_eos_tokens_as_long_as_the_anchor_is_deep_is_not_cut() -> None:
    source, target = tiny_model(eos_token_id=[2, 5, 7]), tiny_model(large=True, eos_token_id=[2, 5, 7, 8, 9])
    model = StitchedModel.from_anchors(source, target, (1, 3))
    assert model.model.slices[0].config.eos_token_id == [2, 5, 7]
    assert model.model.slices[1].config.eos_token_id == model.config.eos_token_id == [2, 5, 7, 8, 9]


def test_experts_are_stored_one_by_one_and_joined_when_read(tmp_path: Path) -> None:
    """What is on disk has one name per expert; the stitched checkpoint keeps to that too."""
    source, target = tiny_model("mixtral", seed=1), tiny_model("mixtral", large=True, seed=2)
    source.save_pretrained(tmp_path / "source")
    target.save_pretrained(tmp_path / "target")
    model = StitchedModel.from_anchors(tmp_path / "source", tmp_path / "target", (2, 4))
    model.save_pretrained(tmp_path / "stitched")
    for folder, blocks in (("source", 3), ("stitched", 2 + 1)):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            names = re.findall(r"\.experts\.\d+\.w1\.weight\b", "\n".join(file.keys()))
        assert len(names) == blocks * 4
    reloaded = StitchedModel.from_pretrained(tmp_path / "stitched")
    assert largest_difference(reloaded, source, target, (2, 4)) == 0.0


@pytest.mark.parametrize(
    ("family", "dropout"), [("phi", {"embd_pdrop": 0.9}), ("starcoder2", {"embedding_dropout": 0.9})]
)
def test_dropout_of_embeddings_spares_stitched_hidden_states(family: str, dropout: dict[str, float]) -> None:
    source, target = tiny_model(seed=1), tiny_model(family, large=True, seed=2, **dropout)
    model = StitchedModel.from_anchors(source, target, (2, 2))
    ids = token_ids(2, 8)
    with torch.no_grad():
        assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)


def test_anchors_are_run_in_the_dtype_asked_for() -> None:
    source, target = tiny_model(seed=1), tiny_model(large=True, seed=2)
    expected = {None: torch.float32, "auto": torch.float32, "bfloat16": torch.bfloat16, torch.float16: torch.float16}
    for dtype, got in expected.items():
        model = StitchedModel.from_anchors(source, target, (1, 1), dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {got}
        assert model.dtype == model.config.dtype == got
    model = StitchedModel.from_anchors(source, target.to(torch.bfloat16), (1, 1))
    assert model.dtype == torch.bfloat16
