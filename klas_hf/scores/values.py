"""The scores of all stitches between two anchors, as a value: KLAS Eq. 1 and 2 with their intervals.

Beside Γ and Θ stand the measures that KLAS is compared with (Tab. 1, 2, 9 and 10), each from a statistic that a
scoring pass may have gathered.
"""

import json
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from klas_hf import plotting
from klas_hf.actions import Publishable
from klas_hf.files import understood, write_atomically
from klas_hf.maths.estimates import normal_interval
from klas_hf.paths import Stitch
from klas_hf.stitch_costs import StitchCosts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

# The name of the scores in a folder or a repo of the Hub.
SCORES_FILE = "scores.safetensors"

# What probes give: Θ and the capacity.
PROBED = ("cross", "capacity")
# What running the stitched networks gives.
STITCHED = ("functional", "stitched_loss")
# Divergences and losses: scores in nats per token or image.
IN_NATS = ("theta_reversed", "ce", "functional", "functional_theta", "stitched_loss")


@dataclass(frozen=True, eq=False, repr=False)
class StitchScores(Publishable):
    """Scores of every stitch (i, j), lower is better. Divergences are in nats per token (or per image).

    Attributes:
        score: name of the rule that makes `values`, a key of `SCORES`.
        cross: `(m, n)` Θ(i, j), the KL divergence from source probe i to target probe j (Eq. 1).
        capacity: `(n - 1,)` Θ between target probes j and j + 1 (the denominator of Eq. 2).
        cross_error, capacity_error, gamma_error: standard errors over sequences, of the same shapes.
        sequences, tokens: how much data the means are over.
        costs: what each stitch costs.
        provenance: anchors, revisions, probes, library versions and seed, as plain JSON values.
        statistics: what the other scores need, each `(m, n)` laid out as `cross` (row i - 1, column j - 1 for target
            block j = 1…n): "theta_reversed" Θ(P_j^g, P_i^f), "mse" and "ce" of the probes' distributions,
            "dm" 1 − R² of the least-squares map, "cka" and "class_cka" similarities (1: the same up to a rotation),
            "cross_shuffled" Θ of probes trained on shuffled labels; "functional" KL of the target's output to the
            stitched network's at its least-squares start, with "functional_error", and "stitched_loss", that network's
            loss on labels; and `(n - 1,)` "capacity_shuffled".

    Raises:
        ValueError: an unknown score, one whose statistics are missing, or a statistic of another shape.

    Example:
        >>> scores = score_stitches(source, target, batches, score="klas")  # anchors of 3 and 4 blocks
        >>> scores.cross.shape, scores.capacity.shape, scores.gamma.shape
        ((3, 4), (3,), (3, 3))
        >>> bool(scores.value_of(Stitch(2, 1)) == scores.cross[1, 0] / scores.capacity[0])
        True
        >>> low, high = scores.interval("gamma", confidence=0.95)
        >>> StitchScores.load(scores.save(folder / "scores.safetensors")).with_score("theta").score
        'theta'
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
    statistics: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_score(self.score, self._gathered)
        for name, statistic in self.statistics.items():
            expected = self.capacity.shape if name == "capacity_shuffled" else self.cross.shape
            if statistic.shape != expected:
                raise ValueError(f"got the statistic {name!r} of shape {statistic.shape}; expected {expected}")

    @property
    def available(self) -> tuple[str, ...]:
        """Names of the scores whose statistics are here, in the order of `SCORES`."""
        return available_scores(self._gathered)

    @property
    def _gathered(self) -> set[str]:
        """Names of all statistics; Θ and the capacity are nan throughout where no probes were used."""
        probed = PROBED if np.isfinite(self.cross).any() else ()
        return {*self.statistics, *probed}

    def with_score(self, name: str) -> "StitchScores":
        """The same statistics ranked by another score, the `name` of one in `available`.

        Raises:
            ValueError: an unknown score, or one whose statistics are missing.
        """
        return replace(self, score=name)

    @property
    def gamma(self) -> Array:
        """`(m, n - 1)` Γ(i, j) = Θ(i, j) / capacity(j), KLAS Eq. 2; lower is better.

        Not finite, and so no candidate of a selection, where target block j + 1 has no capacity at all.
        """
        return _gamma(self.cross, self.capacity)

    @property
    def staged_gamma(self) -> Array:
        """`(m, n - 1)` Γ with the capacity of a block that begins a stage replaced by its neighbours'; ours.

        Such a block changes the grid, so its capacity outweighs the distance. It counts here with the mean capacity of
        the blocks within the stage that the stitch leads to, or of all blocks within stages where that stage has none.
        """
        stages = self.costs.target_stages
        if stages is None:
            return self.gamma
        boundary = stages[1:] != stages[:-1]
        capacity = self.capacity.copy()
        for place in np.flatnonzero(boundary):
            within = ~boundary & (stages[:-1] == stages[place])
            inner = within if within.any() else ~boundary
            capacity[place] = self.capacity[inner].mean() if inner.any() else self.capacity[place]
        return _gamma(self.cross, capacity)

    @property
    def values(self) -> Array:
        """`(m, n)` the chosen score laid out as `StitchCosts.macs`: row i - 1, column j.

        nan where it is undefined, and where the two blocks cannot be stitched.
        """
        values = np.full(self.cross.shape, np.nan)
        values[:, 1:] = SCORES[self.score](self)
        values[~self.costs.possible] = np.nan
        return values

    @property
    def stitches(self) -> tuple[Stitch, ...]:
        """Every stitch that has a score, in the order of `values` without its nans."""
        ends = self.costs.source, self.costs.target
        return tuple(Stitch(i + 1, j, *ends) for i, j in np.argwhere(np.isfinite(self.values)).tolist())

    def value_of(self, stitch: Stitch) -> float:
        """The score of one stitch; nan where it is undefined."""
        stitch.check(*self.cross.shape)
        return float(self.values[stitch.source_stop - 1, stitch.target_start])

    def interval(self, quantity: str | None = None, confidence: float = 0.95) -> tuple[Array, Array]:
        """Lower and upper ends, in the unit and shape of the `quantity`, of its normal confidence interval.

        Args:
            quantity: "cross", "capacity", "gamma" or "functional", of those that were measured; None takes the one
                that stitches are ranked by.
            confidence: probability that the interval covers the true value, between 0 and 1.

        Raises:
            ValueError: another quantity, or a score that no standard error is known of.
        """
        measured: dict[str, tuple[Array, Array]] = {}
        if set(PROBED) <= self._gathered:
            measured |= {name: (getattr(self, name), getattr(self, f"{name}_error")) for name in (*PROBED, "gamma")}
        if "functional" in self.statistics:
            measured["functional"] = self.statistics["functional"], self.statistics["functional_error"]
        ranking = {"klas": "gamma", "theta": "cross"}.get(self.score, self.score)
        if (quantity or ranking) not in measured:
            raise ValueError(f"got quantity={quantity or ranking!r}; expected one of {list(measured)}")
        return normal_interval(*measured[quantity or ranking], confidence)

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Heatmaps with the best stitch marked, of Θ and Γ where probes gave them, and of another ranking score.

        Γ and the score are blank where two blocks cannot be stitched, and for the last target block.

        Args:
            path: where PNG and SVG are written, beside each other; None writes nothing.
        """
        panels = {}
        if set(PROBED) <= self._gathered:
            panels["Θ, nats (Eq. 1)"] = self.cross
            panels["Γ = Θ / capacity (Eq. 2)"] = self.with_score("klas")._by_target_block
        if self.score not in ("theta", "klas"):
            panels[f"{self.score}, nats" if self.score in IN_NATS else self.score] = self._by_target_block
        return plotting.heatmaps(panels, "target block j", "source block i", path)

    @property
    def _by_target_block(self) -> Array:
        """`(m, n)` values laid out as `cross`: column j - 1 for target block j."""
        return np.pad(self.values[:, 1:], ((0, 0), (0, 1)), constant_values=np.nan)

    def __repr__(self) -> str:
        """A few lines: what was scored on how much, and the best stitch of each fifth of the anchors' cost range."""
        m, n = self.cross.shape
        names = [self.provenance.get(side, {}).get("name", side) for side in ("source", "target")]
        data = f"{self.sequences} sequences, {self.tokens} tokens" if self.costs.tokens else f"{self.sequences} images"
        lines = [
            f"{self.score} of {len(self.stitches)} stitches, lower is better: "
            f"{names[0]} ({m} blocks) → {names[1]} ({n} blocks), on {data}"
        ]
        low, high = self.costs.source_total, self.costs.target_total
        fifth = np.minimum((self.costs.macs - low) * 5 // max(high - low, 1), 4)
        for number in range(5):
            inside = (fifth == number) & (self.costs.macs <= high) & np.isfinite(self.values)
            values = np.where(inside, self.values, np.inf)
            i, j = np.unravel_index(values.argmin(), values.shape)
            if np.isfinite(values[i, j]):
                stitch = Stitch(int(i) + 1, int(j), self.costs.source, self.costs.target)
                share = self.costs.macs[i, j] / high
                lines.append(f"  {share:4.0%} of the target's MACs: {stitch} {values[i, j]:.4g}")
        if others := [name for name in self.available if name != self.score]:
            lines.append(f"with_score also has: {', '.join(others)}")
        return "\n".join(lines)

    def save(self, path: str | Path) -> Path:
        """Write the scores to `path` as one safetensors file, whole or not at all."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        arrays |= {f"costs.{name}": value for name, value in asdict(self.costs).items() if value is not None}
        arrays |= {f"statistics.{name}": value for name, value in self.statistics.items()}
        arrays = {name: np.array(value, order="C") for name, value in arrays.items()}
        plain = {name: getattr(self, name) for name in ("score", "sequences", "tokens", "provenance")}
        return write_atomically(path, lambda part: save_file(arrays, part, {"klas_hf": json.dumps(plain)}))

    @classmethod
    def load(cls, path: str | Path) -> "StitchScores":
        """Read what `save` wrote to `path`.

        Raises:
            ValueError: a file of something else.
            OSError: no file.
        """
        from safetensors import safe_open

        with understood(path, "a whole file of StitchScores.save"), safe_open(path, "np") as file:
            metadata = file.metadata() or {}
        if "klas_hf" not in metadata:
            raise ValueError(f"got {path}, a safetensors file without stitch scores; expected one of StitchScores.save")
        with understood(path, "a whole file of StitchScores.save"):
            arrays = load_file(path)
            costs: dict[str, Any] = _part(arrays, "costs.")
            costs |= {name: int(value) for name, value in costs.items() if not value.ndim}
            plain = json.loads(metadata["klas_hf"])
            plain |= {name: arrays[name] for name in _ARRAYS}
            return cls(**plain, costs=StitchCosts(**costs), statistics=_part(arrays, "statistics."))

    @classmethod
    def from_pretrained(cls, place: str | Path, **hub: Any) -> "StitchScores":
        """Read scores from the Hub, where `push_to_hub` put them, or from a folder that holds `scores.safetensors`.

        Args:
            place: Hub id or folder.
            hub: revision, token, cache_dir, local_files_only … of the Hub.
        """
        if Path(place).is_dir():
            return cls.load(Path(place) / SCORES_FILE)
        from huggingface_hub import hf_hub_download

        return cls.load(hf_hub_download(str(place), SCORES_FILE, **hub))


def _gamma(cross: Array, capacity: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return cross[:, :-1] / capacity


def _part(arrays: dict[str, NDArray], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


_ARRAYS = ("cross", "capacity", "cross_error", "capacity_error", "gamma_error")

# "functional_theta" is ours: the geometric mean of what a stitched network loses at its start and of Θ.
# Each takes the statistics and returns (m, n - 1) values for i = 1…m, j = 1…n-1; lower is better.
SCORES: dict[str, Callable[[StitchScores], Array]] = {
    "klas": lambda scores: scores.gamma,
    "klas_staged": lambda scores: scores.staged_gamma,
    "theta": lambda scores: scores.cross[:, :-1],
    "theta_reversed": lambda scores: scores.statistics["theta_reversed"][:, :-1],
    "mse": lambda scores: scores.statistics["mse"][:, :-1],
    "ce": lambda scores: scores.statistics["ce"][:, :-1],
    "dm": lambda scores: scores.statistics["dm"][:, :-1],
    "cka": lambda scores: 1 - scores.statistics["cka"][:, :-1],
    "class_cka": lambda scores: 1 - scores.statistics["class_cka"][:, :-1],
    "functional": lambda scores: scores.statistics["functional"][:, :-1],
    "functional_theta": lambda scores: np.sqrt(scores.statistics["functional"] * scores.cross)[:, :-1],
    "stitched_loss": lambda scores: scores.statistics["stitched_loss"][:, :-1],
    "klas_shuffled": lambda scores: _gamma(scores.statistics["cross_shuffled"], scores.statistics["capacity_shuffled"]),
}

# The entries of `StitchScores.statistics` that each score is made from.
NEEDED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("klas", "klas_staged", "theta"), PROBED),
    **{name: (name,) for name in ("theta_reversed", "mse", "ce", "dm", "cka", "class_cka")},
    **{name: (name,) for name in ("functional", "stitched_loss")},
    "functional_theta": ("functional", *PROBED),
    "klas_shuffled": ("cross_shuffled", "capacity_shuffled"),
}


def available_scores(statistics: Collection[str]) -> tuple[str, ...]:
    """Names of the scores that these entries of `StitchScores.statistics` give, in the order of `SCORES`."""
    return tuple(name for name in SCORES if set(NEEDED[name]) <= set(statistics))


def check_score(score: str, statistics: Collection[str] = PROBED) -> None:
    """Raise ValueError, naming the scores there are, unless `score` is one that the statistics give.

    Args:
        statistics: names of the entries of `StitchScores.statistics` that are there or will be gathered.
    """
    if score not in SCORES:
        raise ValueError(f"got score={score!r}; expected one of {sorted(SCORES)}")
    known = available_scores(statistics)
    if score not in known:
        missing = [name for name in NEEDED[score] if name not in statistics]
        raise ValueError(
            f"got score={score!r}; expected one of {list(known)}, the scores that the statistics at hand give: "
            f"it needs {missing} as well. Gather them when scoring, or take one of those scores"
        )
