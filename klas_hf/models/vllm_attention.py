"""What vLLM's transformers backend cannot know of layers that differ, told to its attention layers as they are made.

It sizes the heads of each layer from `StitchedConfig.per_layer_config`. But it gives all layers the window and the soft
cap that stand at the configuration's top, and wants one number in each layer's name, where `slices.1.layers.0` has two.
So, as it sets an attention layer on the module that it serves, the layer is renamed, and its kernel made again with
that module's own window and cap. Written for vLLM 0.32; checked by `tests/ecosystem/test_vllm.py`.
"""

import sys
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .configuration_stitched import StitchedConfig, attention_cap

VLLM = "vllm"  # the attention that a configuration names while vLLM makes a model of it
_BACKEND = "vllm.model_executor.models.transformers.base"
# Module → number of its layer, window, soft cap.
_owned: WeakKeyDictionary[nn.Module, tuple[int, int | None, float | None]] = WeakKeyDictionary()


def prepare_attention(config: StitchedConfig, slices: nn.Module) -> None:
    """Give the attention layers that vLLM will set on these blocks names, windows and soft caps of their own.

    Args:
        slices: whose attention modules have a `layer_idx`.

    Raises:
        ValueError: what vLLM's transformers backend would do wrong or cannot do.
    """
    wrong = _refusal(config, slices)
    if wrong is not None:
        raise ValueError(f"{wrong}. `transformers serve` has no such limit")
    _listen()
    kinds, views = config.layer_types, config.per_layer_config
    for module in slices.modules():
        if isinstance(number := getattr(module, "layer_idx", None), int):
            window = views[number].sliding_window if kinds[number] == "sliding_attention" else None
            _owned[module] = number, window, attention_cap(views[number])


def _refusal(config: StitchedConfig, slices: nn.Module) -> str | None:
    """What of this model, or of how vLLM was started, cannot be right, and what is expected."""
    if not hasattr(sys.modules[_BACKEND], "VLLM_ATTN_ATTR"):
        return (
            "got a vLLM that keeps its attention layers apart from the modules that they serve; expected 0.32 or "
            "newer, as a stitched model's layers differ"
        )
    stages = _vllm().parallel_config.pipeline_parallel_size
    if stages > 1:
        return (
            f"got pipeline_parallel_size={stages}; expected 1, as vLLM cuts one list of equal blocks, and a stitched "
            "model has one for each slice, with stitching layers between. Use tensor_parallel_size"
        )
    if any(name.endswith(".experts") for name, _ in slices.named_modules()):
        return "got mixtures of experts; expected none, as vLLM makes all experts of a model by the sizes of one block"
    if config.final_logit_softcapping is not None and config.logit_scale != 1:
        return (
            f"got logits that are scaled by {config.logit_scale} and then capped at {config.final_logit_softcapping}; "
            "expected only one of these, as vLLM caps first"
        )
    return None


@cache
def _listen() -> None:
    register_module_module_registration_hook(_given)


def _given(module: nn.Module, name: str, attention: Any) -> None:
    """Rename an attention layer of vLLM, and make its kernel with its module's window and soft cap."""
    if module not in _owned or name != sys.modules[_BACKEND].VLLM_ATTN_ATTR:
        return
    number, window, cap = _owned[module]
    layers = _vllm().compilation_config.static_forward_context
    del layers[attention.layer_name]
    attention.layer_name = f"layers.{number}.{name}"
    layers[attention.layer_name] = attention
    attention.sliding_window, kernel = window, attention.impl
    attention.impl = type(kernel)(
        attention.num_heads,
        attention.head_size,
        kernel.scale,
        attention.num_kv_heads,
        alibi_slopes=None,
        sliding_window=window,
        kv_cache_dtype=attention.kv_cache_dtype,
        logits_soft_cap=cap,
        attn_type=attention.attn_type,
    )


def _vllm() -> Any:
    """The settings of the vLLM that is making a model."""
    return sys.modules["vllm.config"].get_current_vllm_config()
