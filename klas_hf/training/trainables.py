"""What learns: the stitching layers alone, these with LoRA on the anchors, a head or all but a head, or everything.

A stitching layer that learns at a low rank (SN-Net v2) stays at its least-squares start, W, and trains as W + B A.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, AdamW, Optimizer
from transformers import PreTrainedModel

from klas_hf.anchors.dense import dense_head, is_dense
from klas_hf.training.config import TrainingConfig
from klas_hf.training.muon import MuonWithAdamW, hidden_matrices

# Matrices by their shape, but positions, tokens and offsets by what they are: DeiT and Swin do not decay them.
_UNDECAYED = re.compile(r"position_embeddings|\w+_token|\w+_bias_table|attention_biases")


@contextmanager
def made_trainable(model: PreTrainedModel, config: TrainingConfig) -> Iterator[nn.Module]:
    """The model prepared for training; afterwards LoRA is merged and dtypes and flags are as they were.

    Raises:
        ValueError: the model has no stitching layer to train, or no head of its own.
    """
    rank = config.low_rank_stitches
    if config.trainable == "head" and (rank or not any(map(is_head, dict(model.named_parameters())))):
        raise ValueError(
            f"got trainable='head' and low_rank_stitches={rank} for {type(model).__name__}; expected a "
            "KANForImageClassification with a dense head, and no low_rank_stitches; or trainable='full'"
        )
    if (config.trainable == "stitch" or rank) and not stitching_layers(model):
        asked = "trainable='stitch'" if config.trainable == "stitch" else f"low_rank_stitches={rank}"
        raise ValueError(
            f"got {asked} for {type(model).__name__}, which has no stitching layer; expected a stitched model, or "
            "trainable='lora' or 'full' without low_rank_stitches"
        )
    if config.trainable == "backbone" and not is_dense(model):
        raise ValueError(
            f"got trainable='backbone' for {type(model).__name__}, which is no dense model; expected a segmentation "
            "model, or trainable='full'"
        )
    dtypes = {name: tensor.dtype for name, tensor in _tensors(model)}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    was_training = model.training
    layers = stitching_layers(model) | {name: one for name, one in model.named_modules() if _takes_lora(one)}
    prepared: nn.Module = model
    try:
        if config.mixed_precision == "no":
            for _, tensor in _tensors(model):
                tensor.data = _at_least_fp32(tensor)
        prepared = _prepared(model, config)
        for parameter in prepared.parameters():
            if parameter.requires_grad:
                parameter.data = _at_least_fp32(parameter)
        prepared.train()
        if config.trainable == "backbone":  # a head that is frozen keeps its statistics too
            for name, layer in model.named_modules():
                if isinstance(layer, _BatchNorm) and not name.startswith(_backbone(model)):
                    layer.eval()
        yield prepared
    finally:
        if isinstance(prepared, PeftModel):
            prepared.merge_and_unload()
        else:  # PEFT may have raised with some layers wrapped
            for name, layer in layers.items():
                model.set_submodule(name, layer)
        # Each on its own: rotary buffers stay fp32 in a bf16 model, and model.to would round them.
        for name, tensor in _tensors(model):
            tensor.data = tensor.data.to(dtypes[name])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
        model.train(was_training)


def is_stitching(name: str) -> bool:
    """Whether a module or parameter of this name belongs to a stitching layer."""
    return not {"joints", "lateral_joints"}.isdisjoint(name.split("."))


def is_head(name: str) -> bool:
    """Whether a parameter of this name belongs to the head of a KAN classifier."""
    return name.startswith("head.")


def stitching_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The innermost modules that hold the stitching layers' parameters, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if is_stitching(name) and next(module.parameters(recurse=False), None) is not None
    }


def lora_config(model: PreTrainedModel, config: TrainingConfig) -> LoraConfig:
    """LoRA on every linear layer and convolution but a language model's head, as far as `trainable` says.

    The stitching layers are trained whole, or at their own low rank (scale 1: their rate is the learning rate's
    business).
    """
    within = _backbone(model)
    heads = [one.get_output_embeddings() for one in model.modules() if isinstance(one, PreTrainedModel)]
    stitches, rank = stitching_layers(model), config.low_rank_stitches
    targets = [
        name
        for name, module in model.named_modules()
        if _takes_lora(module) and module not in heads and not is_stitching(name) and config.trainable == "lora"
        if name.startswith(within)
    ]
    low = [name for name, module in stitches.items() if rank and _takes_lora(module)]
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets + low,
        modules_to_save=(None if rank else list(stitches)) or None,
        rank_pattern={re.escape(name): rank for name in low},
        alpha_pattern={re.escape(name): rank for name in low},
    )


def parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict]:
    """The optimiser's groups: stitching layers at their own rate, weight decay on matrices only, what Muon takes."""
    hidden = hidden_matrices(model) if config.optimizer == "muon" else set()
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = is_stitching(name), _decays(name, parameter), parameter in hidden
            groups.setdefault(kind, []).append(parameter)
    rates = {True: config.stitch_learning_rate or config.learning_rate, False: config.learning_rate}
    return [
        {
            "params": parameters, "lr": rates[is_stitch], "weight_decay": config.weight_decay if decays else 0.0,
            "is_hidden": is_hidden,
        }
        for (is_stitch, decays, is_hidden), parameters in groups.items()
    ]  # fmt: skip


def optimizer_of(model: nn.Module, config: TrainingConfig) -> Optimizer:
    """The optimiser that the settings name."""
    groups = parameter_groups(model, config)
    if config.optimizer == "sgd":
        return SGD(groups, lr=config.learning_rate, momentum=config.momentum)
    return (MuonWithAdamW if config.optimizer == "muon" else AdamW)(groups, lr=config.learning_rate)


def _prepared(model: PreTrainedModel, config: TrainingConfig) -> nn.Module:
    """The model with its flags set, wrapped where LoRA is part of it."""
    rank = config.low_rank_stitches
    prepared: nn.Module = model
    if config.trainable == "lora" or rank:
        with torch.random.fork_rng(), warnings.catch_warnings():
            # PEFT asks transformers by a name that is going.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            torch.manual_seed(config.seed)
            prepared = get_peft_model(model, lora_config(model, config))
    if config.trainable == "lora":
        return prepared
    backbone = _backbone(model) if config.trainable == "backbone" else ""
    for name, parameter in prepared.named_parameters():
        if ".lora_" in name:
            continue
        learns = not rank if is_stitching(name) else config.trainable == "full" or (bool(backbone) and backbone in name)
        parameter.requires_grad_(is_head(name) if config.trainable == "head" else learns)
    return prepared


def _backbone(model: PreTrainedModel) -> str:
    """What the names of a dense model's backbone begin with; of other models, all names."""
    return f"{dense_head(model.config).backbone}." if is_dense(model) else ""


def _takes_lora(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and not _UNDECAYED.fullmatch(name.split(".")[-1])


def _at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.data.to(wide) if tensor.is_floating_point() else tensor.data


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
