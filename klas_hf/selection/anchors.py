"""Which anchors to stitch with which: the divergence between their own outputs (KLAS Sec. 4.2 and Alg. 3, line 2).

The paper takes Swin Ti→B alone, but DeiT Ti→S and S→B, without a formula. Our reading, which reproduces both: the path
from the cheapest to the dearest anchor whose summed last-block KL is least.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from klas_hf import plotting
from klas_hf.tables import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pair = tuple[int, int]
AnchorRule = Literal["least_kl", "nearest", "all"]


@dataclass(frozen=True, eq=False)
class AnchorSelection:
    """Pairs of anchors to stitch, and what they were chosen by (KLAS Alg. 3, line 2).

    Attributes:
        names: of the anchors.
        macs: MACs of each.
        divergence: `(k, k)` KL(a ‖ b) in nats between the outputs of anchors a and b.
        pairs: positions (source, target) of the chosen pairs, the cheaper anchor first.
        rule: name of the rule.

    Raises:
        ValueError: an anchor listed twice, or values of other shapes.

    Example:
        >>> chosen = AnchorSelection(
        ...     ("small", "large"), (1_000_000, 4_000_000), np.array([[0.0, 0.3], [0.4, 0.0]]), ((0, 1),), "least_kl"
        ... )
        >>> print(chosen)
        | source | target | M MACs    | KL, nats | least_kl |
        |--------|--------|-----------|----------|----------|
        | small  | large  | 1.0 → 4.0 | 0.3000   | yes      |
    """

    names: tuple[str, ...]
    macs: tuple[int, ...]
    divergence: NDArray[np.float64]
    pairs: tuple[Pair, ...]
    rule: str

    def __post_init__(self) -> None:
        if twice := sorted({name for name in self.names if self.names.count(name) > 1}):
            raise ValueError(f"got the anchors {twice} more than once; expected each anchor once")
        _check(self.divergence, self.macs)
        if len(self.names) != len(self.macs):
            raise ValueError(f"got {len(self.names)} names for {len(self.macs)} anchors; expected one each")

    def __str__(self) -> str:
        """A Markdown table of all pairs, the cheaper anchor first, with the chosen ones marked."""
        cells = [["source", "target", "M MACs", "KL, nats", self.rule]]
        for a, b in sorted(_upwards(self.macs), key=lambda pair: self.divergence[pair]):
            macs = f"{self.macs[a] / 1e6:,.1f} → {self.macs[b] / 1e6:,.1f}"
            chosen = "yes" if (a, b) in self.pairs else ""
            cells.append([self.names[a], self.names[b], macs, f"{self.divergence[a, b]:.4f}", chosen])
        return markdown_table(cells)

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Heatmap of the divergences in nats with the chosen pairs marked; writes PNG and SVG if `path` is given."""
        panels = {"KL(source ‖ target), nats": self.divergence}
        names = self.names, self.names
        return plotting.heatmaps(panels, "target", "source", path, names=names, marks=self.pairs)


def choose_pairs(
    divergence: NDArray[np.float64], macs: Sequence[int], rule: AnchorRule = "least_kl"
) -> tuple[Pair, ...]:
    """Positions (source, target) of the anchors to stitch; a source always costs less than its target.

    Args:
        divergence: `(k, k)` last-block KL(a ‖ b) in nats of every pair.
        macs: `(k,)` MACs of the anchors, in any order.
        rule: "least_kl" takes the path from the cheapest to the dearest anchor along which the divergences sum to the
            least (KLAS), "nearest" the neighbours by MACs (SN-Net), "all" every pair.

    Raises:
        ValueError: an unknown rule, fewer than two anchors, a divergence that is not finite, or anchors that all cost
            the same ("nearest": two of them).
    """
    rules: dict[str, Callable[[], list[Pair]]] = {
        "least_kl": lambda: _least_path(divergence, macs),
        "nearest": lambda: _nearest(macs),
        "all": lambda: _upwards(macs),
    }
    if rule not in rules:
        raise ValueError(f"got rule={rule!r}; expected one of {sorted(rules)}")
    _check(divergence, macs)
    return tuple(rules[rule]())


def _least_path(divergence: NDArray, macs: Sequence[int]) -> list[Pair]:
    """Shortest path over anchors sorted by cost: no cycles, so one sweep settles every anchor."""
    order = sorted(range(len(macs)), key=lambda anchor: macs[anchor])
    best: dict[int, tuple[float, list[int]]] = {}
    for b in order:
        ways = [(best[a][0] + float(divergence[a, b]), [*best[a][1], b]) for a in order if macs[a] < macs[b]]
        best[b] = min(ways, default=(0.0, [b]))
    _, path = min(best[b] for b in order if macs[b] == max(macs))
    return list(pairwise(path))


def _nearest(macs: Sequence[int]) -> list[Pair]:
    pairs = list(pairwise(sorted(range(len(macs)), key=lambda anchor: macs[anchor])))
    if same := [pair for pair in pairs if macs[pair[0]] == macs[pair[1]]]:
        raise ValueError(f"got anchors {same} of equal MACs, of which neither is nearer; expected different costs")
    return pairs


def _upwards(macs: Sequence[int]) -> list[Pair]:
    """Every pair whose first anchor costs less."""
    return [(a, b) for a in range(len(macs)) for b in range(len(macs)) if macs[a] < macs[b]]


def _check(divergence: NDArray, macs: Sequence[int]) -> None:
    if divergence.shape != (len(macs), len(macs)) or len(macs) < 2:
        raise ValueError(
            f"got divergences of shape {divergence.shape} and {len(macs)} costs; expected at least two anchors and a "
            "square of their divergences"
        )
    if not np.isfinite(divergence).all():
        raise ValueError("got divergences that are NaN or infinite; expected finite ones. Check the anchors' weights")
    if min(macs) == max(macs):
        raise ValueError(f"got anchors that all cost {macs[0]:,} MACs; expected a cheaper and a dearer one")
