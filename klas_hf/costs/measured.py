"""What people pay for a path, from what each part of its anchors takes on their device.

Seconds are sums over parts and stitching layers, bytes of activations the most of any part. An anchor is measured once
for a device, a dtype, a usage and versions of the libraries; what was found is kept in the cache of Hugging Face
(`HF_HOME`), as numbers. Anchors that are measured together run in turn, all of them in memory with random weights.
"""

import copy
import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from klas_hf.anchors.families import decoder_family
from klas_hf.anchors.vision import is_vision
from klas_hf.budgets import Cost
from klas_hf.costs.timing import ROUNDS, PartTimes, Timed, time_joint, time_parts
from klas_hf.costs.usage import Usage
from klas_hf.files import write_atomically
from klas_hf.models.configuration_stitched_vision import StitchedVisionConfig
from klas_hf.models.vision_kinds import vision_kind
from klas_hf.rows import library_versions

Ends = tuple[int, int, int]  # of a stitching layer: width, width, positions of one item


@dataclass(frozen=True)
class PathTimes:
    """What the parts of some anchors take, and the stitching layers between them.

    Attributes:
        usage: how they run.
        dtype_bytes: of a number.
        parts: of each anchor.
        joints: seconds of a forward, and of one more token, by what a layer leads between.
        images: whether the anchors see images; a slice of a language model makes masks and positions of its own.
    """

    usage: Usage
    dtype_bytes: int
    parts: Sequence[PartTimes]
    joints: dict[Ends, tuple[float, float]]
    images: bool

    def add(self, cost: Cost, bounds: Sequence[tuple[int, int, int]], joints: Sequence[Ends], linears: int) -> Cost:
        """The cost of a path with its seconds and bytes.

        Args:
            bounds: (anchor, start, stop) of its slices.
            joints: its stitching layers.
            linears: weights of its blocks' linear layers.
        """
        seconds = self._sum("seconds", bounds) + sum(self.joints[one][0] for one in joints)
        tokens = (
            None if self.images else self._sum("token_seconds", bounds) + sum(self.joints[one][1] for one in joints)
        )
        used = [self._used("peak_bytes", bounds, number) for number in range(len(bounds))]
        passed = [self.usage.batch * self.dtype_bytes * one[2] * (one[0] + one[1]) for one in joints]
        return replace(
            cost,
            weight_bytes=weight_bytes(cost.parameters, linears, self.dtype_bytes, self.usage),
            seconds=seconds,
            token_seconds=tokens,
            peak_bytes=max([*(peak for part in used for peak in part), *passed]),
            batch=self.usage.batch,
        )

    def _sum(self, what: str, bounds: Sequence[tuple[int, int, int]]) -> float:
        return sum(sum(self._used(what, bounds, number)) for number in range(len(bounds)))

    def _used(self, what: str, bounds: Sequence[tuple[int, int, int]], number: int) -> list[Any]:
        """Of one slice, what each part takes that it runs."""
        place, start, stop = bounds[number]
        before, *blocks, after = getattr(self.parts[place], what)
        first = [before] if number == 0 or not self.images else []
        return [*first, *blocks[start:stop], *([after] if number == len(bounds) - 1 else [])]


def weight_bytes(parameters: int, linears: int, dtype_bytes: int, usage: Usage) -> int:
    """Bytes of weights, of which those of the blocks' linear layers may be quantised."""
    bits = 8 * dtype_bytes if usage.weight_bits is None else usage.weight_bits
    return round((parameters - linears) * dtype_bytes + linears * bits / 8)


def measure_times(
    configs: Sequence[PreTrainedConfig],
    layers: Sequence[tuple[Sequence[int], Sequence[int]]],
    dtype: torch.dtype,
    usage: Usage,
    size: tuple[int, int],
) -> PathTimes:
    """Time the parts of anchors, and every stitching layer that may lie between them.

    Args:
        configs: of the anchors.
        layers: of each, the widths and positions at the input of each block and after the last.
        size: (height, width) of images.
    """
    parts = _parts(configs, dtype, usage, size)
    images = is_vision(configs[0])
    ends = {
        (width, other, positions if images else usage.prompt)
        for widths, _ in layers
        for width in widths[1:]
        for others, places in layers
        for other, positions in zip(others, places, strict=True)
    }
    joints = {}
    for width, other, positions in sorted(ends):
        forward, token = (
            time_joint((width, other), usage.batch * count, dtype, usage.on) for count in (positions, 1)
        )  # fmt: skip
        joints[width, other, positions] = forward, token
    return PathTimes(usage, dtype.itemsize, parts, joints, images)


