"""What a stitched model does while vLLM makes it: here with stand-ins; tests/ecosystem/test_vllm.py runs vLLM."""

import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_models import tiny_model
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from klas_hf import StitchedConfig, StitchedModel
from klas_hf.models import StitchedTextModel

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer is random")
PATH = "0[:2] 1[1:3] 1[4:]"


@dataclass
class Kernel:
    """As vLLM makes one for an attention layer."""

    num_heads: int
    head_size: int
    scale: float
    num_kv_heads: int
    alibi_slopes: Any = None
    sliding_window: int | None = 99
    kv_cache_dtype: str = "auto"
    logits_soft_cap: float | None = None
    attn_type: str = "decoder"


class Attention(nn.Module):
    """With what stands at the configuration's top."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer_name, self.num_heads, self.head_size, self.num_kv_heads = name, 4, 8, 2
        self.sliding_window, self.kv_cache_dtype, self.attn_type = 99, "fp8", "decoder"
        self.impl = Kernel(4, 8, 0.3, 2)


@dataclass
class Server:
    pipeline_parallel_size: int = 1
    layers: dict[str, Attention] = field(default_factory=dict)

    def settings(self) -> SimpleNamespace:
        parallel = SimpleNamespace(pipeline_parallel_size=self.pipeline_parallel_size)
        compilation = SimpleNamespace(static_forward_context=self.layers)
        return SimpleNamespace(parallel_config=parallel, compilation_config=compilation)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    one = Server()
    backend = SimpleNamespace(VLLM_ATTN_ATTR="attn")
    monkeypatch.setitem(sys.modules, "vllm.model_executor.models.transformers.base", backend)
    monkeypatch.setitem(sys.modules, "vllm.config", SimpleNamespace(get_current_vllm_config=one.settings))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", lambda *args, **kwargs: None)
    return one


def served(source: str, target: str, **changes: Any) -> StitchedTextModel:
    """Made as vLLM does: of the configuration alone, which names its attention."""
    anchors = tiny_model(source, seed=1), tiny_model(target, large=True, seed=2)
    config = StitchedModel.from_path(anchors, PATH).config
    config = StitchedConfig.from_dict(config.to_dict())
    for name, value in changes.items():
        setattr(config.slice_configs[-1], name, value)
    config._attn_implementation = "vllm"
    return StitchedTextModel(config)


def test_each_attention_layer_gets_its_own_name_window_and_cap(server: Server) -> None:
    model = served("mistral", "gemma2")
    modules = {name: module for name, module in model.named_modules() if name.endswith("self_attn")}
    for name, module in modules.items():
        attention = server.layers[name] = Attention(name)
        module.attn = attention
    assert list(server.layers) == [f"layers.{number}.attn" for number in range(5)]
    assert [one.layer_name for one in server.layers.values()] == list(server.layers)
    kernels = [one.impl for one in server.layers.values()]
    kinds = model.config.layer_types[2:]
    windows = [4, 4, *(6 if kind == "sliding_attention" else None for kind in kinds)]
    assert set(kinds) == {"sliding_attention", "full_attention"}
    assert [one.sliding_window for one in kernels] == windows
    assert [one.sliding_window for one in server.layers.values()] == windows
    assert [one.logits_soft_cap for one in kernels] == [None, None, 1.5, 1.5, 1.5]
    assert all((one.num_heads, one.scale, one.kv_cache_dtype) == (4, 0.3, "fp8") for one in kernels)


def test_other_modules_are_left_alone(server: Server) -> None:
    served("llama", "llama")
    other = nn.Module()
    other.attn = Attention("other")
    assert other.attn.layer_name == "other"
    assert other.attn.impl.sliding_window == 99


def test_what_would_be_wrong_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="got mixtures of experts; expected none"):
        served("llama", "mixtral")
    with pytest.raises(ValueError, match=r"scaled by 0\.5 and then capped at 3\.0; expected only one"):
        served("llama", "gemma2", logits_scaling=2.0, final_logit_softcapping=3.0)
    monkeypatch.setattr(server, "pipeline_parallel_size", 2)
    with pytest.raises(ValueError, match="pipeline_parallel_size=2; expected 1.*tensor_parallel_size"):
        served("llama", "llama")
    monkeypatch.setitem(sys.modules, "vllm.model_executor.models.transformers.base", SimpleNamespace())
    with pytest.raises(ValueError, match="expected 0.32 or newer"):
        served("llama", "llama")
