"""Keys and values that the paths of a language supernet share: one sequence of tokens, read on several paths.

What a block sees depends on the blocks and stitching layers before it, so two paths that begin with the same ones have
the same keys and values there. Kept for a sequence of tokens are the keys and values of every block that it went
through, by all that came before them, and the states behind the blocks where paths of the supernet part: from such a
state another path runs its own blocks alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from klas_hf.paths import Path

Steps = tuple[Any, ...]  # blocks, as (anchor, number), and numbers of stitching layers, in the order they run


@dataclass
class _Sequence:
    """Tokens, and what was found of their beginning: `(1, KV heads, tokens, head width)`, `(1, tokens, width)`."""

    ids: list[int] = field(default_factory=list)
    layers: dict[Steps, tuple[Tensor, Tensor]] = field(default_factory=dict)
    states: dict[Steps, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        pairs = sum(keys.nbytes + values.nbytes for keys, values in self.layers.values())
        return pairs + sum(state.nbytes for state in self.states.values())

    def length(self, steps: Steps) -> int:
        """Tokens whose keys and values are known behind these steps."""
        return self.layers[steps][0].shape[-2] if steps in self.layers else 0


@dataclass(frozen=True)
class Known:
    """What is kept of the beginning of a sequence on a path.

    Attributes:
        front: blocks of the path that need not run on the first `tokens` tokens.
        tokens: that these blocks have seen.
        behind: tokens that the blocks behind them have seen too.
        layers: keys and values of every block, of so many tokens; None where there are none.
        states: behind blocks where paths part, by the block's number.
    """

    front: int
    tokens: int
    behind: int
    layers: Sequence[tuple[Tensor, Tensor] | None]
    states: Mapping[int, Tensor]


class PrefixCache:
    """What `supernet.generate(…, prefixes=cache)` has read, for the requests that follow, on any path.

    A request whose tokens begin as those of an earlier one is not read anew as far as they agree: on the same path not
    at all, on another only by the blocks behind the place where the paths part. For that the states there are kept too,
    which take `width` numbers a token for each such place. What was used longest ago goes first; all goes when the
    weights change. Layers with a sliding window keep all tokens here.

    Args:
        max_bytes: that may be kept.

    Attributes:
        reused: tokens times blocks that did not have to run.

    Example:
        >>> supernet = StitchedSupernet.from_anchors([source, target], [(1, 2), (1, 3)], calibration=batches)
        >>> cache, prompt = PrefixCache(), batches[0]["input_ids"][:1]  # 16 tokens
        >>> first = supernet.generate(prompt, path=(1, 2), prefixes=cache, max_new_tokens=4)
        >>> second = supernet.generate(prompt, path=(1, 3), prefixes=cache, max_new_tokens=4)
        >>> torch.equal(second, supernet.generate(prompt, path=(1, 3), max_new_tokens=4)), cache.reused
        (True, 15)
    """

    def __init__(self, max_bytes: int = 1 << 30):
        if max_bytes < 1:
            raise ValueError(f"got max_bytes={max_bytes}; expected at least 1")
        self.max_bytes, self.reused = max_bytes, 0
        self._sequences: list[_Sequence] = []  # that used last comes last
        self._weights: Any = None
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        with self._lock:
            return sum(one.nbytes for one in self._sequences)

    def find(self, ids: Sequence[int], steps: Sequence[Steps], weights: Any) -> Known:
        """What is kept of a sequence on a path, of all but its last token: what saves most.

        Args:
            ids: of the tokens.
            steps: of every block of the path, itself and what comes before it.
            weights: what changes when the supernet's do.
        """
        with self._lock:
            if weights != self._weights:
                self._weights = weights
                self._sequences.clear()
            best, found = _nothing(len(steps)), None
            for one in self._sequences:
                known = _known(one, min(agreeing(one.ids, ids), len(ids) - 1), steps)
                if _saved(known) > _saved(best):
                    best, found = known, one
            if found is not None:
                self._sequences.remove(found)
                self._sequences.append(found)
            self.reused += _saved(best)
            return best

    def keep(
        self, ids: list[int], steps: Sequence[Steps], cache: Cache, states: Mapping[int, Tensor], weights: Any
    ) -> None:
        """Keep what a path has found of a sequence, unless the weights are others by now.

        Args:
            ids: of the tokens that it has seen.
            steps: of every block of the path, itself and what comes before it.
            cache: of the path's model.
            states: behind blocks where paths part, by the block's number.
            weights: as for `find`.
        """
        with self._lock:
            if weights != self._weights:
                return
            agree = (one for one in self._sequences if agreeing(one.ids, ids) == min(len(one.ids), len(ids)))
            one = next(agree, None) or _Sequence()
            if one in self._sequences:
                self._sequences.remove(one)
            self._sequences.append(one)
            one.ids = max(one.ids, ids, key=len)
            for number, (step, layer) in enumerate(zip(steps, cache.layers, strict=True)):
                if one.length(step) < len(ids):
                    one.layers[step] = layer.keys, layer.values
                    if number in states:
                        one.states[step] = states[number]
            while sum(one.nbytes for one in self._sequences) > self.max_bytes:
                del self._sequences[0]


def steps_of(bounds: Sequence[tuple[int, int, int]], joints: Sequence[int]) -> list[Steps]:
    """Of every block of a path, itself and what comes before it.

    Args:
        bounds: (anchor, start, stop) of its slices.
        joints: numbers of its stitching layers.
    """
    done: Steps = ()
    found = []
    for number, (place, start, stop) in enumerate(bounds):
        done += tuple(joints[number - 1 : number]) if number else ()
        for block in range(start, stop):
            done += ((place, block),)
            found.append(done)
    return found


def partings(steps: Mapping[Path, Sequence[Steps]]) -> set[Steps]:
    """What is behind the beginnings of paths that go on differently, or end, by the steps of each path."""
    follows: dict[Steps, set[Any]] = {}
    for path, of_path in steps.items():
        for one, other in pairwise([*of_path, (*of_path[-1], str(path.slices[-1]))]):
            follows.setdefault(one, set()).add(other[len(one)])
    return {one for one, after in follows.items() if len(after) > 1}


def cache_of(known: Known) -> DynamicCache:
    """A cache that begins with what is known; the tensors are shared, and never written to."""
    cache = DynamicCache()
    for pair in known.layers:
        layer = DynamicLayer()
        if pair is not None:
            layer.lazy_initialization(*pair)
            layer.keys, layer.values = pair
        cache.layers.append(layer)
    return cache


def agreeing(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    least = min(len(one), len(other))
    return next((place for place in range(least) if one[place] != other[place]), least)


def _nothing(blocks: int) -> Known:
    return Known(blocks, 0, 0, [None] * blocks, {})


def _saved(known: Known) -> int:
    return known.front * known.tokens + (len(known.layers) - known.front) * known.behind


def _known(one: _Sequence, tokens: int, steps: Sequence[Steps]) -> Known:
    """What a sequence holds of its first tokens on a path: of all blocks, or more of those before a parting."""
    lengths = [min(tokens, one.length(step)) for step in steps]
    before = list(accumulate(lengths, min))
    best = front, seen, behind = len(steps), before[-1], before[-1]
    for number, step in enumerate(steps[:-1], 1):
        if step in one.states:
            rest = min(before[number - 1], *lengths[number:])
            if (
                number * before[number - 1] + (len(steps) - number) * rest
                > front * seen + (len(steps) - front) * behind
            ):
                best = front, seen, behind = number, before[number - 1], rest
    front, seen, behind = best
    if not seen:
        return _nothing(len(steps))
    counts = [seen] * front + [behind] * (len(steps) - front)
    layers = [
        (one.layers[step][0][..., :count, :], one.layers[step][1][..., :count, :]) if count else None
        for step, count in zip(steps, counts, strict=True)
    ]
    states = {
        number: one.states[step][:, :count]
        for number, (step, count) in enumerate(zip(steps, counts, strict=True))
        if step in one.states and count
    }
    return Known(front, seen, behind, layers, states)


def joined(states: Sequence[Tensor | None]) -> Tensor:
    """States of tokens that follow each other."""
    return torch.cat([state for state in states if state is not None], dim=1)
