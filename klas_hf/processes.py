"""One process or many: sharing batches out, summing statistics, showing progress on the main process only.

Everything rests on accelerate's state: launched with `accelerate launch` or torchrun, each process reads its share
of the batches and all get the same sums.
"""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, reduce
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

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


def progress(items: Iterable[T], description: str, unit: str = "batch") -> Iterable[T]:
    """A progress bar on the main process."""
    return tqdm(items, desc=description, unit=unit, leave=False, disable=not process_state().is_main_process)
