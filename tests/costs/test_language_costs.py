"""Costs against hand-written formulas, published sizes, and the models themselves."""

from pathlib import Path

import numpy as np
import pytest
import quick_cases
import torch
from quick_cases import quick
from tiny_models import FAMILIES, tiny_config, tiny_model
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from klas_hf import Stitch, StitchedModel, measure_costs, measure_path_costs, measure_stitch_costs

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer is random")

LLAMA_1B = LlamaConfig(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    vocab_size=128256,
    tie_word_embeddings=True,
    dtype="bfloat16",
)
LLAMA_3B = LlamaConfig(
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
    tie_word_embeddings=True,
    dtype="bfloat16",
)


def test_a_model_that_was_saved_costs_what_it_did(tmp_path: Path) -> None:
    """Saving leaves the name of the dtype in its configuration, in place of the dtype."""
    model = tiny_model()
    before = measure_costs(model), measure_path_costs([model]).of("0[:]"), measure_costs(model.config)
    model.save_pretrained(tmp_path)
    assert (measure_costs(model), measure_path_costs([model]).of("0[:]"), measure_costs(model.config)) == before
    assert measure_path_costs([model.config]).of("0[:]") == before[1]


def block_macs(config: PreTrainedConfig, tokens: int) -> int:
    """MACs of one gated, grouped-query block; every query meets every key, masked or not."""
    width, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    projections = 2 * width * heads * head_dim + 2 * width * kv_heads * head_dim
    attention = 2 * heads * tokens * head_dim
    mlp = 3 * width * inner
    if config.model_type == "mixtral":
        mlp = config.num_experts_per_tok * mlp + width * config.num_local_experts
    return tokens * (projections + attention + mlp)


def head_macs(config: PreTrainedConfig, tokens: int) -> int:
    return tokens * config.hidden_size * config.vocab_size


@pytest.mark.parametrize("tokens", [7, 128])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mixtral"])
def test_macs_follow_the_formula(family: str, tokens: int) -> None:
    config = tiny_config(family, large=True)
    cost = measure_costs(config, tokens=tokens)
    assert cost.macs == 5 * block_macs(config, tokens) + head_macs(config, tokens)
    assert cost.tokens == tokens
    assert measure_costs(tiny_model(family, large=True), tokens=tokens) == cost


def test_macs_of_stitches_follow_the_formula() -> None:
    source, target = tiny_config("llama"), tiny_config("mixtral", large=True)
    costs = measure_stitch_costs(source, target, tokens=16)
    for i in range(1, 4):
        for j in range(5):
            macs = i * block_macs(source, 16) + 16 * 16 * 48 + (5 - j) * block_macs(target, 16) + head_macs(target, 16)
            assert costs.of(Stitch(i, j))[0] == costs.macs[i - 1, j] == macs
    assert costs.source_total == measure_costs(source, tokens=16).macs
    assert costs.target_total == measure_costs(target, tokens=16).macs


PAIRS = [(family, family) for family in FAMILIES] + [("mistral", "gemma3_text"), ("phi", "mixtral")]


@pytest.mark.parametrize(
    ("source_family", "target_family"), quick(PAIRS, [*((one, one) for one in quick_cases.FAMILIES), PAIRS[-2]])
)
def test_costs_of_every_stitch_are_those_of_the_model_it_makes(source_family: str, target_family: str) -> None:
    source, target = tiny_model(source_family), tiny_model(target_family, large=True)
    costs = measure_stitch_costs(source, target, tokens=16)
    assert costs.macs.shape == costs.parameters.shape == (3, 5)
    every = [Stitch(i, j) for i in (1, 2, 3) for j in range(5)]
    tried = every if (source_family, target_family) == ("gemma2", "gemma2") else [Stitch(1, 0), Stitch(2, 3)]
    for stitch in tried:
        model = StitchedModel.from_anchors(source, target, stitch)
        cost = measure_costs(model, tokens=16)
        assert (cost.macs, cost.parameters) == costs.of(stitch)
        assert cost.parameters == model.num_parameters()
        assert measure_costs(model.config, tokens=16) == cost
    for anchor in (source, target):
        assert measure_costs(anchor, tokens=16).parameters == anchor.num_parameters()


def test_more_source_blocks_cost_more_and_more_skipped_target_blocks_less() -> None:
    costs = measure_stitch_costs(tiny_config("llama"), tiny_config("llama", large=True), tokens=16)
    for table in (costs.macs, costs.parameters):
        assert (np.diff(table, axis=0) > 0).all()
        assert (np.diff(table, axis=1) < 0).all()
    costs.check_direction()
    with pytest.raises(ValueError, match="reversed.*Swap"):
        measure_stitch_costs(tiny_config("llama", large=True), tiny_config("llama"), tokens=16).check_direction()


