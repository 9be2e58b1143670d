"""One figure of the table, and how seconds, memory and bytes read are measured for it.

What is compared runs in one process and in turns, or in child processes that take turns, so that other work on the
machine slows both. The least of several times counts.
"""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.options import Options

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        what: is measured.
        ours: in the unit.
        against: the bound or the peer, measured in the same run.
        theirs: in the unit.
        unit: such as "s" or "MiB".
        aim: what the ratio is to be; None where nothing is asked.
        larger: whether the ratio is theirs / ours, "so many times as fast", and to be no less than the aim; else it is
            ours / theirs, and to be no more.
    """

    what: str
    ours: float
    against: str
    theirs: float
    unit: str
    aim: float | None = None
    larger: bool = False

    @property
    def ratio(self) -> float:
        return self.theirs / self.ours if self.larger else self.ours / self.theirs

    @property
    def cells(self) -> list[str]:
        """As a line of the table."""
        sign = "≥" if self.larger else "≤"
        met = self.aim is None or (self.ratio >= self.aim if self.larger else self.ratio <= self.aim)
        ratio = f"{self.ratio:.3g}" if self.ratio >= 10 else f"{self.ratio:.3f}"
        return [
            self.what, f"{self.ours:.4g} {self.unit}", self.against, f"{self.theirs:.4g} {self.unit}",
            ratio if met else f"**{ratio}**", "–" if self.aim is None else f"{sign} {self.aim:g}",
        ]  # fmt: skip


HEADING = ["what", "ours", "against", "theirs", "ratio", "aim"]


def seconds(run: Callable[[], object]) -> float:
    """Of one call, to the end of what it has left to an accelerator."""
    begun = time.perf_counter()
    run()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - begun


def in_turns(repeats: int, *runs: Callable[[], object], warm_up: bool = True) -> list[float]:
    """Least seconds of each of several calls, which take turns after a warm-up of all."""
    if warm_up:
        for run in runs:
            run()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, taken in zip(runs, times, strict=True):
            taken.append(seconds(run))
    return [min(taken) for taken in times]


# ---- in processes of their own


def in_children(
    options: Options, names: Sequence[str], *args: Any, repeats: int | None = None
) -> list[dict[str, float]]:
    """The least of what child processes measure, by name; they take turns, after a warm-up unless it is quick.

    Args:
        names: functions, as "module:function" of this package, that take the options and `args`, and give a mapping
            from what they measure to numbers.
        args: JSON values.
    """
    repeats, warm_up = options.repeats if repeats is None else repeats, 0 if options.quick else 1
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(repeats + warm_up):
        for name in names:
            found[name].append(in_child(options, name, *args))
    return [{key: min(one[key] for one in runs[warm_up:]) for key in runs[0]} for runs in found.values()]


def in_child(options: Options, name: str, *args: Any, launcher: Sequence[str] = ()) -> dict[str, float]:
    """What one child process measures; `launcher` goes between python and the module, for torchrun's sake.

    Raises:
        RuntimeError: the child failed; its last words.
    """
    command = [sys.executable, *launcher, "-m", "benchmarks.measuring", name, json.dumps([asdict(options), *args])]
    # Bytecode is kept, as that of an installed package is: what a first call imports is in its time.
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "TQDM_DISABLE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))


def child_main() -> None:
    """Run one function of this package, and print what it gives."""
    name, given = sys.argv[1], json.loads(sys.argv[2])
    options = Options(**given[0])
    options.prepare()
    module, function = name.split(":")
    found = getattr(import_module(f"benchmarks.{module}"), function)(options, *given[1:])
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(dict(found)), flush=True)


def growth_of(run: Callable[[], object]) -> Mapping[str, float]:
    """Seconds of a call, and MiB that the process, or the accelerator, grew by at its peak."""
    # Python's collector looks through all that was imported once in a while, for .2 s: within which call is chance.
    gc.collect()
    gc.freeze()
    before = _resident("VmRSS")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    taken = seconds(run)
    peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else _resident("VmHWM")
    return {"seconds": taken, "peak": peak - before}


def loading(make: Callable[[], nn.Module], folders: Sequence[str]) -> Mapping[str, float]:
    """Seconds and peak MiB of a call that makes a model from files, all of whose weights are touched; and MiB read.

    Bytes are counted on a second call, before which the system forgets the files' pages: times are of warm files.
    """

    def run() -> None:
        for parameter in make().parameters():
            parameter.sum()

    found = dict(growth_of(run))
    if not folders:
        return found
    for folder in folders:
        for file in Path(folder).rglob("*.safetensors"):
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    before = _read_bytes()
    run()
    return found | {"read": (_read_bytes() - before) / 2**20}


def _resident(kind: str) -> float:
    """MiB resident now (VmRSS) or at most so far (VmHWM), on Linux; getrusage would report the parent's peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1024


def _read_bytes() -> int:
    """Bytes that this process has had the system read from the disk so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


if __name__ == "__main__":
    child_main()
