"""What a search found: functional KL and cost of paths of every kind, the best of every size."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain, zip_longest
from pathlib import Path as File
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from klas_hf import plotting
from klas_hf.budgets import COSTS, Budget, Cost, check_budget
from klas_hf.files import understood, write_atomically
from klas_hf.paths import Path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEAR = 1.25  # times the least divergence: beyond it one path in ten heals better, and by little (LOG.md)
FAR = 3  # times the least divergence: between other ends, what healed best lay within 2.4 times it (LOG.md)
LONG = 400  # steps of healing, from which on the last block of an anchor is worth more than its start says (LOG.md)
# Nats up to which the same path, joined as it is, heals better in 100 steps than with merged joints, in 31 of 40 pairs
# of Llamas, ViTs and Swins (of ResNets' layers the mean says so, but 8 of 15 pairs alone). In 300 steps 17 of 18 pairs
# of Llamas did, which start at up to .165 nats, and in 1,000 six of eight, at up to .46 (LOG.md).
UNTOUCHED = 0.05
KINDS = ("anchor", "pruned", "stitch", "mixed", "repeated")


class Ends(NamedTuple):
    """The anchors that a path begins and ends with, and whether it has the last block of the latter."""

    first: int
    last: int
    whole: bool = True


@dataclass(frozen=True)
class PathScores:
    """Functional KL of paths through some anchors, and what they cost; the anchors themselves are among them.

    Attributes:
        paths: through the anchors, by position.
        divergence, error: `(paths,)` KL(dearest ‖ path) in nats per token or image, and its standard error.
        costs: of each path.
        names: of the anchors.
        bytes_per_parameter: of the dearest anchor's dtype.
        provenance: fingerprints, settings, versions, forwards that it took.
        joints: of each path, what `StitchedModel.from_path` is to make of its joints, and what its cost is for.
        depths: number of blocks of each anchor.
        cost: what the search was for the best of every size of, one of `COSTS`.
        seamless: whether each path's slices can follow each other as they are; empty: where joints are merged.

    Example:
        >>> found = search_paths([source, target], batches, tokens=16)
        >>> found.best("70%").joints > 0, found.best(1.0) == Path.parse("1[:]")
        (True, True)
        >>> PathScores.load(found.save(folder / "paths.safetensors")).paths == found.paths
        True
    """

    paths: tuple[Path, ...]
    divergence: np.ndarray
    error: np.ndarray
    costs: tuple[Cost, ...]
    names: tuple[str, ...]
    bytes_per_parameter: float
    provenance: Mapping[str, Any] = field(default_factory=dict)
    joints: tuple[str, ...] = ()
    depths: tuple[int, ...] = ()
    cost: str = "macs"
    seamless: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if not self.joints:
            object.__setattr__(self, "joints", ("least_squares",) * len(self.paths))
        if not self.seamless:
            object.__setattr__(self, "seamless", tuple(joint == "merged" for joint in self.joints))
        if not self.depths:
            ends = [max(one.start, one.stop or 0, 1) for path in self.paths for one in path.slices]
            object.__setattr__(self, "depths", (max(ends, default=1),) * len(self.names))

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        lines = [
            f"{len(self)} paths through {', '.join(self.names)}; the best of every size, nats against the dearest:"
        ]
        costs, name = self._values(None), "MACs" if self.cost == "macs" else self.cost
        for path in self.pareto():
            place = self.place(path)
            share = costs[place] / costs[self._dearest]
            lines.append(f"  {share:4.0%} of the {name}: {path}  {self.divergence[place]:.4f} ({kind_of(path)})")
        return "\n".join(lines)

    def place(self, path: Path) -> int:
        """Where a path stands.

        Raises:
            ValueError: it was not scored.
        """
        if path not in self._places:
            raise ValueError(f"got path {path}, which was not scored; expected one of the {len(self)} in paths")
        return self._places[path]

    def joint(self, path: Path, *, steps: int = 0, known: bool = True) -> str:
        """What the joints of a path are to be: "least_squares" layers, or "merged" into the blocks before.

        Args:
            steps: that the path is to be healed for: then it is "identity", where slices can follow each other as they
                are and the divergence is at most .05 nats, or .05 for each 100 steps, since that little is repaired
                sooner than what least squares do to the weights, and a layer costs something.
            known: whether the dearest anchor knows the data that it is healed on; else its states are nothing to fit
                joints to, and what can follow as it is does so at any divergence.
        """
        place = self.place(path)
        near = not known or self.divergence[place] <= UNTOUCHED * max(1, steps / 100)
        return "identity" if steps and near and self.seamless[place] else self.joints[place]

    def share(self, path: Path) -> float:
        """A path's MACs as a share of the dearest anchor's."""
        return self.costs[self.place(path)].macs / self.dearest.macs

    @property
    def dearest(self) -> Cost:
        """The cost of the dearest anchor."""
        return self.costs[self._dearest]

    def pareto(self, over: str | None = None) -> tuple[Path, ...]:
        """The paths that no cheaper or equally dear one, anchors included, is predicted to beat, cheapest first.

        Args:
            over: one of `COSTS`; None: what was searched over.

        Raises:
            ValueError: it is unknown, or was not measured.
        """
        costs = self._values(over)
        order = sorted(range(len(self)), key=lambda n: (costs[n], self.divergence[n]))
        best, kept = np.inf, []
        for place in order:
            if self.divergence[place] < best:
                best = self.divergence[place]
                kept.append(self.paths[place])
        return tuple(kept)

    def best(self, budget: Budget | Cost | str | float) -> Path:
        """The path of least divergence within a budget (see `Budget.of`).

        Raises:
            ValueError: no path is within it, or it is above the dearest anchor; the range that can be had is named.
        """
        return self.contenders(budget, 1)[0]

    def contenders(
        self, budget: Budget | Cost | str | float, count: int = 4, *, steps: int = 0, known: bool = True
    ) -> tuple[Path, ...]:
        """The best path within a budget, and others that may be better than it once they are healed.

        How much a path gains by healing depends on the anchors that it begins and ends with, which its start does not
        show, and what lies within a quarter of the least divergence is often better in the end (LOG.md). So the best
        whole anchor follows, for a path must do better than that; then, in turn, those so near between the same ends,
        and the best between others, first those that end with the dearest anchor, from which they are to learn, if
        their divergence is at most three times the least; of a stitch and further joints, which gain least, only where
        there is none simpler.

        Args:
            budget: see `Budget.of`.
            count: paths at most. The dearest anchor, where the budget allows it, contends alone.
            steps: that each is to be healed for. The more, the less a start says: what is between other ends may be
                3 · √(steps / 100) times as far then, 6 times at most; and from 400 steps on to have the last block of
                an anchor and to be without it are other ends, too, those with it first (of the dearest anchor however
                far they start), and of what lies within a quarter of the best between its ends the dearest contends.
            known: whether the dearest anchor knows the data that paths are to learn. Where it does not, to be far from
                it says little: the best between other ends contends then, however far it starts.

        Returns:
            Paths, that of least divergence first.

        Raises:
            ValueError: as `best`, or a count below 1.

        Example:
            >>> found = search_paths([source, target], batches, tokens=16)
            >>> found.contenders("70%", 3)[0] == found.best("70%"), len(found.contenders(1.0, 3))
            (True, 1)
        """
        if count < 1:
            raise ValueError(f"got count={count}; expected at least 1")
        wanted = Budget.of(budget)
        check_budget(wanted, self.costs, self.dearest, self.bytes_per_parameter)
        within = [n for n, cost in enumerate(self.costs) if wanted.allows(cost, self.dearest, self.bytes_per_parameter)]
        ranked = [self.paths[n] for n in sorted(within, key=lambda n: (self.divergence[n], self.costs[n].macs))]
        best = ranked[0]
        if not best.joints and self.costs[self.place(best)] == self.dearest:
            return (best,)
        dearest = self.paths[self._dearest].slices[0].anchor
        first = (best, *[path for path in ranked if not path.joints and path != best][:1])
        reach = FAR * min(max(1, math.sqrt(steps / 100)), 2)
        long = steps >= LONG
        reached = self._within(reach, ranked) if known else ranked
        if long:
            tailless = Ends(dearest, dearest, whole=False)
            cut = [path for path in ranked if ends_of(path, self.depths, tails=True) == tailless]
            reached = list(dict.fromkeys([*reached, *cut]))
        between = self._between(reached, long)
        own = ends_of(best, self.depths, tails=long)
        others = [ends for ends, path in between.items() if ends != own and path not in first]
        others.sort(key=lambda ends: (not ends.whole, ends.last != dearest, ranked.index(between[ends])))
        near = [path for path in self._within(NEAR, ranked) if path not in first]
        alike = [path for path in near if ends_of(path, self.depths) == ends_of(best, self.depths)]
        in_turn = chain.from_iterable(zip_longest(alike, map(between.get, others)))
        return tuple(dict.fromkeys(path for path in (*first, *in_turn) if path is not None))[:count]

    def _between(self, ranked: Sequence[Path], long: bool) -> dict[Ends, Path]:
        """The best path between any two ends, a mixture where there is none simpler, and none that its anchor beats.

        Where healing is long, the dearest of those that are nearly as near: then loss follows cost more than the start.
        """
        between: dict[Ends, list[Path]] = {}
        whole: set[int] = set()
        for path in ranked:
            whole |= {path.slices[0].anchor} if not path.joints else set()
            beaten = kind_of(path) == "pruned" and path.slices[0].anchor in whole
            if (ends := ends_of(path, self.depths, tails=long)) is not None and not beaten:
                between.setdefault(ends, []).append(path)
        found = {}
        for ends, paths in between.items():
            simple = [path for path in paths if kind_of(path) != "mixed"] or paths
            found[ends] = max(self._within(NEAR, simple), key=self.share) if long else simple[0]
        return found

    def _within(self, times: float, ranked: Sequence[Path]) -> list[Path]:
        """The paths that start at most so many times as far as the first."""
        bar = times * self.divergence[self.place(ranked[0])]
        return [path for path in ranked if self.divergence[self.place(path)] <= bar]

    def plot(self, path: str | File | None = None, *, over: str | None = None) -> "Figure":
        """Divergence over cost: kinds of paths by colour, the best of every size, the line between the anchors.

        Args:
            path: where PNG and SVG are written, beside each other; None writes nothing.
            over: as for `pareto`.
        """
        over = over or self.cost
        values = self._values(over)
        label, unit = COSTS[over] if over != "macs" else ("share of the dearest anchor's MACs", self.dearest.macs)
        shares = values / unit
        series = []
        for kind in KINDS:
            places = [n for n, one in enumerate(self.paths) if kind_of(one) == kind]
            if places:
                order = sorted(places, key=lambda n: shares[n])
                xs, ys = (list(values[order]) for values in (shares, self.divergence))
                series.append(plotting.Series(kind, xs, ys, line=kind == "anchor"))
        front = [self.place(one) for one in self.pareto(over)]
        series.append(plotting.Series("best of every size", list(shares[front]), list(self.divergence[front])))
        return plotting.lines(series, label, "KL to the dearest anchor, nats", "Paths by cost", path)

    def _values(self, over: str | None) -> np.ndarray:
        """A cost of every path."""
        values = [cost.of(over or self.cost, self.bytes_per_parameter) for cost in self.costs]
        return np.array(values, dtype=np.float64)

    def save(self, path: str | File) -> File:
        """Write to `path` as one safetensors file, whole or not at all."""
        plain = {
            "paths": [str(one) for one in self.paths],
            "costs": [asdict(cost) for cost in self.costs],
            "names": list(self.names),
            "bytes_per_parameter": self.bytes_per_parameter,
            "provenance": dict(self.provenance),
            "joints": list(self.joints),
            "depths": list(self.depths),
            "cost": self.cost,
            "seamless": list(self.seamless),
        }
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in ("divergence", "error")}
        return write_atomically(path, lambda part: save_file(arrays, part, {"klas_hf_paths": json.dumps(plain)}))

    @classmethod
    def load(cls, path: str | File) -> "PathScores":
        """Read what `save` wrote to `path`.

        Raises:
            ValueError: a file of something else.
            OSError: no file.
        """
        with understood(path, "a whole file of PathScores.save"), safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in {"divergence", "error"} & set(file.keys())}
        if "klas_hf_paths" not in metadata:
            raise ValueError(f"got {path}, a file without path scores; expected one of PathScores.save")
        with understood(path, "a whole file of PathScores.save"):
            plain = json.loads(metadata["klas_hf_paths"])
            return cls(
                tuple(map(Path.parse, plain["paths"])), **arrays, costs=tuple(Cost(**cost) for cost in plain["costs"]),
                names=tuple(plain["names"]), bytes_per_parameter=plain["bytes_per_parameter"],
                provenance=plain["provenance"], joints=tuple(plain["joints"]), depths=tuple(plain["depths"]),
                cost=plain.get("cost", "macs"), seamless=tuple(plain.get("seamless", ())),
            )  # fmt: skip

    @cached_property
    def _dearest(self) -> int:
        """The place of the dearest anchor."""
        return max((n for n, path in enumerate(self.paths) if not path.joints), key=lambda n: self.costs[n].macs)

    @cached_property
    def _places(self) -> dict[Path, int]:
        return {path: place for place, path in enumerate(self.paths)}


def kind_of(path: Path) -> str:
    """An "anchor" alone, one "pruned", a "stitch" of two, a "mixed" path, or one that has a block "repeated"."""
    if not path.joints:
        return "anchor"
    if path.repeats:
        return "repeated"
    if len(path.anchors) == 1:
        return "pruned"
    return "stitch" if path.stitch is not None else "mixed"


def ends_of(path: Path, depths: Sequence[int], *, tails: bool = False) -> Ends | None:
    """Where a path through anchors of so many blocks begins and ends; without tails, as if it had the last block.

    None where it has no block of the anchor that it ends with, only its head.
    """
    bounds = path.bounds(depths)
    blocks = [anchor for anchor, start, stop in bounds if stop > start]
    last, start, stop = bounds[-1]
    return Ends(blocks[0], last, stop > start or not tails) if blocks[-1] == last else None


def as_scores(found: Mapping[Path, tuple[float, float]], costs: Sequence[Cost], **about: Any) -> PathScores:
    """Scores of paths, as one value."""
    values = np.array(list(found.values()), dtype=np.float64).reshape(-1, 2)
    return PathScores(tuple(found), values[:, 0], values[:, 1], tuple(costs), **about)
