"""Values that name a model by its place among the anchors' blocks.

A `Path` is slices of anchors' blocks with a linear stitching layer at each joint: the first slice begins with its
anchor's embedding, the last ends with its anchor's head. `Stitch(i, j)` names the two-slice path of KLAS and SN-Net:
`source.blocks[:i]`, the stitching layer, `target.blocks[j:]`. The layer maps the output of the i-th source block to the
output of the j-th target block (both 1-indexed), so (i, j) is the pair (i, j) of KLAS (Eq. 1 and 2). `target_start=0`
feeds the target's first block: SN-Net uses it, KLAS has no score for it.
"""

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations


@dataclass(frozen=True, order=True)
class Stitch:
    """One way to join two anchors.

    Attributes:
        source_stop: number of source blocks that run, counted from the first; at least 1.
        target_start: number of target blocks that are skipped; 0 runs them all.
        source, target: positions of the two anchors in a list of more than two.

    Raises:
        ValueError: no source block would run, or a negative number.

    Example:
        >>> stitch = Stitch(8, 14)  # source.blocks[:8], stitching layer, target.blocks[14:]
        >>> stitch.source_stop, str(stitch), str(Stitch(8, 14, source=1, target=2))
        (8, '(8, 14)', '1→2 (8, 14)')
        >>> Stitch.of((8, 14)) == stitch
        True
    """

    source_stop: int
    target_start: int
    source: int = 0
    target: int = 1

    def __post_init__(self) -> None:
        if self.source_stop < 1 or self.target_start < 0:
            raise ValueError(
                f"got Stitch(source_stop={self.source_stop}, target_start={self.target_start}); expected "
                "source_stop >= 1 (at least one source block runs) and target_start >= 0"
            )

    def __str__(self) -> str:
        pair = f"({self.source_stop}, {self.target_start})"
        return pair if (self.source, self.target) == (0, 1) else f"{self.source}→{self.target} {pair}"

    @classmethod
    def of(cls, stitch: "Stitch | tuple[int, int] | tuple[int, int, int, int]") -> "Stitch":
        """Accept a pair `(i, j)`, or `(i, j, source, target)`, where a `stitch` is expected.

        Raises:
            TypeError: anything else.
        """
        if isinstance(stitch, Stitch):
            return stitch
        try:
            numbers = [operator.index(number) for number in stitch]
        except TypeError:
            numbers = []
        if len(numbers) not in (2, 4):
            raise TypeError(f"got stitch={stitch!r}; expected Stitch(i, j) or a pair (i, j) or (i, j, source, target)")
        return cls(*numbers)

    @property
    def path(self) -> "Path":
        """The two-slice path that the stitch names."""
        return Path((Slice(self.source, 0, self.source_stop), Slice(self.target, self.target_start)))

    def check(self, source_blocks: int, target_blocks: int) -> None:
        """Raise ValueError unless the stitch fits anchors of `source_blocks` and `target_blocks` blocks."""
        if self.source_stop > source_blocks or self.target_start >= target_blocks:
            raise ValueError(
                f"got stitch {self}, out of range for a source of {source_blocks} and a target of "
                f"{target_blocks} blocks; expected 1 <= i <= {source_blocks} and 0 <= j <= {target_blocks - 1}"
            )


@dataclass(frozen=True)
class Slice:
    """Consecutive blocks of one anchor, `anchor.blocks[start:stop]`.

    Attributes:
        anchor: position of the anchor in a list.
        start, stop: as of a Python slice, not negative; `stop=None` runs to the anchor's last block and its head.

    Example:
        >>> str(Slice(0, 0, 8)), str(Slice(1, 14))
        ('0[:8]', '1[14:]')
        >>> Path((Slice(0, 0, 8), Slice(1, 14))) == Stitch(8, 14).path
        True
    """

    anchor: int
    start: int = 0
    stop: int | None = None

    def __str__(self) -> str:
        return f"{self.anchor}[{self.start or ''}:{'' if self.stop is None else self.stop}]"


_SLICE = re.compile(r"(\d+)\[(\d*):(\d*)\]")