def measure_whole(model: PreTrainedModel | PreTrainedConfig, cost: Cost, usage: Usage, size: tuple[int, int]) -> Cost:
    """The cost of a model with its seconds and bytes, timed as it is; a configuration with random weights."""
    if not isinstance(model, PreTrainedModel):
        model = _random(model, model.dtype or torch.float32, usage)
    (found,), images = time_parts([Timed(model.eval(), [], _inputs(model, usage, size))]), cost.image_height > 0
    return replace(
        cost,
        weight_bytes=weight_bytes(cost.parameters, linear_weights(model), model.dtype.itemsize, usage),
        seconds=sum(found.seconds),
        token_seconds=None if images else sum(found.token_seconds),
        peak_bytes=max(found.peak_bytes),
        batch=usage.batch,
    )


def linear_weights(module: nn.Module) -> int:
    """Weights of the linear layers that quantisers change: not of heads and stitching layers."""
    kept = ("joints", "head", "embed_out", "classifier")
    found = [one for name, one in module.named_modules() if not any(word in name for word in kept)]
    return sum(one.weight.numel() for one in found if isinstance(one, nn.Linear))


def _parts(
    configs: Sequence[PreTrainedConfig], dtype: torch.dtype, usage: Usage, size: tuple[int, int]
) -> list[PartTimes]:
    """Measured before, or now, all together."""
    files = {_file(config, dtype, usage, size): config for config in configs}
    missing = {file: config for file, config in files.items() if not file.is_file()}
    models = [_random(config, dtype, usage) for config in missing.values()]
    found = time_parts([Timed(model, _blocks(model), _inputs(model, usage, size)) for model in models])
    for file, one in zip(missing, found, strict=True):
        write_atomically(file, partial(Path.write_text, data=json.dumps(asdict(one)), encoding="utf-8"))
    return [
        PartTimes(**json.loads(_file(config, dtype, usage, size).read_text(encoding="utf-8"))) for config in configs
    ]


def _file(config: PreTrainedConfig, dtype: torch.dtype, usage: Usage, size: tuple[int, int]) -> Path:
    """Where what an anchor takes is kept."""
    about = {
        "config": config.to_json_string(use_diff=False),
        "usage": asdict(replace(usage, weight_bits=None, device=None)),
        "device": device_name(usage.on),
        "dtype": str(dtype),
        "size": size,
        "versions": library_versions(),
        "method": ("freed memory is kept", ROUNDS),
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    return Path(constants.HF_HOME) / "klas_hf" / "times" / f"{digest}.json"


def device_name(device: torch.device) -> str:
    """What times depend on: the accelerator, or the processor and the threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{platform.node()} {platform.machine()}, {torch.get_num_threads()} threads"
    return f"{platform.node()} {device.type}"


def _random(config: PreTrainedConfig, dtype: torch.dtype, usage: Usage) -> PreTrainedModel:
    auto = AutoModelForCausalLM
    if isinstance(config, StitchedVisionConfig) or is_vision(config):
        auto = AutoModelForImageClassification
    with usage.on:
        return auto.from_config(copy.deepcopy(config), dtype=dtype).to(usage.on).eval()


def _blocks(model: PreTrainedModel) -> list[tuple[nn.Module, nn.Module]]:
    """The first and the last module of each block."""
    if not is_vision(model.config):
        blocks = model.base_model.get_submodule(decoder_family(model.config).blocks)
        return [(block, block) for block in blocks]
    names = [block.modules for block in vision_kind(model.config).blocks(model.config)]
    return [(model.get_submodule(one[0]), model.get_submodule(one[-1])) for one in names]


def _inputs(model: PreTrainedModel, usage: Usage, size: tuple[int, int]) -> dict[str, Tensor]:
    if model.main_input_name == "input_ids":
        return {"input_ids": torch.ones(usage.batch, usage.prompt, dtype=torch.long, device=model.device)}
    shape = (usage.batch, model.config.num_channels, *size)
    return {"pixel_values": torch.zeros(shape, dtype=model.dtype, device=model.device)}


def joints_between(bounds: Sequence[tuple[int, int, int]], widths: Any, positions: Any) -> list[Ends]:
    """The stitching layers of a path.

    Args:
        widths, positions: of each anchor, at the input of each block and after the last.
    """
    return [
        (widths[one][stop], widths[other][start], positions[other][start])
        for (one, _, stop), (other, start, _) in pairwise(bounds)
    ]
