"""Small numbers in few bytes: rows of indices in the least bits, rows of int8 with a scale."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def index_bits(entries: int) -> int:
    """Bits that the number of one of so many entries takes."""
    return max(1, (entries - 1).bit_length())


def pack_rows(indices: Tensor, bits: int) -> Tensor:
    """Rows of numbers below 2^bits, `(rows, count)`, as bytes `(rows, ⌈count · bits / 8⌉)`, lowest bit first."""
    rows, count = indices.shape
    padded = torch.zeros(rows, -(-count * bits // 8) * 8, dtype=torch.uint8)
    padded[:, : count * bits] = ((indices.unsqueeze(-1) >> torch.arange(bits)) & 1).flatten(1)
    return (padded.view(rows, -1, 8) << torch.arange(8, dtype=torch.uint8)).sum(-1).to(torch.uint8)


def unpack_rows(packed: Tensor, bits: int, count: int) -> Tensor:
    """What `pack_rows` was given, int32 `(rows, count)`; in operations that ExecuTorch has too."""
    if bits == 8:
        return packed.int()
    if bits == 16:
        low, high = packed.view(len(packed), count, 2).int().unbind(-1)
        return low + 256 * high
    # Eight indices fill `bits` bytes; each lies within three of them.
    groups = F.pad(packed, (0, -packed.shape[1] % bits)).view(len(packed), -1, bits)
    unpacked = _by_division(groups) if torch.compiler.is_exporting() else _by_shifts(groups)
    return unpacked.flatten(1)[:, :count]


def _by_shifts(groups: Tensor) -> Tensor:
    """Eight indices of each group, `(…, bits)` bytes to `(…, 8)`."""
    bits, parts = groups.shape[-1], groups.int().unbind(-1)
    found = []
    for start in range(0, 8 * bits, bits):
        first, last = start // 8, (start + bits - 1) // 8
        value = parts[first] >> start % 8
        for n in range(first + 1, last + 1):
            value = value | (parts[n] << (8 * n - start))
        found.append(value & (2**bits - 1))
    return torch.stack(found, -1)


def _by_division(groups: Tensor) -> Tensor:
    """The same for ExecuTorch, which has no shifts: float32 holds 24 bits exactly, also divided by powers of two."""
    bits, parts = groups.shape[-1], groups.float()
    first = torch.arange(8, device=groups.device) * bits
    one, two, three = (parts[..., (first // 8 + n).clamp(max=bits - 1)] for n in range(3))
    shifted = torch.floor((one + 256 * two + 65536 * three) * 0.5 ** (first % 8))
    return (shifted - 2**bits * torch.floor(shifted * 0.5**bits)).int()


class Rows(nn.Module):
    """A matrix in float32, or in int8 with a float32 scale per row, or one for all rows.

    Args:
        rows, columns: its shape.
        bits: 32 or 8.
        scales: number of scales, `rows` or 1.
    """

    values: Tensor
    scale: Tensor | None

    def __init__(self, rows: int, columns: int, bits: int, scales: int):
        super().__init__()
        self.register_buffer("values", torch.zeros(rows, columns, dtype=torch.int8 if bits == 8 else torch.float32))
        self.register_buffer("scale", torch.ones(scales, 1, dtype=torch.float32) if bits == 8 else None)

    @property
    def dtype(self) -> torch.dtype:
        """Of what is read."""
        return (self.values if self.scale is None else self.scale).dtype

    def store(self, matrix: Tensor) -> None:
        """Round to the nearest of 255 values, the scale being a 127th of the greatest absolute value that it is for."""
        if self.scale is not None:
            peaks = matrix.abs().amax(1, keepdim=True)
            peaks = peaks if len(self.scale) == len(matrix) else peaks.max().view(1, 1)
            self.scale = (peaks / 127).clamp_min(torch.finfo(torch.float32).tiny)
            matrix = (matrix / self.scale).round().to(torch.int8)
        self.values = matrix

    def read(self) -> Tensor:
        """The matrix in floats."""
        return self.values if self.scale is None else self.values.to(self.dtype) * self.scale
