"""The scores of all stitches between two anchors, as a value: KLAS Eq. 1 and 2 with their intervals."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from klas_hf import plotting
from klas_hf.estimates import normal_interval
from klas_hf.files import write_atomically
from klas_hf.stitches import Stitch, StitchCosts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class StitchScores:
    """Scores of every stitch (i, j), lower is better. Divergences are in nats per token (or per image).

    Attributes:
        score: name of the rule that makes `values`, a key of `SCORES`.
        cross: `(m, n)` Θ(i, j), the KL divergence from source probe i to target probe j (Eq. 1).
        capacity: `(n - 1,)` Θ between target probes j and j + 1 (the denominator of Eq. 2).
        cross_error, capacity_error, gamma_error: standard errors over sequences, of the same shapes.
        sequences, tokens: how much data the means are over.
        costs: what each stitch costs.
        provenance: anchors, revisions, probes, library versions and seed, as plain JSON values.
    """

    score: str
    cross: Array
    capacity: Array
    cross_error: Array
    capacity_error: Array
    gamma_error: Array
    sequences: int
    tokens: int
    costs: StitchCosts
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_score(self.score)

    @property
    def gamma(self) -> Array:
        """`(m, n - 1)` Γ(i, j) = Θ(i, j) / capacity(j), KLAS Eq. 2; lower is better.

        Not finite, and so no candidate of a selection, where target block j + 1 has no capacity at all.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.cross[:, :-1] / self.capacity

    @property
    def values(self) -> Array:
        """`(m, n)` the chosen score laid out as `StitchCosts.macs`: row i - 1, column j; nan where undefined."""
        values = np.full(self.cross.shape, np.nan)
        values[:, 1:] = SCORES[self.score](self)
        return values

    @property
    def stitches(self) -> tuple[Stitch, ...]:
        """Every stitch that has a score, in the order of `values` without its nans."""
        return tuple(Stitch(int(i) + 1, int(j)) for i, j in np.argwhere(np.isfinite(self.values)))

    def value_of(self, stitch: Stitch) -> float:
        """The score of one stitch; nan where it is undefined."""
        stitch.check(*self.cross.shape)
        return float(self.values[stitch.source_stop - 1, stitch.target_start])

    def interval(self, quantity: str = "gamma", confidence: float = 0.95) -> tuple[Array, Array]:
        """Lower and upper ends of the confidence interval of "cross", "capacity" or "gamma"."""
        if quantity not in ("cross", "capacity", "gamma"):
            raise ValueError(f"got quantity={quantity!r}; expected 'cross', 'capacity' or 'gamma'")
        return normal_interval(getattr(self, quantity), getattr(self, f"{quantity}_error"), confidence)

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Heatmaps of Θ and Γ with the best stitch marked; writes PNG and SVG beside each other if `path` is given."""
        gamma = np.full(self.cross.shape, np.nan)
        gamma[:, :-1] = self.gamma
        panels = {"Θ, nats (Eq. 1)": self.cross, "Γ = Θ / capacity (Eq. 2)": gamma}
        return plotting.heatmaps(panels, "target block j", "source block i", path)

    def save(self, path: str | Path) -> Path:
        """Write the scores as one safetensors file, whole or not at all."""
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        costs = asdict(self.costs)
        arrays |= {f"costs.{name}": np.asarray(value) for name, value in costs.items()}
        plain = {name: getattr(self, name) for name in ("score", "sequences", "tokens", "provenance")}
        return write_atomically(path, lambda part: save_file(arrays, part, {"klas_hf": json.dumps(plain)}))

    @classmethod
    def load(cls, path: str | Path) -> "StitchScores":
        """Read what `save` wrote."""
        from safetensors import safe_open

        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
        if "klas_hf" not in metadata:
            raise ValueError(f"got {path}, a safetensors file without stitch scores; expected one of StitchScores.save")
        arrays = load_file(path)
        costs = {f.name: arrays[f"costs.{f.name}"] for f in fields(StitchCosts)}
        costs = {name: value if value.ndim else int(value) for name, value in costs.items()}
        plain = json.loads(metadata["klas_hf"])
        return cls(**plain, **{name: arrays[name] for name in _ARRAYS}, costs=StitchCosts(**costs))


_ARRAYS = ("cross", "capacity", "cross_error", "capacity_error", "gamma_error")

# Each takes the statistics and returns (m, n - 1) values for i = 1…m, j = 1…n-1; lower is better.
SCORES: dict[str, Callable[[StitchScores], Array]] = {
    "klas": lambda scores: scores.gamma,
    "theta": lambda scores: scores.cross[:, :-1],
}


def check_score(score: str) -> None:
    """Raise ValueError, naming the known scores, unless `score` is one of them."""
    if score not in SCORES:
        raise ValueError(f"got score={score!r}; expected one of {sorted(SCORES)}")
