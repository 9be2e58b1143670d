"""Loading a model whose tensors come from several checkpoints, and setting its stitching layers."""

import warnings
from typing import Any

import torch
from accelerate.hooks import SequentialHook
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

RANDOM_STITCH = (
    "the stitching layer is random: the model is useless until it is trained. Pass calibration=batches for the "
    "least-squares start"
)


def warn_of_random_stitches() -> None:
    """Warn whoever called `from_anchors` or `from_path`."""
    warnings.warn(RANDOM_STITCH, stacklevel=7)


def load_parts(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, state: dict[str, Any], **options: Any
) -> Any:
    """A model from named tensors, or slices of safetensors files that are read only if the model has their place.

    Raises:
        ValueError: a tensor is missing or of another shape.
    """
    model, info = model_class.from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True, **options
    )
    problems = {
        kind: sorted(info[kind]) for kind in ("missing_keys", "mismatched_keys", "unexpected_keys") if info[kind]
    }
    if problems:
        raise ValueError(
            f"the anchors' tensors do not fit {model_class.__name__}: {problems}; expected complete checkpoints of "
            f"{config.model_type}. Load the anchors by themselves first to see whether they are whole"
        )
    model.config.name_or_path = model.name_or_path = ""  # transformers writes "None"
    return model


def prefix_map(device_map: Any) -> Any:
    """Where an anchor's first blocks go, run beside a model whose parts a `device_map` may name."""
    return "auto" if isinstance(device_map, dict) and "" not in device_map else device_map


def with_revision(hub: dict[str, Any], revision: str | None) -> dict[str, Any]:
    """Hub options with a revision, where there is one."""
    return hub if revision is None else hub | {"revision": revision}


@torch.no_grad()
def write_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter of a module in its own dtype, also where accelerate has offloaded it to memory or disk."""
    parameter = module.get_parameter(name)
    if not parameter.is_meta:
        parameter.copy_(value)
        return
    hook: Any = module._hf_hook
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    (weights,) = (one.weights_map for one in hooks if one.weights_map is not None)
    weights.dataset.state_dict[f"{weights.prefix}{name}"] = value.to(device="cpu", dtype=parameter.dtype)
