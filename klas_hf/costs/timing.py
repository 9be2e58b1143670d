"""Seconds and bytes of a model's parts, measured once on the user's device: what is before its blocks, each, the rest.

The parts are timed inside the whole model by hooks, so that what a path takes is the sum of its parts' times. What is
timed are shapes, not values: random weights do, and an anchor's are not read.
"""

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

WARM, ROUNDS, STEPS = 2, 7, 8  # runs that do not count, runs that do, tokens written in each


@dataclass(frozen=True)
class PartTimes:
    """Medians for one model; each list is of what is before the blocks, of every block, and of what is after.

    Attributes:
        seconds: of one forward: over the prompt, or over the images.
        token_seconds: of one more token for each sequence; empty for images.
        peak_bytes: of tensors that live at once meanwhile, beside weights and cache.
    """

    seconds: Sequence[float]
    token_seconds: Sequence[float]
    peak_bytes: Sequence[int]


class _Clock:
    """Marks in the work of a device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.device.type == "cpu":
            self.marks.append(time.perf_counter())
        else:
            event = torch.Event(self.device, enable_timing=True)
            event.record()
            self.marks.append(event)

    def read(self) -> list[float]:
        """Seconds between the marks, which are forgotten."""
        marks, self.marks = self.marks, []
        if self.device.type == "cpu":
            return [after - before for before, after in zip(marks, marks[1:], strict=False)]
        torch.accelerator.synchronize(self.device)
        return [before.elapsed_time(after) / 1e3 for before, after in zip(marks, marks[1:], strict=False)]


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations have made and that are still there, and the most of them so far.

    What kernels take for themselves is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {one._cdata for one in _storages((args, kwargs))}
        made = func(*args, **kwargs or {})
        for storage in {one._cdata: one for one in _storages(made)}.values():
            if storage._cdata not in given:
                self.live += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return made

    def _gone(self, size: int) -> None:
        self.live -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [one.untyped_storage() for one in tree_leaves(values) if isinstance(one, Tensor)]


@torch.no_grad()
def time_parts(
    model: PreTrainedModel, blocks: Sequence[tuple[nn.Module, nn.Module]], inputs: Mapping[str, Tensor]
) -> PartTimes:
    """Time a model's parts.

    Args:
        model: on the device, in the dtype that it will run in.
        blocks: the first and the last module of each block, in their order; none: the whole model as one part.
        inputs: token ids or images, on the device.
    """
    clock, memory = _Clock(model.device), LiveBytes()
    forwards, decodes = [], []
    for number in range(WARM + ROUNDS):
        with _marked(blocks, clock.mark):
            cache = DynamicCache(config=model.config) if "input_ids" in inputs else None
            forward, decode = _round(model, inputs, cache, clock, STEPS if cache is not None else 0)
        if number >= WARM:
            forwards.append(forward)
            decodes += decode
    peaks: list[int] = []
    with memory, _marked(blocks, partial(_peak, memory, peaks)):
        _peak(memory, [])
        model(**inputs, **({"use_cache": False, "logits_to_keep": 1} if "input_ids" in inputs else {}))
        _peak(memory, peaks)
    return PartTimes(_medians(forwards), _medians(decodes), peaks)


def _round(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], cache: Any, clock: _Clock, steps: int
) -> tuple[list[float], list[list[float]]]:
    """Seconds of the parts in one forward over the inputs, and in so many steps of one token after them."""
    options: dict[str, Any] = {} if cache is None else {"past_key_values": cache, "logits_to_keep": 1}
    clock.mark()
    model(**inputs, **options)
    clock.mark()
    forward, decodes = clock.read(), []
    for _ in range(steps):
        clock.mark()
        model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache)
        clock.mark()
        decodes.append(clock.read())
    return forward, decodes


@contextmanager
def _marked(blocks: Sequence[tuple[nn.Module, nn.Module]], mark: Callable[[], None]) -> Iterator[None]:
    """A mark before each block and one after the last."""
    handles = [first.register_forward_pre_hook(lambda *_: mark()) for first, _ in blocks]
    if blocks:
        handles.append(blocks[-1][1].register_forward_hook(lambda *_: mark()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _peak(memory: LiveBytes, peaks: list[int]) -> None:
    """Note the most bytes since the last time."""
    peaks.append(memory.peak)
    memory.peak = memory.live


def _medians(rounds: Sequence[Sequence[float]]) -> list[float]:
    return [median(part) for part in zip(*rounds, strict=True)]


@torch.no_grad()
def time_checking(model: PreTrainedModel, prompt: int, most: int) -> tuple[float, ...]:
    """How many times longer reading 1 + n tokens takes than reading one, behind a prompt, for n from 0 to `most`."""
    clock, ids = _Clock(model.device), torch.ones(1, max(prompt, most + 1), dtype=torch.long, device=model.device)
    cache = DynamicCache()
    cache.layers.extend(DynamicLayer() for _ in range(model.config.num_hidden_layers))  # such as can be cropped
    model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    rounds = []
    for _ in range(WARM + ROUNDS):
        seconds = []
        for count in range(1, most + 2):
            clock.mark()
            model(input_ids=ids[:, :count], past_key_values=cache)
            clock.mark()
            seconds += clock.read()
            cache.crop(-count)
        rounds.append(seconds)
    medians = _medians(rounds[WARM:])
    return tuple(one / medians[0] for one in medians)


@torch.no_grad()
def time_joint(widths: tuple[int, int], positions: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of a stitching layer between two widths at so many positions in all."""
    layer = nn.Linear(*widths, dtype=dtype, device=device)
    hidden, clock = torch.zeros(positions, widths[0], dtype=dtype, device=device), _Clock(device)
    times = []
    for number in range(WARM + ROUNDS):
        clock.mark()
        layer(hidden)
        clock.mark()
        (seconds,) = clock.read()
        if number >= WARM:
            times.append(seconds)
    return median(times)
