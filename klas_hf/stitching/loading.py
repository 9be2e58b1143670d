"""Loading a model whose tensors come from several checkpoints."""

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from klas_hf.processes import others_bars

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
    with others_bars():
        model, info = model_class.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )  # it says which they are; otherwise transformers raises, and does not
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


def fill_from(
    model: PreTrainedModel, like: PreTrainedModel, device: torch.device, dtype: torch.dtype, copied: bool
) -> None:
    """Give an unallocated model the tensors of another, or copies of them."""
    known: dict[int, Tensor] = {}  # tied ones have two names

    def moved(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        if tensor.data_ptr() not in known or not tensor.numel():
            dtype = dtype if tensor.is_floating_point() else None
            known[tensor.data_ptr()] = tensor.detach().to(device=device, dtype=dtype, copy=copied)
        return known[tensor.data_ptr()]

    state = like.state_dict()
    model.load_state_dict({name: moved(tensor, dtype) for name, tensor in state.items()}, assign=True)
    for name, buffer in like.named_buffers():
        if name not in state:  # what no checkpoint keeps, such as rotary frequencies
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, moved(buffer, None))
    model.tie_weights()
