"""One process or many: sharing batches out, summing statistics, showing progress.

Everything rests on accelerate's state: launched with `accelerate launch` or torchrun, each process reads its share
of the batches and all get the same sums.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env, reduce
from huggingface_hub.utils import are_progress_bars_disabled
from numpy.typing import NDArray
from torch import Tensor
from tqdm.asyncio import tqdm_asyncio
from tqdm.auto import tqdm
from transformers.utils import logging

LINE_SECONDS = 30  # between lines where no bar can be drawn
T = TypeVar("T")


def process_state() -> PartialState:
    """This process among those of the launch: number, device, whether it is the main one.

    Where there is no accelerator the processes are CPU processes; left to itself, accelerate would run each as if it
    were alone unless ACCELERATE_USE_CPU is set.
    """
    wants_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=wants_cpu)


def shared_out(items: Iterable[T]) -> Iterator[T]:
    """The items whose number falls to this process; all of them where there is one process."""
    state = process_state()
    for number, item in enumerate(items):
        if number % state.num_processes == state.process_index:
            yield item


def sum_over_processes(value: Tensor) -> Tensor:
    """Sum a tensor over processes; every process gets the sum. Shapes must agree."""
    state = process_state()
    return value if state.num_processes == 1 else reduce(value.to(state.device), "sum").to(value.device)


def sum_array_over_processes(value: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same for a numpy array."""
    return sum_over_processes(torch.from_numpy(value)).numpy()


def from_main_process(make: Callable[[], T]) -> T:
    """What the main process makes, for every process: what is timed differs each time."""
    state = process_state()
    if state.num_processes == 1:
        return make()
    return broadcast_object_list([make() if state.is_main_process else None])[0]


def progress(items: Iterable[T], description: str, unit: str = "batch") -> Iterator[T]:
    """The items, with their progress shown as `ProgressBar` does."""
    total = len(items) if isinstance(items, Sized) else None
    with ProgressBar(description, unit, total) as bar:
        for item in items:
            yield item
            bar.update()


class ProgressBar:
    """How far a long step is: a bar on a terminal or in a notebook, elsewhere a plain line twice a minute on stderr.

    Only the main process shows it, and nothing is shown where bars are switched off: by transformers' or
    huggingface_hub's `disable_progress_bar(s)`, HF_HUB_DISABLE_PROGRESS_BARS or TQDM_DISABLE, or by a verbosity of
    transformers' logging above warnings.

    Args:
        description: what is done.
        unit: what is counted.
        total: how many there are; None: not known.
        done: how many of them a run before has done.
    """

    def __init__(self, description: str, unit: str, total: int | None, done: int = 0):
        self.description, self.unit, self.total, self.done = description, unit, total, done
        shown = process_state().is_main_process and _wanted()
        drawn = shown and _can_draw()
        self.bar = tqdm(total=total, initial=done, desc=description, unit=unit, leave=False, disable=not drawn)
        self.writes = shown and not drawn
        self.begun = self.last = time.monotonic()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self, note: str = "") -> None:
        """One more is done; the note stands behind the count."""
        self.done += 1
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update()
        now = time.monotonic()
        if self.writes and now - self.last >= LINE_SECONDS:
            self.last = now
            count = f"{self.done}" if self.total is None else f"{self.done} of {self.total}"
            parts = [f"{self.description}: {self.unit} {count}", f"{now - self.begun:.0f} s", note]
            print(", ".join(part for part in parts if part), file=sys.stderr, flush=True)


@contextmanager
def others_bars() -> Iterator[None]:
    """transformers' own bars, of loading and saving, are meanwhile drawn only where ours would be.

    Where somebody has set a hook for them, that decides.
    """
    if _can_draw():
        yield
        return
    before = logging.set_tqdm_hook(_undrawn)
    if before is not None:
        logging.set_tqdm_hook(before)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def _undrawn(factory: Callable[..., Any], args: tuple[Any, ...], settings: dict[str, Any]) -> Any:
    return factory(*args, **settings | {"disable": True})


def _wanted() -> bool:
    """Whether progress is to be shown at all."""
    if parse_flag_from_env("TQDM_DISABLE") or are_progress_bars_disabled():
        return False
    return logging.is_progress_bar_enabled() and logging.get_verbosity() <= logging.WARNING


def _can_draw() -> bool:
    """Whether a bar can be drawn over: on a terminal, or as tqdm's widget in a notebook."""
    return sys.stderr.isatty() or tqdm is not tqdm_asyncio
