"""What all stitches between two anchors cost, as arrays."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from klas_hf.paths import Stitch


@dataclass(frozen=True, eq=False)
class StitchCosts:
    """MACs and parameters of every stitched model between two anchors, without building one.

    A stitched model costs the source's input part, the source blocks it keeps, the stitching layer, the target
    blocks it keeps and the target's head.

    Attributes:
        tokens: length of the sequence that the MACs are for; 0 for images.
        source_blocks, target_blocks: `(m,)` and `(n,)` MACs of each block.
        stitch: MACs of the stitching layer: one number, or `(m, n)` laid out as `macs`.
        source_total, target_total: MACs of the anchors themselves.
        ends: MACs of the source's input part and the target's head.
        source_parameters, target_parameters: `(m,)` and `(n,)` parameters of each block.
        stitch_parameters, ends_parameters: parameters of the stitching layer (a number or `(m, n)`), and of both ends.
        source, target: positions of the two anchors in a list of more than two.
        source_stages, target_stages: `(m,)` and `(n,)` stage that each block belongs to; None: one stage for all.
        allowed: `(m, n)` laid out as `macs`, whether the two blocks can be stitched (same spatial grid); None: all can.
        image_height, image_width: pixels of the image that the MACs are for; 0 for sequences.

    Raises:
        ValueError: an array that has another shape than the blocks ask for.

    Example:
        >>> costs = measure_stitch_costs(source, target)  # anchors of 3 and 4 blocks
        >>> costs.macs.shape, costs.of(Stitch(2, 1)) == (costs.macs[1, 1], costs.parameters[1, 1])
        ((3, 4), True)
        >>> bool((np.diff(costs.macs, axis=0) > 0).all()), bool((np.diff(costs.macs, axis=1) < 0).all())
        (True, True)
    """

    tokens: int
    source_blocks: np.ndarray
    target_blocks: np.ndarray
    stitch: int | NDArray
    source_total: int
    target_total: int
    ends: int
    source_parameters: np.ndarray
    target_parameters: np.ndarray
    stitch_parameters: int | NDArray
    ends_parameters: int
    source: int = 0
    target: int = 1
    source_stages: NDArray | None = None
    target_stages: NDArray | None = None
    allowed: NDArray[np.bool_] | None = None
    image_height: int = 0
    image_width: int = 0

    def __post_init__(self) -> None:
        m, n = len(self.source_blocks), len(self.target_blocks)
        for name, value, shape in (
            ("source_stages", self.source_stages, (m,)),
            ("target_stages", self.target_stages, (n,)),
            ("allowed", self.allowed, (m, n)),
        ):
            if value is not None and value.shape != shape:
                raise ValueError(f"got {name} of shape {value.shape}; expected {shape}: anchors of {m} and {n} blocks")
        for name, cost in (("stitch", self.stitch), ("stitch_parameters", self.stitch_parameters)):
            if np.shape(cost) not in ((), (m, n)):
                raise ValueError(f"got {name} of shape {np.shape(cost)}; expected one number or the shape {(m, n)}")

    @cached_property
    def macs(self) -> np.ndarray:
        """`(m, n)` MACs; row i - 1 and column j hold the stitch (i, j), for i = 1…m and j = 0…n-1."""
        return _prefixes(self.source_blocks) + _suffixes(self.target_blocks) + self.ends + self.stitch

    @cached_property
    def parameters(self) -> np.ndarray:
        """`(m, n)` parameters, laid out as `macs`."""
        blocks = _prefixes(self.source_parameters) + _suffixes(self.target_parameters)
        return blocks + self.ends_parameters + self.stitch_parameters

    @cached_property
    def possible(self) -> NDArray[np.bool_]:
        """`(m, n)` whether each stitch can be made, laid out as `macs`."""
        return np.ones(self.macs.shape, dtype=bool) if self.allowed is None else self.allowed

    def of(self, stitch: Stitch) -> tuple[int, int]:
        """MACs and parameters of one stitch."""
        stitch.check(len(self.source_blocks), len(self.target_blocks))
        place = stitch.source_stop - 1, stitch.target_start
        return int(self.macs[place]), int(self.parameters[place])

    def check_direction(self) -> None:
        """Raise ValueError when the source costs more than the target (KLAS stitches cheap to dear only)."""
        if self.source_total > self.target_total:
            raise ValueError(
                f"got a source of {self.source_total:,} MACs and a target of {self.target_total:,}: reversed; "
                "expected the cheaper anchor as the source. Swap source and target"
            )


def _prefixes(blocks: np.ndarray) -> np.ndarray:
    return np.cumsum(blocks)[:, None]


def _suffixes(blocks: np.ndarray) -> np.ndarray:
    return np.cumsum(blocks[::-1])[::-1][None, :]
