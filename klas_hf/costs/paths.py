"""Costs of an anchor's parts, from which those of any path follow."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class AnchorCosts:
    """MACs and parameters of one anchor, taken apart: embedding, n blocks, head.

    Attributes:
        embed_macs, head_macs: MACs before the first block and after the last.
        block_macs: of each block.
        embed_parameters, block_parameters, head_parameters: parameters of the same parts.
        widths: n + 1 widths, at the input of each block and after the last.
        positions: n + 1 numbers of positions there, class tokens included. A joint runs at those of what it maps to.
    """

    embed_macs: int
    block_macs: Sequence[int]
    head_macs: int
    embed_parameters: int
    block_parameters: Sequence[int]
    head_parameters: int
    widths: Sequence[int]
    positions: Sequence[int]

    @property
    def total_macs(self) -> int:
        """MACs of the whole anchor."""
        return self.embed_macs + sum(self.block_macs) + self.head_macs
