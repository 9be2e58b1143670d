"""Seconds and bytes of a model's parts, measured once on the user's device: what is before its blocks, each, the rest.

The parts are timed inside the whole model by hooks, so that what a path takes is the sum of its parts' times. Models
that are to be compared run in turn, for machines grow faster and slower by the minute. What is timed are shapes, not
values: random weights do, and an anchor's are not read.
"""

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

WARM, ROUNDS, STEPS = 2, 12, 8  # runs that do not count, runs that do, tokens written in each
LARGEST = 31 * 2**20  # bytes: more than 32 MiB glibc never keeps


@dataclass(frozen=True)
class PartTimes:
    """What one model takes; each list is of what is before the blocks, of every block, and of what is after.

    Attributes:
        seconds: of one forward: over the prompt, or over the images.
        token_seconds: of one more token for each sequence; empty for images.
        peak_bytes: of tensors that live at once meanwhile, beside weights and cache.
    """

    seconds: Sequence[float]
    token_seconds: Sequence[float]
    peak_bytes: Sequence[int]


@dataclass(frozen=True)
class Timed:
    """A model to be timed.

    Attributes:
        model: on the device, in the dtype that it will run in.
        blocks: the first and the last module of each block, in their order; none: the whole model as one part.
        inputs: token ids or images, on the device.
    """

    model: PreTrainedModel
    blocks: Sequence[tuple[nn.Module, nn.Module]]
    inputs: Mapping[str, Tensor]


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
def time_parts(models: Sequence[Timed]) -> list[PartTimes]:
    """Time the parts of models, which run in turn, so that what slows the machine for a while slows all of them."""
    keep_freed_memory()
    forwards: list[list[list[float]]] = [[] for _ in models]
    decodes: list[list[list[float]]] = [[] for _ in models]
    for number in range(WARM + ROUNDS):
        for place, one in enumerate(models):
            forward, decode = _round(one)
            if number >= WARM:
                forwards[place].append(forward)
                decodes[place] += decode
    return [
        PartTimes(usual(forward), usual(decode), _peaks(one))
        for forward, decode, one in zip(forwards, decodes, models, strict=True)
    ]


def keep_freed_memory() -> None:
    """Free a large tensor, as most processes do sooner or later: from then on memory that is freed is used again.

    glibc takes every tensor from the system that is larger than any it has freed before, up to 32 MiB, and gives it
    back (M_MMAP_THRESHOLD in mallopt(3)). Until then a prompt's activations are paged in anew in every forward: of 128
    tokens at width 768, 9,000 page faults and an eighth more time (LOG.md).
    """
    torch.empty(LARGEST, dtype=torch.uint8)


def usual(rounds: Sequence[Sequence[float]]) -> list[float]:
    """What parts take in the middle half of the rounds by what all parts take: means, so that they add up.

    Example:
        >>> usual([[1, 2], [2, 3], [9, 9], [0, 1]])
        [1.5, 2.5]
    """
    order, cut = sorted(rounds, key=sum), len(rounds) // 4
    return [fmean(part) for part in zip(*order[cut : len(order) - cut], strict=True)]


def _round(timed: Timed) -> tuple[list[float], list[list[float]]]:
    """Seconds of the parts in one forward over the inputs, and of text in some steps of one token after them."""
    model, inputs, clock = timed.model, timed.inputs, _Clock(timed.model.device)
    cache = DynamicCache(config=model.config) if "input_ids" in inputs else None
    options: dict[str, Any] = {} if cache is None else {"past_key_values": cache, "logits_to_keep": 1}
    with _marked(timed.blocks, clock.mark):
        clock.mark()
        model(**inputs, **options)
        clock.mark()
        forward, decodes = clock.read(), []
        for _ in range(STEPS if cache is not None else 0):
            clock.mark()
            model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache)
            clock.mark()
            decodes.append(clock.read())
    return forward, decodes


def _peaks(timed: Timed) -> list[int]:
    """Most bytes of tensors that live at once, in each part of one forward."""
    memory, peaks, options = LiveBytes(), list[int](), dict[str, Any]()
    if "input_ids" in timed.inputs:
        options = {"use_cache": False, "logits_to_keep": 1}
    with memory, _marked(timed.blocks, partial(_peak, memory, peaks)):
        _peak(memory, [])
        timed.model(**timed.inputs, **options)
        _peak(memory, peaks)
    return peaks


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


@torch.no_grad()
def time_checking(model: PreTrainedModel, prompt: int, most: int) -> tuple[float, ...]:
    """How many times longer reading 1 + n tokens takes than reading one, behind a prompt, for n from 0 to `most`."""
    keep_freed_memory()
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
    seconds = usual(rounds[WARM:])
    return tuple(one / seconds[0] for one in seconds)


@torch.no_grad()
def time_joint(widths: tuple[int, int], positions: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of a stitching layer between two widths at so many positions in all."""
    keep_freed_memory()
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
