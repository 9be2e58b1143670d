"""What vLLM's transformers backend asks of a model, tested without it.

It makes the model with `AutoModel.from_config`, asks it for hidden states of one flat row of tokens without a cache,
hands its own attention layers down as a keyword, finds each by `module.layer_idx`, and puts its own head on top.

Layers may differ: their sizes stand in `per_layer_config`, and `models/vllm_attention.py` does the rest. test_vllm.py
runs vLLM itself.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_models import save_stitched
from tiny_models import randomise_joints, tiny_model, token_ids
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from klas_hf import StitchedConfig, StitchedForCausalLM, StitchedModel
from klas_hf.models import StitchedTextModel

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer is random")

SERVER = "a_server"
PAIRS = [("llama", "llama"), ("qwen3", "llama"), ("olmo2", "mixtral"), ("gpt_neox", "phi")]


class AttentionOfAServer:
    """One for each layer, as vLLM's `Attention`: it is made from the configuration's top, and keeps its own mask."""

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.calls: list[tuple[int, ...]] = []

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """`(batch, heads, tokens, head width)` each; causal."""
        self.calls.append(tuple(query.shape))
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        ago = torch.arange(query.shape[-2])[:, None] - torch.arange(query.shape[-2])
        hidden = (ago < 0) | (ago >= (self.window or torch.inf))
        weights = (query @ key.transpose(-1, -2) * scaling).masked_fill(hidden, -torch.inf)
        return (weights.softmax(-1) @ value).transpose(1, 2)


def layers_of_a_server(config: StitchedConfig) -> dict[int, AttentionOfAServer]:
    windows = {"full_attention": None, "sliding_attention": config.sliding_window}
    return {number: AttentionOfAServer(windows[kind]) for number, kind in enumerate(config.layer_types)}


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attention_instances: dict[int, AttentionOfAServer],
    scaling: float,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    assert attention_mask is None
    layer = attention_instances[module.layer_idx]
    assert sliding_window == layer.window
    return layer.forward(query, key, value, scaling), None


@pytest.fixture
def server_attention() -> Iterator[None]:
    AttentionInterface.register(SERVER, attend)
    yield
    del ALL_ATTENTION_FUNCTIONS._global_mapping[SERVER]


def stitched(source: str, target: str, **changes: Any) -> StitchedForCausalLM:
    anchors = tiny_model(source, seed=1), tiny_model(target, large=True, seed=2, **changes)
    model = StitchedModel.from_path(anchors, "0[:2] 1[1:3] 1[4:]")
    randomise_joints(model)
    return model


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith((".self_attn", ".attention"))]


@torch.no_grad()
@pytest.mark.usefixtures("server_attention")
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_an_attention_from_outside_serves_every_layer(source: str, target: str) -> None:
    model = stitched(source, target)
    config = type(model.config).from_dict(model.config.to_dict())
    config._attn_implementation = SERVER
    served = AutoModel.from_config(config).eval()
    served.load_state_dict(model.model.state_dict())
    layers = layers_of_a_server(config)
    ids = token_ids(1, 9)
    (hidden,) = served(
        input_ids=ids,
        inputs_embeds=None,
        use_cache=False,
        position_ids=torch.arange(9)[None],
        attention_instances=layers,
        return_dict=False,
    )
    torch.testing.assert_close(hidden, model.model(ids).last_hidden_state, rtol=1e-4, atol=1e-4)
    assert [layers[number].calls for number in range(5)] == [[(1, 2, 9, 8)]] * 2 + [
        [(1, 4, 9, hidden_width(model))]
    ] * 3


def hidden_width(model: StitchedForCausalLM) -> int:
    """Head width of the target."""
    config = model.config.slice_configs[-1]
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_layers_are_counted_through_and_causal(source: str, target: str) -> None:
    for model in (stitched(source, target), stitched(source, target).model):
        modules = attention_modules(model)
        assert [module.layer_idx for module in modules] == list(range(model.config.num_hidden_layers))
        assert all(module.is_causal for module in modules)
        assert model.is_backend_compatible()


def test_the_automatic_class_gives_hidden_states(tmp_path: Path) -> None:
    saved = save_stitched(tmp_path)
    model = AutoModel.from_pretrained(saved.folder)
    assert isinstance(model, StitchedTextModel)
    ids = token_ids(1, 9)
    with torch.no_grad():
        hidden = model(ids, use_cache=False, return_dict=False)[0]
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids), use_cache=False, return_dict=False)[0]
        assert torch.equal(embedded, hidden)
        torch.testing.assert_close(saved.model.lm_head(hidden), saved.model(ids).logits, rtol=1e-5, atol=1e-5)


def test_sizes_stand_at_the_top_of_the_saved_configuration(tmp_path: Path) -> None:
    """vLLM makes its embedding of `embedding_size` and its head of `hidden_size`, both with `vocab_size` rows."""
    saved = save_stitched(tmp_path)
    config = AutoConfig.from_pretrained(saved.folder)
    text = config.get_text_config()
    embedding, head = saved.model.get_input_embeddings().weight, saved.model.get_output_embeddings().weight
    assert tuple(embedding.shape) == (text.vocab_size, text.embedding_size)
    assert tuple(head.shape) == (text.vocab_size, text.hidden_size)
    assert text.embedding_size != text.hidden_size
    assert text.num_hidden_layers == len(text.layer_types) == len(attention_modules(saved.model))
    assert not text.tie_word_embeddings


def test_one_head_width_stands_at_the_top_or_none() -> None:
    """None is what tells a server, which has one cache shape for all layers, that this model has several."""
    alike = {"head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = stitched("llama", "llama", **alike).config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)
    config = stitched("llama", "llama").config
    assert (config.num_key_value_heads, config.head_dim) == (None, None)


def test_a_server_sees_each_layer_and_the_whole_model() -> None:
    """vLLM sizes layer n from `per_layer_config[n]`, and wants all else there alike, or asks for the largest."""
    config = stitched("mistral", "granite", logits_scaling=4.0).config
    config = type(config).from_dict(config.to_dict())
    assert config.is_heterogeneous
    heads = [(one.num_attention_heads, one.num_key_value_heads, one.head_dim) for one in config.per_layer_config]
    assert heads == [(2, 1, 8)] * 2 + [(4, 2, 12)] * 3
    for name in ("num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings", "model_type"):
        assert {getattr(one, name) for one in config.per_layer_config} == {getattr(config, name)}, name
    assert {tuple(one.architectures) for one in config.per_layer_config} == {tuple(config.architectures)}
    assert [one.num_hidden_layers for one in config.slice_configs] == [2, 2, 1]
    assert (config.logit_scale, config.final_logit_softcapping) == (0.25, None)


def test_models_of_equal_layers_are_not_heterogeneous() -> None:
    alike = {"head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = stitched("llama", "llama", **alike).config
    assert not config.is_heterogeneous
    assert "per_layer_config" not in config.to_dict()


def test_what_is_done_to_logits_and_scores_stands_at_the_top() -> None:
    config = stitched("llama", "gemma2").config
    assert (config.logit_scale, config.final_logit_softcapping, config.attn_logit_softcapping) == (1.0, 2.0, None)
    assert stitched("gemma2", "gemma2").config.attn_logit_softcapping == 1.5


def test_tensor_parallel_plans_name_the_layers_of_all_slices() -> None:
    model = stitched("llama", "llama")
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name}
    plan = re.compile("|".join(re.escape(key).replace(r"\*", r"\d+") for key in model.tp_plan))
    assert linear
    assert all(plan.fullmatch(name) for name in linear)