@pytest.mark.parametrize(
    ("config", "parameters", "kv_bytes"),
    [(LLAMA_1B, 1_235_814_400, 2 * 2 * 16 * 8 * 64), (LLAMA_3B, 3_212_749_824, 2 * 2 * 28 * 8 * 128)],
)
def test_published_sizes(config: LlamaConfig, parameters: int, kv_bytes: int) -> None:
    cost = measure_costs(config, tokens=128)
    assert cost.parameters == parameters
    assert cost.kv_bytes_per_token == kv_bytes
    assert cost.macs == config.num_hidden_layers * block_macs(config, 128) + head_macs(config, 128)


def test_stitches_between_the_published_anchors() -> None:
    """The stitched model stores the source's embedding and the target's head, which the anchors tie."""
    costs = measure_stitch_costs(LLAMA_1B, LLAMA_3B)
    embedding_1b, embedding_3b = 2048 * 128256, 3072 * 128256
    block_1b = (1_235_814_400 - embedding_1b - 2048) // 16
    block_3b = (3_212_749_824 - embedding_3b - 3072) // 28
    stitch = 2048 * 3072 + 3072
    expected = embedding_1b + 8 * block_1b + stitch + 14 * block_3b + 3072 + embedding_3b
    assert costs.of(Stitch(8, 14))[1] == expected
    assert costs.source_total < costs.of(Stitch(8, 14))[0] < costs.target_total


def test_nothing_is_allocated() -> None:
    """A model of some 50 TB, and a sequence whose logits alone would take 8 TB."""
    config = LlamaConfig(
        hidden_size=2**17,
        intermediate_size=2**20,
        num_hidden_layers=30,
        num_attention_heads=2**10,
        num_key_value_heads=2**3,
        vocab_size=2**21,
    )
    cost = measure_costs(config, tokens=2**20)
    assert cost.macs == 30 * block_macs(config, 2**20) + head_macs(config, 2**20)
    assert cost.parameters > 12 * 10**12


@pytest.mark.parametrize("family", list(FAMILIES))
def test_kv_bytes_are_what_a_cache_takes(family: str) -> None:
    source, target = tiny_model(family), tiny_model(family, large=True)
    model = StitchedModel.from_anchors(source, target, (2, 3))
    for one in (source, target, model):
        with torch.no_grad():
            layers = one(torch.zeros(1, 3, dtype=torch.long), use_cache=True).past_key_values.layers
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        assert measure_costs(one, tokens=4).kv_bytes_per_token * 3 == held


def test_kv_bytes_follow_the_dtype_of_the_model_and_unset_head_dims() -> None:
    model = tiny_model(large=True)
    assert measure_costs(model, tokens=4).kv_bytes_per_token == 2 * measure_costs(model.bfloat16()).kv_bytes_per_token
    unset = tiny_config("mixtral", head_dim=None)
    assert measure_costs(unset, tokens=4).kv_bytes_per_token == 3 * 2 * 1 * 8 * 4
    assert measure_costs(Qwen3Config(num_hidden_layers=1, dtype="bfloat16")).kv_bytes_per_token == 2 * 32 * 128 * 2


def test_configs_and_models_are_left_as_they_were() -> None:
    source, target = tiny_model("gemma2"), tiny_model("mixtral", large=True)
    before = [
        anchor.config.to_dict() | {"attention": anchor.config._attn_implementation} for anchor in (source, target)
    ]
    measure_stitch_costs(source, target, tokens=4)
    measure_costs(source, tokens=4)
    after = [anchor.config.to_dict() | {"attention": anchor.config._attn_implementation} for anchor in (source, target)]
    assert before == after
    assert {parameter.device.type for parameter in (*source.parameters(), *target.parameters())} == {"cpu"}


@pytest.mark.parametrize(
    "path", ["0[:2] 1[3:]", "0[:1] 1[1:3] 1[4:]", "1[:1] 0[1:2] 1[3:]", "1[:4] 1[2:]", "0[:2] 1[5:]"]
)
@pytest.mark.parametrize("family", quick(["llama", "gemma2", "phi"], ["gemma2"]))
def test_paths_cost_what_their_models_cost(family: str, path: str) -> None:
    anchors = [tiny_model(family, large=large) for large in (False, True)]
    model = StitchedModel.from_path(anchors, path)
    assert measure_path_costs(anchors, tokens=9).of(path) == measure_costs(model, tokens=9)
    assert measure_costs(model, tokens=9).parameters == sum(p.numel() for p in model.parameters())
