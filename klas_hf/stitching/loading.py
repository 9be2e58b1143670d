"""Loading a model whose tensors come from several checkpoints."""

import warnings
from typing import Any

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
