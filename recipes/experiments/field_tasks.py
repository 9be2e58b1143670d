"""What a model is measured on where it is compared as others publish: the harness's tasks, perplexity, its speed."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import exp
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from klas_hf.anchors.weights import evaluating
from klas_hf.costs.measured import device_name
from klas_hf.costs.timing import Timed, time_parts
from klas_hf.data.text import TextBatches, held_out, python_documentation, text_windows
from klas_hf.evaluation import Measurement, predict_sequences
from klas_hf.processes import process_state

PREFIX = "perplexity_"
C4_FILE, C4_TEXTS, C4_WINDOWS = "en/c4-validation.00000-of-00008.json.gz", 1100, 256


@dataclass(frozen=True)
class FieldTask:
    """One thing that is measured of every model, a row each.

    Attributes:
        name: what it is called in tables.
        about: all that its figures depend on beside the model, as JSON values.
        measure: figures of a model; the details hold `items`, its documents and each metric's value on each of them,
            where two models can be compared pair by pair, and `higher_is_better` by metric.
        source: Hub id, configuration and split of its data; empty for what has none.
    """

    name: str
    about: Mapping[str, Any]
    measure: Callable[[PreTrainedModel], Measurement]
    source: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PerplexityText:
    """A text that perplexity is measured on.

    Attributes:
        load: reads it, its data set taken from the place given.
        source: Hub id, configuration and split.
        windows: at most so many of them; None: all.
    """

    load: Callable[[str], str]
    source: Mapping[str, Any]
    windows: int | None = None


def _wikitext2(place: str) -> str:
    from datasets import load_dataset

    return "\n\n".join(load_dataset(place, "wikitext-2-raw-v1", split="test")["text"])


def _c4(place: str) -> str:
    from datasets import load_dataset

    rows = load_dataset(place, data_files={"validation": C4_FILE}, split="validation")
    return " ".join(rows[:C4_TEXTS]["text"])


def _documentation(_: str) -> str:
    return "\n\n".join(held_out(python_documentation())[1])


# As in the code of SparseGPT (IST-DASLab/sparsegpt, datautils.py) and Wanda (locuslab/wanda, lib/data.py): of
# WikiText-2 the whole test split, of C4 the first 1,100 texts of the first validation file, cut off after 256 windows.
TEXTS = {
    "perplexity_wikitext2": PerplexityText(
        _wikitext2, {"dataset": "Salesforce/wikitext", "configuration": "wikitext-2-raw-v1", "split": "test"}
    ),
    "perplexity_c4": PerplexityText(
        _c4, {"dataset": "allenai/c4", "configuration": "en", "split": "validation"}, C4_WINDOWS
    ),
    "perplexity_documentation": PerplexityText(
        _documentation, {"dataset": "Python's documentation", "split": "every tenth text"}
    ),
}  # fmt: skip


def perplexity_tasks(
    names: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int,
    batch_size: int,
    copies: Mapping[str, str],
    limit: int | None = None,
) -> tuple[list[FieldTask], dict[str, str]]:
    """Perplexity on some of `TEXTS`: the exponential of the mean loss over all tokens of windows but the first of each.

    Args:
        window: tokens; the papers' is 2,048.
        copies: Hub id → local folder that is read in its place.
        limit: at most so many windows.

    Returns:
        The tasks, and name → why it cannot be measured, for those whose text cannot be had.

    Raises:
        ValueError: an unknown name.
    """
    tasks, missing = [], {}
    for name in names:
        if name not in TEXTS:
            raise ValueError(f"got the task {name!r}; expected one of {', '.join(TEXTS)}, or a task of the harness")
        text = TEXTS[name]
        place = copies.get(text.source["dataset"], text.source["dataset"])
        count = min((one for one in (text.windows, limit) if one is not None), default=None)
        try:
            windows = text_windows(text.load(place), tokenizer, window, count=count)
        except (OSError, ValueError) as error:
            missing[name] = unreachable(text.source["dataset"], error)
            continue
        about = {"task": name, "window": window, "windows": len(windows), "tokens_sha": digest(windows)}
        tasks.append(FieldTask(name, about, _perplexity(windows, batch_size), text.source))
    return tasks, missing


def _perplexity(windows: list[list[int]], batch_size: int) -> Callable[[PreTrainedModel], Measurement]:
    def measure(model: PreTrainedModel) -> Measurement:
        losses, _, labels = predict_sequences(model, TextBatches(windows, batch_size))
        loss = float(np.average(losses, weights=labels))
        items = {"documents": digest(windows), "values": {"perplexity": losses.tolist()}}  # compared in nats
        better = {"perplexity": False, "loss": False}
        return Measurement({"perplexity": exp(loss), "loss": loss}, {"items": items, "higher_is_better": better})

    return measure


def speed_task(prompt: int) -> FieldTask:
    """Seconds to the first token of a prompt and for each further one, and bytes of weights, on this device."""

    def measure(model: PreTrainedModel) -> Measurement:
        ids = torch.ones(1, prompt, dtype=torch.long, device=model.device)
        with evaluating(model):
            (times,) = time_parts([Timed(model, (), {"input_ids": ids})])
        seconds, per_token = sum(times.seconds), sum(times.token_seconds)
        return Measurement({"first_token": seconds, "per_token": per_token, "bytes": weight_bytes(model)})

    about = {"task": "speed", "prompt": prompt, "device": device_name(process_state().device)}
    return FieldTask("speed", about, measure)


def weight_bytes(model: PreTrainedModel) -> float:
    """Bytes of all weights, scales of quantised ones included, each tensor once.

    Of 4 bits are counted 4, though torchao holds them in a byte each where no kernel reads them packed.
    """
    return float(sum(_bytes(parameter.data) for parameter in model.parameters()))


def _bytes(tensor: torch.Tensor) -> int:
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.numel() * tensor.element_size()
    names, about = tensor.__tensor_flatten__()  # a quantised one is made of several
    few = 2 if about.get("target_dtype") is torch.int4 else 1
    return sum(_bytes(getattr(tensor, name)) // (few if name == "qdata" else 1) for name in names)


def unreachable(dataset: str, error: Exception) -> str:
    """What to tell where a data set cannot be had, and what mends it."""
    told = " ".join(str(error).split())
    if isinstance(error, ImportError):
        return f'{told}. Install that package: pip install "klas_hf[evaluation]" has what the published tasks need'
    return (
        f"{told}. Pass a local copy of {dataset}: --copies {dataset}=FOLDER (hf download --repo-type dataset makes one)"
    )


def digest(value: Any) -> str:
    """The first 16 digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
