"""What learns: the stitching layer alone, that with LoRA on both sides, or everything."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from klas_hf.training.config import TrainingConfig

STITCH = "stitch"


@contextmanager
def made_trainable(model: PreTrainedModel, config: TrainingConfig) -> Iterator[nn.Module]:
    """The model prepared for training; afterwards LoRA is merged and dtypes and flags are as they were.

    Raises:
        ValueError: the model has no stitching layer to train.
    """
    has_stitch = any(name.split(".")[-1] == STITCH for name, _ in model.named_modules())
    if config.trainable == "stitch" and not has_stitch:
        raise ValueError(
            f"got trainable='stitch' for {type(model).__name__}, which has no stitching layer; expected a stitched "
            "model, or trainable='lora' or 'full'"
        )
    dtypes = {name: tensor.dtype for name, tensor in _tensors(model)}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    was_training = model.training
    if config.mixed_precision == "no":
        model.float()
    prepared: nn.Module = model
    if config.trainable == "lora":
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            prepared = get_peft_model(model, lora_config(model, config))
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(config.trainable == "full" or STITCH in name.split("."))
    for parameter in prepared.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    try:
        yield prepared.train()
    finally:
        if isinstance(prepared, PeftModel):
            prepared.merge_and_unload()
        # Each on its own: rotary buffers stay fp32 in a bf16 model, and model.to would round them.
        for name, tensor in _tensors(model):
            tensor.data = tensor.data.to(dtypes[name])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
        model.train(was_training)


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def lora_config(model: PreTrainedModel, config: TrainingConfig) -> LoraConfig:
    """LoRA on every linear layer but the head; the stitching layer, where there is one, is trained whole."""
    head = model.get_output_embeddings()
    stitches = [name for name, _ in model.named_modules() if name.split(".")[-1] == STITCH]
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and name.split(".")[-1] != STITCH
    ]
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        modules_to_save=stitches or None,
    )


def parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict]:
    """AdamW groups: the stitching layer at its own rate, weight decay on matrices only."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((STITCH in name.split("."), parameter.ndim > 1), []).append(parameter)
    rates = {True: config.stitch_learning_rate or config.learning_rate, False: config.learning_rate}
    return [
        {"params": parameters, "lr": rates[is_stitch], "weight_decay": config.weight_decay if is_matrix else 0.0}
        for (is_stitch, is_matrix), parameters in groups.items()
    ]