@dataclass(frozen=True)
class Path:
    """A model as a path through anchors: slices of their blocks, joined by linear stitching layers.

    The last slice is open (`1[14:]`): it ends with its anchor's head. It may be empty, where it starts at the anchor's
    depth: the joint then feeds the head. An anchor may occur more than once, and alone (`1[:]`).

    Attributes:
        slices: in the order in which they run.

    Raises:
        TypeError: no tuple of slices.
        ValueError: no slice, one that is empty or negative, a first slice that does not begin with the first block, or
            slices open elsewhere than at the end.

    Example:
        >>> path = Path.parse("0[:8] 1[14:]")
        >>> path == Stitch(8, 14).path, str(path), path.stitch
        (True, '0[:8] 1[14:]', Stitch(source_stop=8, target_start=14, source=0, target=1))
        >>> Path.parse("1[:5] 1[7:12] 1[15:]").depth([8, 20])
        15
        >>> Path.of("1[:]").joints
        0
    """

    slices: tuple[Slice, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.slices, tuple) or not all(isinstance(one, Slice) for one in self.slices):
            raise TypeError(
                f'got slices={self.slices!r}; expected a tuple of Slice. A text is read by Path.parse("1[:]")'
            )
        self._expect(bool(self.slices), "at least one slice")
        self._expect(all(one.anchor >= 0 and one.start >= 0 for one in self.slices), "positions of 0 or more")
        self._expect(self.slices[0].start == 0, "a first slice that starts with the first block, such as 0[:8]")
        self._expect(self.slices[-1].stop is None, "a last slice that runs to the head, such as 1[14:]")
        self._expect(
            all(one.stop is not None and one.stop > one.start for one in self.slices[:-1]),
            "slices of one block or more with an end, such as 0[:8], before the last",
        )

    def __str__(self) -> str:
        return " ".join(map(str, self.slices))

    @classmethod
    def parse(cls, text: str) -> "Path":
        """The path that a text such as "0[:8] 1[14:]" writes.

        Raises:
            ValueError: it is not slices between blanks, or they make no path.
        """
        found = [_SLICE.fullmatch(word) for word in text.split()]
        if not found or None in found:
            raise ValueError(
                f'got {text!r} for a path; expected slices of anchors by position, such as "0[:8] 1[14:]" or "1[:]"'
            )
        return cls(tuple(Slice(int(m[1]), int(m[2] or 0), int(m[3]) if m[3] else None) for m in found if m))

    @classmethod
    def of(cls, path: "Path | Stitch | str | Sequence[int]") -> "Path":
        """Accept a `Stitch`, its pair `(i, j)` or four numbers, or a text where a path is expected.

        Raises:
            TypeError: anything else.
            ValueError: a text that writes no path.
        """
        if isinstance(path, Path):
            return path
        return cls.parse(path) if isinstance(path, str) else Stitch.of(path).path  # type: ignore[arg-type]

    @property
    def anchors(self) -> tuple[int, ...]:
        """Positions of the anchors that it uses, ascending."""
        return tuple(sorted({one.anchor for one in self.slices}))

    @property
    def joints(self) -> int:
        """Number of stitching layers."""
        return len(self.slices) - 1

    @property
    def repeats(self) -> bool:
        """Whether it runs a block of an anchor twice."""
        return any(
            a.anchor == b.anchor and max(a.start, b.start) < min(a.stop or math.inf, b.stop or math.inf)
            for a, b in combinations(self.slices, 2)
        )

    @property
    def stitch(self) -> Stitch | None:
        """The stitch that it is, if it has two slices of two anchors and no empty one."""
        if len(self.slices) != 2 or len(self.anchors) != 2:
            return None
        first, last = self.slices
        return Stitch(first.stop or 0, last.start, first.anchor, last.anchor)

    def bounds(self, depths: Sequence[int]) -> list[tuple[int, int, int]]:
        """(anchor, start, stop) of every slice.

        Args:
            depths: number of blocks of each anchor.

        Raises:
            ValueError: an anchor or a block that is not there.
        """
        for one in self.slices:
            if one.anchor >= len(depths):
                raise ValueError(
                    f"got path {self} for {len(depths)} anchors; expected positions from 0 to {len(depths) - 1}"
                )
            if max(one.start, one.stop or 0) > depths[one.anchor]:
                raise ValueError(
                    f"got path {self}, out of range: {one} of an anchor of {depths[one.anchor]} blocks; expected "
                    f"bounds up to {depths[one.anchor]}"
                )
        return [(s.anchor, s.start, depths[s.anchor] if s.stop is None else s.stop) for s in self.slices]

    def depth(self, depths: Sequence[int]) -> int:
        """Number of blocks that run, where `depths` are those of the anchors."""
        return sum(stop - start for _, start, stop in self.bounds(depths))

    def _expect(self, right: bool, expected: str) -> None:
        if not right:
            raise ValueError(f"got path {str(self)!r}; expected {expected}")
