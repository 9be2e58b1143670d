"""Small stitched models, and data that they learn from, for the tests with the stock libraries of the ecosystem."""

import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tiny_models import randomise_joints, tiny_model, token_ids
from tiny_vision import images, tiny_pair, tiny_stitched
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from klas_hf import StitchedForCausalLM, StitchedForImageClassification, StitchedModel

PATH = "0[:2] 1[1:2] 1[4:]"
# All slices with one shape of keys and values, and with different ones.
KV_SHAPES: dict[str, dict[str, Any]] = {"equal": {"head_dim": 8, "num_key_value_heads": 2}, "unequal": {}}


def anchors(
    kv_shapes: str = "unequal", families: tuple[str, str] = ("llama", "llama")
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two language models, of widths 32 and 48."""
    shape = KV_SHAPES[kv_shapes]
    source = tiny_model(families[0], seed=1, hidden_size=32, intermediate_size=40, **shape)
    return source, tiny_model(families[1], seed=2, large=True, **shape)


def stitched_lm(
    kv_shapes: str = "unequal", families: tuple[str, str] = ("llama", "llama"), **options: Any
) -> StitchedForCausalLM:
    """Two blocks of the source and two slices of the target, joined by random layers that keep the scale."""
    return joined(anchors(kv_shapes, families), **options)


def tied_lm() -> StitchedForCausalLM:
    """Three blocks of one anchor, whose head is its embedding."""
    return joined(anchors(), "1[:2] 1[4:]")


def joined(pair: tuple[PreTrainedModel, PreTrainedModel], path: str = PATH, **options: Any) -> StitchedForCausalLM:
    """The first two blocks of one language model, the second and the last of one of five; or another path."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the stitching layer is random")
        model = StitchedModel.from_path(pair, path, **options)
    randomise_joints(model)
    return model


def stitched_classifier(
    source: str = "vit", target: str | None = None, **changes: Any
) -> StitchedForImageClassification:
    """A stitched image classifier in float32 (the tiny anchors are in float64); `changes` are made to both anchors."""
    return tiny_stitched(*tiny_pair(source, target, **changes), (1, 1), dtype=torch.float32)


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def inputs_of(model: PreTrainedModel, seed: int = 0) -> dict[str, Tensor]:
    """Two sequences, or two images of the size that the tiny classifiers take."""
    if model.main_input_name == "input_ids":
        return {"input_ids": token_ids(2, 9, seed=seed)}
    return {"pixel_values": images("vit", seed=seed, dtype=torch.float32)}


@torch.no_grad()
def logits_of(model: PreTrainedModel, seed: int = 0) -> Tensor:
    model.eval()
    base = model if isinstance(model, PreTrainedModel) else model.get_base_model()
    return model(**inputs_of(base, seed)).logits


def loss_of(model: PreTrainedModel) -> Tensor:
    """The loss of the same two examples each time, with gradients."""
    base = model if isinstance(model, PreTrainedModel) else model.get_base_model()
    inputs = inputs_of(base)
    labels = inputs["input_ids"] if "input_ids" in inputs else torch.tensor([1, 3])
    return model(**inputs, labels=labels).loss


def counting_text(count: int = 32, length: int = 12) -> Dataset:
    """Sequences in which each token is one more than the last, from 3 to 66 and around: easily learnt."""
    starts = torch.randint(0, 64, (count, 1), generator=torch.Generator().manual_seed(3))
    ids = 3 + (starts + torch.arange(length)) % 64
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def coloured_images(count: int = 32) -> list[dict[str, Any]]:
    """Images whose mean brightness tells their class, of five."""
    labels = torch.randint(0, 5, (count,), generator=torch.Generator().manual_seed(4)).tolist()
    noise = images("vit", count, dtype=torch.float32)
    return [{"pixel_values": 0.3 * one + label - 2, "labels": label} for one, label in zip(noise, labels, strict=True)]


class StopAt(TrainerCallback):
    """Breaks a run off, as a lost machine would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= self.step
        return control
