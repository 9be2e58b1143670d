"""Tiny random image classifiers of every kind, and the reference that stitched ones are compared with.

The reference runs the two whole models of transformers and moves hidden states between them by hooks. It shares no
code with the package: the lists of blocks here are found in the modules, not from the configuration.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.levit.modeling_levit import LevitAttention, LevitAttentionSubsample

from klas_hf import Stitch, StitchedForImageClassification, StitchedModel
from klas_hf.paths import Path

CLASSES = 5
LABELS = {number: name for number, name in enumerate(["ant", "bee", "cat", "dog", "elk"])}

_SMALL_TOKENS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_LARGE_TOKENS = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 64}
_GRID_4 = {"image_size": 32, "patch_size": 8}
_SWIN = {"image_size": 32, "patch_size": 4, "window_size": 2}
_LEVIT = {"image_size": 64, "key_dim": [8, 8, 8], "num_attention_heads": [1, 2, 2]}
_CONVNEXT = {"image_size": 32, "num_stages": 2, "layer_scale_init_value": 0.5}

# (class, settings of the small model, settings of the large one)
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", _GRID_4 | _SMALL_TOKENS, _GRID_4 | _LARGE_TOKENS),
    "deit": ("DeiTForImageClassification", _GRID_4 | _SMALL_TOKENS, _GRID_4 | _LARGE_TOKENS),
    "deit_teacher": ("DeiTForImageClassificationWithTeacher", _GRID_4 | _SMALL_TOKENS, _GRID_4 | _LARGE_TOKENS),
    "dinov2": ("Dinov2ForImageClassification", _GRID_4 | _SMALL_TOKENS, _GRID_4 | _LARGE_TOKENS),
    "swin": (
        "SwinForImageClassification",
        _SWIN | {"embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2]},
        _SWIN | {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 3]},
    ),
    "swinv2": (
        "Swinv2ForImageClassification",
        _SWIN | {"embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2]},
        _SWIN | {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 3]},
    ),
    "levit": (
        "LevitForImageClassification",
        _LEVIT | {"hidden_sizes": [16, 24, 32], "depths": [1, 2, 1]},
        _LEVIT | {"hidden_sizes": [32, 40, 48], "depths": [2, 2, 2]},
    ),
    "levit_teacher": (
        "LevitForImageClassificationWithTeacher",
        _LEVIT | {"hidden_sizes": [16, 24, 32], "depths": [1, 2, 1]},
        _LEVIT | {"hidden_sizes": [32, 40, 48], "depths": [2, 2, 2]},
    ),
    "resnet": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1], "layer_type": "basic"},
        {"embedding_size": 8, "hidden_sizes": [12, 24], "depths": [2, 2], "layer_type": "basic"},
    ),
    "bottleneck": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 1], "layer_type": "bottleneck"},
        {"embedding_size": 8, "hidden_sizes": [32, 64], "depths": [2, 2], "layer_type": "bottleneck"},
    ),
    "convnext": (
        "ConvNextForImageClassification",
        _CONVNEXT | {"hidden_sizes": [8, 16], "depths": [1, 2]},
        _CONVNEXT | {"hidden_sizes": [12, 24], "depths": [2, 2]},
    ),
    "mobilenet_v1": (
        "MobileNetV1ForImageClassification",
        {"image_size": 32, "depth_multiplier": 0.125, "min_depth": 4, "tf_padding": True},
        {"image_size": 32, "depth_multiplier": 0.25, "min_depth": 4, "tf_padding": True},
    ),
}
SIDE = {kind: 64 if kind.startswith("levit") else 32 for kind in KINDS}
PREFIX = {"vit": 1, "deit": 2, "dinov2": 1}


def tiny_config(kind: str, *, large: bool = False, **changes: Any) -> PreTrainedConfig:
    """The small or the large configuration of a kind."""
    name, *settings = KINDS[kind]
    labels = {"id2label": LABELS, "label2id": {label: number for number, label in LABELS.items()}}
    if "num_labels" in changes:
        labels = {}
    config_class = CONFIG_MAPPING[getattr(transformers, name).config_class.model_type]
    return config_class(**{"architectures": [name]} | labels | settings[large] | changes)


def tiny_classifier(kind: str, *, large: bool = False, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random classifier in eval mode, in float64; no weight nor BatchNorm statistic is at a special value."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    config = tiny_config(kind, large=large, **changes)
    model = getattr(transformers, KINDS[kind][0])(config).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean += 0.2 * torch.randn(module.running_mean.shape, generator=generator)
                module.running_var *= 0.5 + torch.rand(module.running_var.shape, generator=generator)
    return model


def tiny_pair(source: str, target: str | None = None, **changes: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A small source and a large target; `changes` are made to both."""
    large = tiny_classifier(target or source, large=True, seed=2, **changes)
    return tiny_classifier(source, seed=1, **changes), large


