"""The moves by which a search goes from one path to others: cut a run out, shift a joint, bring in another anchor."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from klas_hf.paths import Path, Slice

Bound = tuple[int, int, int]  # anchor, start, stop
Grid = tuple[int, int, int]  # height, width, class tokens


class Moves:
    """What can be joined through some anchors, and the neighbours of a path.

    Args:
        grids: of every state of every anchor.
        joints: joints that a path may have, at most.
        least_slice: blocks that a slice has at least; the last may be empty, where the joint feeds the head.
        repeated: whether a path may run a block twice.
    """

    def __init__(self, grids: Sequence[Sequence[Grid]], joints: int, least_slice: int, repeated: bool = False):
        self.grids, self.most, self.least, self.repeated = grids, joints, least_slice, repeated
        self.depths = [len(of_one) - 1 for of_one in grids]

    def single(self) -> Iterator[Path]:
        """Every path of one joint."""
        for one, depth in enumerate(self.depths):
            for other, depth_other in enumerate(self.depths):
                for stop in range(1, depth + 1):
                    for start in range(depth_other + 1):
                        if one != other or start != stop:
                            yield from self._path([(one, 0, stop), (other, start, depth_other)])

    def neighbours(self, path: Path) -> Iterator[tuple[str, Path]]:
        """Paths one move away, with the move's name: a run of one or two blocks cut out, a joint shifted, blocks put
        back into a gap, another anchor brought in between or in front, a block beside a joint repeated."""
        bounds = path.bounds(self.depths)
        for place in range(len(bounds)):
            yield from (("cut", one) for one in self._cut(bounds, place))
        for joint in range(len(bounds) - 1):
            yield from (("shift", one) for one in self._shifted(bounds, joint))
            yield from (("put back", one) for one in self._put_back(bounds, joint))
            yield from (("bring in", one) for one in self._brought_in(bounds, joint))
            yield from (("repeat", one) for one in self._again(bounds, joint))
        yield from (("other front", one) for one in self._other_front(bounds))

    def _cut(self, bounds: list[Bound], place: int) -> Iterator[Path]:
        anchor, start, stop = bounds[place]
        for first in range(start, stop):
            for last in range(first + 1, min(first + 3, stop + 1)):
                yield from self._path(
                    [*bounds[:place], (anchor, start, first), (anchor, last, stop), *bounds[place + 1 :]]
                )

    def _shifted(self, bounds: list[Bound], joint: int) -> Iterator[Path]:
        (one, begin, stop), (other, start, end) = bounds[joint], bounds[joint + 1]
        for by_stop, by_start in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1)):
            moved = [(one, begin, stop + by_stop), (other, start + by_start, end)]
            yield from self._path([*bounds[:joint], *moved, *bounds[joint + 2 :]])

    def _put_back(self, bounds: list[Bound], joint: int) -> Iterator[Path]:
        (one, _, stop), (other, start, _) = bounds[joint], bounds[joint + 1]
        if one == other:
            for first in range(stop + 1, start - 1):
                yield from self._path([*bounds[: joint + 1], (one, first, first + 1), *bounds[joint + 1 :]])

    def _brought_in(self, bounds: list[Bound], joint: int) -> Iterator[Path]:
        (one, _, stop), (other, start, _) = bounds[joint], bounds[joint + 1]
        for third, depth in enumerate(self.depths):
            if third == one == other:
                continue
            about = {one: stop, other: start - 1}.get(third, depth * stop // self.depths[one])
            for first in (about - 1, about, about + 1):
                for length in (1, 2):
                    piece = (third, first, first + length)
                    yield from self._path([*bounds[: joint + 1], piece, *bounds[joint + 1 :]])

    def _again(self, bounds: list[Bound], joint: int) -> Iterator[Path]:
        (one, _, stop), (other, start, _) = bounds[joint], bounds[joint + 1]
        for piece in ((one, stop - 1, stop), (other, start, start + 1)) if self.repeated else ():
            yield from self._path([*bounds[: joint + 1], piece, *bounds[joint + 1 :]])

    def _other_front(self, bounds: list[Bound]) -> Iterator[Path]:
        anchor, _, stop = bounds[0]
        for other, depth in enumerate(self.depths):
            if other != anchor:
                about = depth * stop // self.depths[anchor]
                for end in (about - 1, about, about + 1):
                    yield from self._path([(other, 0, end), *bounds[1:]])
                    yield from self._path([(other, 0, end), (anchor, stop - 1, stop), *bounds[1:]])

    def _path(self, bounds: list[Bound]) -> Iterator[Path]:
        """The path of these slices, if it is one: parts without blocks go, neighbours without a gap become one."""
        kept: list[Bound] = []
        for number, (anchor, start, stop) in enumerate(bounds):
            last = number == len(bounds) - 1
            if not (0 <= start <= stop <= self.depths[anchor]) or (last and stop != self.depths[anchor]):
                return
            if kept and kept[-1][0] == anchor and kept[-1][2] == start:
                kept[-1] = (anchor, kept[-1][1], stop)
            elif stop > start or last:
                kept.append((anchor, start, stop))
        if kept[0][1] or kept[0][2] == 0 or len(kept) - 1 > self.most or len(kept) == 1:
            return
        if any(stop - start < self.least for _, start, stop in kept[:-1]):
            return
        if all(
            _joins(self.grids[one][stop], self.grids[other][start])
            for (one, _, stop), (other, start, _) in pairwise(kept)
        ):
            *front, (anchor, start, _) = kept
            path = Path((*(Slice(*bound) for bound in front), Slice(anchor, start)))
            if self.repeated or not path.repeats:
                yield path


def _joins(one: Grid, other: Grid) -> bool:
    """Whether a joint leads from one grid to another; class tokens can be left out, not made up."""
    return one[:2] == other[:2] and other[2] in (0, one[2])
