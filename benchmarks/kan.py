"""What a KAN head costs to run and to hold, compressed, dense, and as an MLP: ratios in one run.

    python benchmarks/kan.py

Beside our dense head stands one in the form of efficient-kan, written here: the basis by Cox and de Boor's recursion
over all functions at all knots, which are a buffer, then one matrix product, and a SiLU base with weights. What is
compared runs in turns, and the quickest turn counts: what else a machine does only adds to it. One MLP has the head's
widths, another as many bytes as the last look-up. Memory is the bytes of the tensors, and the largest that a forward
makes beside them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import HfArgumentParser

from klas_hf.kan.compression import compress_heads
from klas_hf.models.kan_compressed import CompressedKANHead, Compression
from klas_hf.models.kan_layers import KANHead
from klas_hf.models.kan_packing import Rows
from klas_hf.models.kan_splines import Grid


@dataclass
class Options:
    widths: list[int] = field(default_factory=lambda: [1024, 256, 20], metadata={"help": "of the head"})
    intervals: int = field(default=10, metadata={"help": "of the grid of cubic splines"})
    codebooks: list[int] = field(default_factory=lambda: [16, 256, 1024], metadata={"help": "numbers of shapes"})
    batches: list[int] = field(default_factory=lambda: [1, 64], metadata={"help": "images at a time"})
    repeats: int = field(default=40, metadata={"help": "turns, of which the quickest counts, after one to warm up"})
    threads: int = field(default=1, metadata={"help": "torch threads"})
    smoke: bool = field(default=False, metadata={"help": "tiny heads, one turn: no result"})

    def __post_init__(self) -> None:
        if self.smoke:
            self.widths, self.codebooks, self.batches, self.repeats = [16, 8, 4], [4, 16], [2], 1


class EfficientKANLayer(nn.Module):
    """A KAN layer in efficient-kan's published form."""

    def __init__(self, inputs: int, outputs: int, grid: Grid):
        super().__init__()
        knots = torch.arange(-grid.order, grid.intervals + grid.order + 1) * grid.step + grid.low
        self.register_buffer("knots", knots.expand(inputs, -1).contiguous())
        self.order = grid.order
        self.base = nn.Parameter(torch.randn(outputs, inputs) * inputs**-0.5)
        self.coefficients = nn.Parameter(torch.randn(outputs, inputs, grid.coefficients) * inputs**-0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.unsqueeze(-1)
        basis = ((x >= self.knots[:, :-1]) & (x < self.knots[:, 1:])).to(x.dtype)
        for k in range(1, self.order + 1):
            rising = (x - self.knots[:, : -(k + 1)]) / (self.knots[:, k:-1] - self.knots[:, : -(k + 1)])
            falling = (self.knots[:, k + 1 :] - x) / (self.knots[:, k + 1 :] - self.knots[:, 1:-k])
            basis = rising * basis[..., :-1] + falling * basis[..., 1:]
        return F.linear(F.silu(hidden), self.base) + F.linear(basis.flatten(1), self.coefficients.flatten(1))


class Lookup(nn.Module):
    """A compressed head with its codebook, as a function of features alone."""

    def __init__(self, head: CompressedKANHead, codebook: Rows):
        super().__init__()
        self.head, self.codebook = head, codebook

    def forward(self, features: Tensor) -> Tensor:
        return self.head(features, self.codebook)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation makes meanwhile."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        if isinstance(result, Tensor) and not function.is_view:
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result


def main() -> None:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    heads = made(options)
    print(f"torch {torch.__version__}, {options}\n")
    print("| head | batch | bytes | of dense | largest tensor made, bytes | ms | of dense |")
    print("|---|---|---|---|---|---|---|")
    for batch in options.batches:
        features = torch.randn(batch, options.widths[0])
        seconds = in_turns(options.repeats, *(partial(head, features) for head in heads.values()))
        for (name, head), taken in zip(heads.items(), seconds, strict=True):
            size, whole = held(head), held(heads["dense KAN"])
            print(
                f"| {name} | {batch} | {size:,} | {size / whole:.3f} | {largest(head, features):,} "
                f"| {1e3 * taken:.3f} | {taken / seconds[0]:.2f} |", flush=True
            )  # fmt: skip


def made(options: Options) -> dict[str, nn.Module]:
    """Heads of every form, of these widths; splines drawn at random cost what trained ones do."""
    grid = Grid(options.intervals, 3)
    dense = KANHead(options.widths, grid).eval()
    heads: dict[str, nn.Module] = {"dense KAN": dense}
    pairs = list(zip(options.widths, options.widths[1:], strict=False))
    heads["efficient-kan's form"] = nn.Sequential(*(EfficientKANLayer(*pair, grid) for pair in pairs))
    for shapes in options.codebooks:
        # Not k-means' shapes, which take no other time.
        (head,), codebook = compress_heads([dense], Compression(shapes), shapes=torch.randn(shapes, grid.coefficients))
        heads[f"look-up, {shapes} shapes"] = Lookup(head, codebook)
    heads["MLP of these widths"] = mlp(options.widths)
    small = held(heads[f"look-up, {options.codebooks[-1]} shapes"])
    inputs, outputs = options.widths[0], options.widths[-1]
    heads["MLP of the last look-up's bytes"] = mlp([inputs, max(1, small // (4 * (inputs + outputs + 1))), outputs])
    return heads


def mlp(widths: list[int]) -> nn.Module:
    """Linear layers with GELU between."""
    parts: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        parts += [nn.Linear(inputs, outputs), nn.GELU()]
    return nn.Sequential(*parts[:-1])


def held(head: nn.Module) -> int:
    """Bytes of all tensors of a head."""
    return sum(one.numel() * one.element_size() for one in head.state_dict().values())


@torch.no_grad()
def largest(head: nn.Module, features: Tensor) -> int:
    """Bytes of the largest tensor that a forward makes."""
    with Largest() as mode:
        head(features)
    return mode.bytes


@torch.no_grad()
def in_turns(repeats: int, *runs: Callable[[], object]) -> list[float]:
    """Least seconds of each of several runs, which take turns after a warm-up of all."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(repeats + 1):
        for run, seconds in zip(runs, times, strict=True):
            begun = time.perf_counter()
            run()
            if turn:
                seconds.append(time.perf_counter() - begun)
    return [min(seconds) for seconds in times]


if __name__ == "__main__":
    main()
