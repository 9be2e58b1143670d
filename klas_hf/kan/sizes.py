"""Bytes of KAN heads by arithmetic, and where they would lie in a chip's caches: nothing here is measured."""

from dataclasses import dataclass
from itertools import pairwise

from klas_hf.models.kan_compressed import Compression


@dataclass(frozen=True)
class HeadSize:
    """Bytes that a head takes, in memory as in a file.

    Attributes:
        widths: of the features, hidden layers and outputs.
        coefficients: of a spline: intervals of the grid + order.
        compression: None for a dense head, in float32.
        base: whether edges have a weight for silu.

    Example:
        >>> from klas_hf.models.kan_compressed import Compression
        >>> dense = HeadSize((2048, 512), coefficients=14)
        >>> small = HeadSize((2048, 512), 14, Compression(65536, bias="edge"))
        >>> dense.edges, dense.total(), small.head // small.edges, small.codebook
        (1048576, 58720256, 4, 917508)
    """

    widths: tuple[int, ...]
    coefficients: int
    compression: Compression | None = None
    base: bool = False

    @property
    def edges(self) -> int:
        """Splines of the head."""
        return sum(inputs * outputs for inputs, outputs in pairwise(self.widths))

    @property
    def codebook(self) -> int:
        """Bytes of the shapes, which heads can share."""
        how = self.compression
        return 0 if how is None else how.codebook * self.coefficients * how.bits // 8 + (4 if how.bits == 8 else 0)

    @property
    def head(self) -> int:
        """Bytes of everything else."""
        return sum(self._layer(inputs, outputs) for inputs, outputs in pairwise(self.widths))

    def total(self, heads: int = 1) -> int:
        """Bytes of so many `heads` with one codebook."""
        return heads * self.head + self.codebook

    def _layer(self, inputs: int, outputs: int) -> int:
        how = self.compression
        if how is None:
            return 4 * inputs * outputs * (self.coefficients + self.base)
        rows = outputs * (inputs * how.bits // 8 + (4 if how.bits == 8 else 0))
        indices = outputs * -(-inputs * how.index_bits // 8)
        return indices + rows * (1 + self.base) + (rows if how.bias == "edge" else 4 * outputs)


@dataclass(frozen=True)
class Chip:
    """Data caches that one core reaches, in bytes.

    Attributes:
        name: of the chip and the kind of core.
        l1, l2: of the core's own level 1, and the level 2 that it has or shares.
        source: of these sizes, published.
    """

    name: str
    l1: int
    l2: int
    source: str


CHIPS = (
    Chip(
        "Raspberry Pi 5 (BCM2712, Cortex-A76)", l1=64 * 2**10, l2=512 * 2**10,
        source="Arm, Cortex-A76 Technical Reference Manual (100798), A6.1; Raspberry Pi documentation, Processors",
    ),
    Chip(
        "Jetson Orin Nano (Cortex-A78AE)", l1=64 * 2**10, l2=256 * 2**10,
        source="NVIDIA, Jetson Orin Nano Series data sheet: 128 KB of L1 (half of it for data), 256 KB of L2 per core",
    ),
    Chip(
        "Apple M1 (performance cores)", l1=128 * 2**10, l2=12 * 2**20,
        source="Wikipedia, Apple M1; no document of Apple's was found",
    ),
)  # fmt: skip


def cache_level(size: int, chip: Chip) -> str:
    """The first of a chip's caches that so many bytes would fill at most half of: "L1", "L2" or "memory".

    Half, as what streams past takes room too. Whether the bytes stay there is another matter: docs/kan.md.
    """
    return next((name for name, room in (("L1", chip.l1), ("L2", chip.l2)) if 2 * size <= room), "memory")
