"""Compressed KAN heads, evaluated as they are stored: no spline is ever unpacked (SHARe-KAN, arXiv 2512.15742).

    coefficients of edge (o, i)  =  gain_oi · shape[index_oi]  +  bias_oi

The shapes are one codebook for all layers, and for all heads that share it. Functions of the basis add up to one, so
the biases of an output's edges are one number for the output: they may be stored as that ("output"), which is exact and
spares a byte per edge, or one by one ("edge"), as the paper has them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kan_layers import KANHead, normed
from .kan_packing import Rows, index_bits, unpack_rows
from .kan_splines import Grid

BITS = (8, 32)
BIASES = ("output", "edge")
AT_ONCE = 2**19  # numbers that an evaluation has in memory beside inputs and outputs, or what one output needs

# For one image and up to so many shapes per output, every shape is evaluated at every input and each edge picks its
# value. Else the splines of a few outputs at a time are put together, which the images share, and multiplied.
_PER_OUTPUT = 16


@dataclass(frozen=True)
class Compression:
    """How a head is compressed.

    Attributes:
        codebook: number of shapes, at most 65,536.
        bits: of gains, biases of edges, weights of the base, and the codebook: 8 (int8 with float32 scales) or 32.
        bias: "output", a float32 for each output, or "edge", one of `bits` for each edge.

    Raises:
        ValueError: a number of shapes or bits, or a kind of bias, that there is not.

    Example:
        >>> Compression(codebook=256).index_bits, Compression(codebook=65536, bias="edge").index_bits
        (8, 16)
    """

    codebook: int
    bits: int = 8
    bias: str = "output"

    def __post_init__(self) -> None:
        if not 1 <= self.codebook <= 2**16:
            raise ValueError(f"got codebook={self.codebook}; expected 1 to 65536 shapes")
        if self.bits not in BITS:
            raise ValueError(f"got bits={self.bits}; expected one of {BITS}")
        if self.bias not in BIASES:
            raise ValueError(f"got bias={self.bias!r}; expected one of {BIASES}")

    @property
    def index_bits(self) -> int:
        """Bits of an index, the least that tell the shapes apart."""
        return index_bits(self.codebook)


class CompressedKANLayer(nn.Module):
    """A KAN layer whose splines are scaled shapes of a codebook.

    Args:
        inputs, outputs: widths.
        grid: of every spline.
        base: "none" or "silu".
        compression: how it is stored.
    """

    def __init__(self, inputs: int, outputs: int, grid: Grid, base: str, compression: Compression):
        super().__init__()
        self.inputs, self.outputs, self.grid, self.compression = inputs, outputs, grid, compression
        width = -(-inputs * compression.index_bits // 8)
        self.register_buffer("indices", torch.zeros(outputs, width, dtype=torch.uint8))
        self.gains = Rows(outputs, inputs, compression.bits, outputs)
        edges = compression.bias == "edge"
        self.biases = Rows(outputs, inputs, compression.bits, outputs) if edges else Rows(outputs, 1, 32, outputs)
        self.base = Rows(outputs, inputs, compression.bits, outputs) if base == "silu" else None

    def read_indices(self, outputs: slice = slice(None), start: int = 0, stop: int | None = None) -> Tensor:
        """Which shapes the edges of some outputs, from some inputs, have: int32; `start` is a multiple of 8."""
        bits, stop = self.compression.index_bits, self.inputs if stop is None else min(stop, self.inputs)
        return unpack_rows(self.indices[outputs, start * bits // 8 : -(-stop * bits // 8)], bits, stop - start)

    def forward(self, hidden: Tensor, codebook: Rows) -> Tensor:
        """`(batch, inputs)` to `(batch, outputs)`, a few inputs or outputs at a time."""
        few_shapes = len(codebook.values) <= _PER_OUTPUT * self.outputs
        sums = self._of_values if len(hidden) == 1 and few_shapes else self._of_splines
        out = sums(hidden, codebook.values)
        for scale in (codebook.scale, self.gains.scale):
            out = out if scale is None else out * scale.T
        out = out + self.biases.read().sum(1)
        return out if self.base is None else out + F.linear(F.silu(hidden), self.base.read())

    def dense(self, codebook: Rows) -> Tensor:
        """The coefficients that this stands for, `(outputs, inputs, coefficients)`."""
        biases = self.biases.read()
        biases = biases if self.compression.bias == "edge" else biases.expand(-1, self.inputs) / self.inputs
        return self.gains.read().unsqueeze(-1) * codebook.read()[self.read_indices().long()] + biases.unsqueeze(-1)

    def _of_values(self, hidden: Tensor, shapes: Tensor) -> Tensor:
        """Sums of one image, `(1, outputs)`, without scales: the values of all shapes, then each edge's choice."""
        basis, sums = self.grid.basis(hidden[0]), hidden.new_zeros(self.outputs)
        shapes = shapes.to(basis.dtype)
        step = max(8, AT_ONCE // max(len(shapes), self.outputs) // 8 * 8)
        for start in range(0, self.inputs, step):
            values = shapes @ basis[start : start + step].T
            found = values.gather(0, self.read_indices(start=start, stop=start + step).long())
            sums = sums + (found * self.gains.values[:, start : start + step].to(found.dtype)).sum(1)
        return sums.unsqueeze(0)

    def _of_splines(self, hidden: Tensor, shapes: Tensor) -> Tensor:
        """Sums `(batch, outputs)`, without scales: of a few outputs at a time the splines, which all images share."""
        basis = self.grid.basis(hidden).flatten(1)
        step, found = max(1, AT_ONCE // basis.shape[1]), list[Tensor]()
        for start in range(0, self.outputs, step):
            outputs = slice(start, start + step)
            splines = F.embedding(self.read_indices(outputs), shapes).to(basis.dtype)
            splines *= self.gains.values[outputs].to(basis.dtype).unsqueeze(-1)
            found.append(F.linear(basis, splines.flatten(1)))
        return torch.cat(found, 1)


class CompressedKANHead(nn.Module):
    """A compressed `KANHead`; the codebook is handed in, as several heads may share it.

    Args:
        widths, grid, base: as of `KANHead`.
        compression: how it is stored.
    """

    def __init__(self, widths: Sequence[int], grid: Grid, base: str, compression: Compression):
        super().__init__()
        self.layers = nn.ModuleList(
            CompressedKANLayer(one, other, grid, base, compression) for one, other in pairwise(widths)
        )

    def forward(self, features: Tensor, codebook: Rows) -> Tensor:
        """`(batch, features)` to `(batch, outputs)`; computed in the scales' float32 whatever the features' dtype."""
        hidden = features.to(codebook.dtype)
        for layer in self.layers:
            hidden = layer(normed(hidden), codebook)
        return hidden.to(features.dtype)

    @torch.no_grad()
    def dense(self, codebook: Rows) -> KANHead:
        """The head of whole splines that this one equals."""
        first = self.layers[0]
        widths = [first.inputs, *(layer.outputs for layer in self.layers)]
        head = KANHead(widths, first.grid, "none" if first.base is None else "silu").to(first.indices.device)
        for layer, whole in zip(self.layers, head.layers, strict=True):
            whole.coefficients.copy_(layer.dense(codebook))
            if whole.base is not None:
                whole.base.copy_(layer.base.read())
        return head.eval()


def codebook_of(compression: Compression, grid: Grid) -> Rows:
    """An empty codebook, `(shapes, coefficients)`."""
    return Rows(compression.codebook, grid.coefficients, compression.bits, 1)


class DamagedHead(ValueError):
    """A compressed head whose tensors cannot be what was saved."""


def check_compressed(head: CompressedKANHead, codebook: Rows) -> None:
    """Raise DamagedHead if a head refers to shapes that the codebook lacks, or holds numbers that are not finite."""
    for number, layer in enumerate(head.layers):
        greatest, entries = int(layer.read_indices().max()), len(codebook.values)
        if greatest >= entries:
            raise DamagedHead(f"got layer {number} with shape {greatest} of a codebook of {entries}")
    floats = [tensor for part in (head, codebook) for tensor in part.buffers() if tensor.is_floating_point()]
    if not all(bool(tensor.isfinite().all()) for tensor in floats):
        raise DamagedHead("got a scale, gain or shape that is not finite")