def images(kind: str, count: int = 2, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random pixels `(count, 3, side, side)`, of the side that the tiny models of a kind are for."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, SIDE[kind], SIDE[kind], generator=generator, dtype=torch.float64).to(dtype)


def small_resnet() -> PreTrainedModel:
    """One whose third stage lies on a grid of 4 × 4 for images of 64 pixels, as LeViT's first."""
    return tiny_classifier("resnet", embedding_size=4, hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1])


def middle(kind: str) -> tuple[PreTrainedModel, PreTrainedModel, tuple[int, int]]:
    """Anchors, and a stitch that leaves out blocks of both."""
    source, target = tiny_pair(kind)
    every = [(i, j) for i, j in possible(source, target, images(kind)) if i < len(blocks(source)) and j > 0]
    return source, target, every[len(every) // 2]


@torch.no_grad()
def logits(model: PreTrainedModel, pixels: Tensor) -> Tensor:
    return model(pixels).logits


def values(tensor: Tensor) -> tuple[float, ...]:
    """By which a tensor is known where it may have another name."""
    return tuple(tensor.double().flatten().tolist())


def tensors_in(folder: FilePath) -> dict[str, Tensor]:
    """All tensors of a saved model, by their names in its files."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def sized(kind: str) -> dict[str, Any]:
    """ResNet's configuration has no image size, so it is for 224 pixels unless told otherwise."""
    return {"image_size": SIDE[kind]} if kind in ("resnet", "bottleneck") else {}


def body(model: PreTrainedModel) -> nn.Module:
    """The model without its head."""
    return model.get_submodule(model.config.model_type)


def embedding(model: PreTrainedModel) -> nn.Module:
    """What comes before the first block."""
    base = body(model)
    names = {"levit": "patch_embeddings", "resnet": "embedder", "mobilenet_v1": "conv_stem"}
    return base.get_submodule(names.get(model.config.model_type, "embeddings"))


def stages(model: PreTrainedModel) -> list[list[list[nn.Module]]]:
    """The modules that each block of each stage runs, in order."""
    kind, base = model.config.model_type, body(model)
    if kind in ("vit", "deit"):
        return [[[layer] for layer in base.layers]]
    if kind == "dinov2":
        return [[[layer] for layer in base.encoder.layer]]
    if kind == "resnet":
        return [[[layer] for layer in stage.layers] for stage in base.encoder.stages]
    return {"swin": _swin, "swinv2": _swin, "convnext": _convnext, "levit": _levit, "mobilenet_v1": _mobilenet}[kind](
        base
    )


def _swin(base: nn.Module) -> list[list[list[nn.Module]]]:
    found, entry = [], []
    for layer in base.encoder.layers:
        found.append([[block] for block in layer.blocks])
        found[-1][0] = entry + found[-1][0]
        entry = [layer.downsample]
    return found


def _convnext(base: nn.Module) -> list[list[list[nn.Module]]]:
    found = [[[layer] for layer in stage.layers] for stage in base.encoder.stages]
    for stage, blocks in zip(base.encoder.stages, found, strict=True):
        blocks[0] = [*stage.downsampling_layer, *blocks[0]]
    return found


def _levit(base: nn.Module) -> list[list[list[nn.Module]]]:
    """An attention with the MLP after it; one that subsamples begins a stage together with the next attention."""
    found: list[list[list[nn.Module]]] = [[]]
    entering = False
    for layer in (layer for stage in base.encoder.stages for layer in stage.layers):
        if isinstance(layer, LevitAttentionSubsample):
            found.append([[layer]])
            entering = True
        elif isinstance(layer.module, LevitAttention) and not entering:
            found[-1].append([layer])
        else:
            found[-1][-1].append(layer)
            entering = entering and not isinstance(layer.module, LevitAttention)
    return found


def _mobilenet(base: nn.Module) -> list[list[list[nn.Module]]]:
    found: list[list[list[nn.Module]]] = [[]]
    for depthwise, pointwise in zip(base.layer[::2], base.layer[1::2], strict=True):
        if depthwise.convolution.stride == (2, 2):
            found.append([])
        found[-1].append([depthwise, pointwise])
    return found


def blocks(model: PreTrainedModel) -> list[list[nn.Module]]:
    """The modules that each block runs, in order."""
    return [block for stage in stages(model) for block in stage]


@torch.no_grad()
def outputs(model: PreTrainedModel, pixels: Tensor) -> tuple[list[Tensor], Tensor]:
    """Output of the embedding and of each block, and the logits, from one forward of the whole model with hooks."""
    kept: dict[int, Tensor] = {}
    ends = [embedding(model), *(block[-1] for block in blocks(model))]

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        kept[ends.index(module)] = _first(output)

    handles = [module.register_forward_hook(keep) for module in ends]
    try:
        logits = model(pixels).logits
    finally:
        for handle in handles:
            handle.remove()
    assert list(kept) == list(range(len(ends)))  # they ran in this order
    return [kept[number] for number in range(len(ends))], logits


def grid(model: PreTrainedModel, hidden: Tensor) -> tuple[int, int]:
    """(height, width) of a map, or of square tokens."""
    if hidden.ndim == 4:
        return hidden.shape[-2], hidden.shape[-1]
    positions = hidden.shape[1] - PREFIX.get(model.config.model_type, 0)
    side = round(positions**0.5)
    assert side * side == positions
    return side, side


def possible(source: PreTrainedModel, target: PreTrainedModel, pixels: Tensor) -> list[tuple[int, int]]:
    """All stitches (i, j) between equal grids."""
    first, last = outputs(source, pixels[:1])[0], outputs(target, pixels[:1])[0]
    return [
        (i, j)
        for i in range(1, len(first))
        for j in range(len(last) - 1)
        if grid(source, first[i]) == grid(target, last[j])
    ]


def as_rows(model: PreTrainedModel, hidden: Tensor, *, bare: bool) -> Tensor:
    """`(batch, positions, channels)`; class tokens are left out if `bare`."""
    if hidden.ndim == 4:
        return hidden.flatten(2).transpose(1, 2)
    return hidden[:, PREFIX.get(model.config.model_type, 0) :] if bare else hidden


def reference_logits(
    source: PreTrainedModel,
    target: PreTrainedModel,
    stitch: tuple[int, int],
    weight: Tensor,
    bias: Tensor | None,
    pixels: Tensor,
) -> Tensor:
    """What the stitched model of two anchors should give: `path_logits` for two slices."""
    return path_logits([source, target], Stitch(*stitch).path, [(weight, bias)], pixels)


@torch.no_grad()
def path_logits(
    anchors: Sequence[PreTrainedModel],
    path: Path,
    maps: Sequence[tuple[Tensor, Tensor | None]],
    pixels: Tensor,
) -> Tensor:
    """What a path should give, from hooks on the whole anchors: `(batch, labels)`.

    Every slice is a forward of its whole anchor, in which what enters its first block (or the head) is replaced by the
    mapped output of the slice before.
    """
    return path_outputs(anchors, path, maps, pixels)[1]


@torch.no_grad()
def path_outputs(
    anchors: Sequence[PreTrainedModel],
    path: Path,
    maps: Sequence[tuple[Tensor, Tensor | None]],
    pixels: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """What leaves every slice, and the logits, as in `path_logits`; where there are fewer maps, so many slices run."""
    bounds = path.bounds([len(blocks(anchor)) for anchor in anchors])[: len(maps) + 1]
    left: list[Tensor] = []
    logits = pixels
    for number, (place, start, stop) in enumerate(bounds):
        anchor, handles = anchors[place], []
        if number:
            entry = partial(_mapped, anchors[bounds[number - 1][0]], anchor, left[-1], *maps[number - 1])
            if start < len(blocks(anchor)):
                first = blocks(anchor)[start][0]
                handles.append(first.register_forward_pre_hook(partial(_replace_input, entry), with_kwargs=True))
            else:
                handles.append(blocks(anchor)[-1][-1].register_forward_hook(partial(_replace_output, entry)))
        try:
            hidden, logits = outputs(anchor, pixels)
        finally:
            for handle in handles:
                handle.remove()
        left.append(hidden[stop])
    return left, logits


def _mapped(
    source: PreTrainedModel, target: PreTrainedModel, hidden: Tensor, weight: Tensor, bias: Tensor | None, old: Tensor
) -> Tensor:
    rows = as_rows(source, hidden, bare=target.config.model_type not in PREFIX) @ weight.flatten(1).T
    rows = rows if bias is None else rows + bias
    new = rows.transpose(1, 2).reshape(old.shape) if old.ndim == 4 else rows
    assert new.shape == old.shape
    return new


def _replace_input(
    entry: Callable[[Tensor], Tensor], module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    if not args:
        return args, kwargs | {"hidden_states": entry(kwargs["hidden_states"])}
    return (entry(args[0]), *args[1:]), kwargs


def _replace_output(entry: Callable[[Tensor], Tensor], module: nn.Module, args: tuple, output: Any) -> Any:
    return (entry(output[0]), *output[1:]) if isinstance(output, tuple) else entry(output)


def sample_paths(anchors: Sequence[PreTrainedModel], pixels: Tensor) -> list[Path]:
    """Paths of one slice, of three and more of two anchors, with blocks repeated, and with an empty last slice."""
    small, large = anchors
    depths = len(blocks(small)), len(blocks(large))
    across, back = possible(small, large, pixels), possible(large, small, pixels)
    found = ["1[:]", f"1[:{depths[1]}] 1[{depths[1]}:]", f"0[:{depths[0]}] 1[{depths[1]}:]"]
    for i, j in across[:: max(len(across) // 2, 1)]:
        # on in the large anchor for a block, and over one of it or back to it again
        if j + 1 < depths[1]:
            onward = [n for n in range(depths[1] + 1) if possible_at(large, pixels, j + 1, n)]
            found += [f"0[:{i}] 1[{j}:{j + 1}] 1[{onward[0]}:]", f"0[:{i}] 1[{j}:{j + 1}] 1[{onward[-1]}:]"]
        found += [f"1[:{k}] 0[{start}:{i}] 1[{j}:]" for k, start in back if start < i][:2]
    late = [stitch for stitch in across if stitch[0] == depths[0]]
    if back and late:  # in the first stage, and in the last
        found.append(f"1[:{back[0][0]}] 0[{back[0][1]}:{depths[0]}] 1[{late[-1][1]}:]")
    return [Path.parse(text) for text in dict.fromkeys(found)]


def possible_at(model: PreTrainedModel, pixels: Tensor, one: int, other: int) -> bool:
    """Whether the outputs of two blocks of a model lie on one grid."""
    hidden, _ = outputs(model, pixels[:1])
    return grid(model, hidden[one]) == grid(model, hidden[other])


def randomise_stitch(layer: nn.Module, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """Give a stitching layer weights that keep the scale of hidden states, and a bias; both are returned."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        width = layer.weight.shape[1]
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / width**0.5)
        if layer.bias is not None:
            layer.bias.copy_(0.3 * torch.randn(layer.bias.shape, generator=generator))
    return layer.weight.detach(), None if layer.bias is None else layer.bias.detach()


def tiny_stitched(
    source: PreTrainedModel, target: PreTrainedModel, stitch: tuple[int, int], **options: Any
) -> StitchedForImageClassification:
    """The stitched model of two tiny anchors, with a random stitching layer of sound scale."""
    sides = {side for name, side in SIDE.items() for one in (source, target) if KINDS[name][0] == type(one).__name__}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the stitching layer is random")
        model = StitchedModel.from_anchors(source, target, stitch, **{"image_size": max(sides)} | options)
    for number, layer in enumerate(model.stitching_layers()):
        randomise_stitch(layer, number)
    return model


def tiny_path(anchors: Sequence[PreTrainedModel], path: Path | str, **options: Any) -> StitchedForImageClassification:
    """The model of a path through tiny anchors, with random stitching layers of sound scale."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the stitching layer is random")
        model = StitchedModel.from_path(anchors, path, **options)
    for number, layer in enumerate(model.stitching_layers()):
        randomise_stitch(layer, number)
    return model


def maps_of(model: StitchedForImageClassification) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of every stitching layer."""
    return [(layer.weight.detach(), layer.bias.detach()) for layer in model.stitching_layers()]


def apply_block(model: PreTrainedModel, block: list[nn.Module], hidden: Tensor) -> Tensor:
    """Run a block of a whole model by itself."""
    for module in block:
        if model.config.model_type in ("swin", "swinv2"):
            hidden = _first(module(hidden, grid(model, hidden)))
        else:
            hidden = module(hidden)
    return hidden


def kept_tensors(model: PreTrainedModel, modules: list[nn.Module]) -> set[str]:
    """Names in the model's state of all tensors of these modules."""
    held = {id(tensor) for module in modules for tensor in module.state_dict(keep_vars=True).values()}
    return {name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in held}


def used_tensors(model: PreTrainedModel, start: int, stop: int, *, embed: bool, head: bool) -> set[str]:
    """Names in a whole model's state of what `blocks[start:stop]` hold, and the embedding, and the head."""
    of_blocks = [kept_tensors(model, block) for block in blocks(model)]
    of_embedding = kept_tensors(model, [embedding(model)])
    of_head = set(model.state_dict()) - of_embedding - set().union(*of_blocks)
    return set().union(*of_blocks[start:stop]) | (of_embedding if embed else set()) | (of_head if head else set())


def called(model: nn.Module, run: Callable[[], Any]) -> set[str]:
    """Names of the submodules that a forward runs."""
    seen: set[str] = set()
    handles = [module.register_forward_pre_hook(lambda *_, name=name: seen.add(name)) for name, module in _named(model)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if name)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
