"""What a model costs, and a budget in the words that people use: a share of the dearest anchor, bytes, milliseconds."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# What a model can be compared over: its name on an axis, and the unit there.
COSTS = {
    "macs": ("MACs (millions)", 1e6),
    "parameters": ("parameters (millions)", 1e6),
    "kv_bytes_per_token": ("KB of a cached token", 1e3),
    "weight_bytes": ("MB of weights", 1e6),
    "seconds": ("ms to the first token, or of the images", 1e-3),
    "latency": ("ms per token, or of the images", 1e-3),
    "peak_bytes": ("MB of activations", 1e6),
}


@dataclass(frozen=True)
class Cost:
    """What one model costs; MACs are the "FLOPs" of the stitching papers.

    Attributes:
        macs: multiply-accumulates of one forward: over `tokens` tokens, logits of every position included, or over
            one image.
        parameters: parameters stored, each counted once.
        kv_bytes_per_token: bytes that a cached token takes, in the model's dtype; 0 for images.
        tokens: length of the sequence that `macs` is for; 0 for images.
        image_height, image_width: pixels of the image that `macs` is for; 0 for sequences.
        weight_bytes: of all weights, quantised as they will be; 0 where that was not asked for.
        seconds: of one forward over a prompt, to its first token, or over the images; None where not measured, as the
            next two.
        token_seconds: between tokens; None for images.
        peak_bytes: of activations in that forward, beside weights and cache.
        batch: sequences or images that run at once, for these.

    Example:
        >>> cost = Cost(macs=2_500_000, parameters=30_000, kv_bytes_per_token=96, tokens=128)
        >>> cost.macs // cost.tokens, cost.image_height  # MACs per token
        (19531, 0)
    """

    macs: int
    parameters: int
    kv_bytes_per_token: int = 0
    tokens: int = 0
    image_height: int = 0
    image_width: int = 0
    weight_bytes: int = 0
    seconds: float | None = None
    token_seconds: float | None = None
    peak_bytes: int | None = None
    batch: int = 1

    @property
    def details(self) -> dict[str, float]:
        """What is known beside MACs and parameters, by name: for rows, over which curves are drawn."""
        known = {name: getattr(self, name) for name in COSTS if name not in ("macs", "parameters")}
        return {name: value for name, value in known.items() if value}

    def of(self, name: str, bytes_per_parameter: float) -> float:
        """One of the costs.

        Args:
            name: one of `COSTS`.
            bytes_per_parameter: what weights take where they were not counted in bytes.

        Raises:
            ValueError: an unknown name, or what was not measured.

        Example:
            >>> Cost(macs=1000, parameters=50).of("weight_bytes", bytes_per_parameter=2)
            100
        """
        if name not in COSTS:
            raise ValueError(f"got the cost {name!r}; expected one of {', '.join(COSTS)}")
        if name == "weight_bytes":
            return self.weight_bytes or self.parameters * bytes_per_parameter
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"got the cost {name!r}, which was not measured; expected a search with usage=Usage(…)")
        return value

    @property
    def per_second(self) -> float | None:
        """Tokens written, or images, in a second, all sequences together; None where not measured."""
        latency = self.latency
        return None if latency is None else self.batch / latency

    @property
    def latency(self) -> float | None:
        """Seconds between tokens, or of the images; None where not measured."""
        return self.seconds if self.token_seconds is None else self.token_seconds


@dataclass(frozen=True)
class Budget:
    """What a model may cost at most, and how fast it must be at least; None is no limit.

    Attributes:
        share: of the dearest anchor's MACs.
        macs, parameters: numbers.
        weight_bytes: bytes of the weights, in the dtype of the dearest anchor, or as the usage has them quantised.
        kv_bytes_per_token: bytes that a cached token takes.
        seconds: to the first token, or of images.
        latency: seconds between tokens, or of images.
        per_second: tokens or images in a second, at least.
        peak_bytes: of activations.
        text: as it was given.

    Example:
        >>> whole = Cost(macs=1000, parameters=50)
        >>> Budget.of("60%").allows(Cost(macs=600, parameters=90), whole, bytes_per_parameter=2)
        True
        >>> Budget.of("1 KB").allows(Cost(macs=600, parameters=501), whole, bytes_per_parameter=2)
        False
        >>> both = Budget.of("4 GB, 20 ms")
        >>> both.weight_bytes, both.latency
        (4000000000, 0.02)
    """

    share: float | None = None
    macs: int | None = None
    parameters: int | None = None
    weight_bytes: int | None = None
    kv_bytes_per_token: int | None = None
    seconds: float | None = None
    latency: float | None = None
    per_second: float | None = None
    peak_bytes: int | None = None
    text: str = ""

    @classmethod
    def of(cls, budget: "Budget | Cost | str | float") -> "Budget":
        """Accept what a `Cost` is, or words: "60%", "2B", "4 GB", "20 ms", or several, as "4 GB, 20 ms" (see `_FORMS`).

        Raises:
            TypeError, ValueError: anything else.
        """
        if isinstance(budget, Budget):
            return budget
        if isinstance(budget, Cost):
            return cls(macs=budget.macs, parameters=budget.parameters, text=f"{budget.macs:,} MACs")
        if isinstance(budget, int | float) and not isinstance(budget, bool):
            return cls(share=_share(float(budget)), text=str(budget))
        if not isinstance(budget, str):
            raise TypeError(f"got budget={budget!r}; expected {_FORMS}")
        limits: dict[str, Any] = {}
        for term in _terms(budget):
            name, limit = _limit(term, budget)
            if name in limits:
                raise ValueError(f"got budget={budget!r}, which limits {name} twice; expected each limit once")
            limits[name] = limit
        return cls(**limits, text=budget)

    @property
    def cost(self) -> str:
        """The cost that it names first, in its text or else its fields, by its name in `COSTS`: what models within it
        are shown over.

        Example:
            >>> Budget.of("20 ms, 4 GB").cost, Budget.of("60%").cost
            ('latency', 'macs')
        """
        given = [name for name, value in vars(self).items() if value is not None and name != "text"]
        first = _limit(_terms(self.text)[0], self.text)[0] if len(given) > 1 and self.text else given[0]
        return {"share": "macs", "per_second": "latency"}.get(first, first)

    @property
    def timed(self) -> bool:
        """Whether it takes measuring on a device to know what is within it."""
        return any(one is not None for one in (self.seconds, self.latency, self.per_second, self.peak_bytes))

    def allows(self, cost: Cost, dearest: Cost, bytes_per_parameter: float, *, but: str = "") -> bool:
        """Whether a model of this cost is within it.

        Args:
            but: a cost whose limit is left out of account.

        Raises:
            ValueError: it is about what was not measured.
        """
        limits = self._limits(cost, dearest, bytes_per_parameter)
        return all(value <= limit for name, value, limit in limits if name != but)

    def excess(self, cost: Cost, dearest: Cost, bytes_per_parameter: float) -> float:
        """How many times over the budget a model is, by what it exceeds most; at most 1 within it."""
        return max(value / limit for _, value, limit in self._limits(cost, dearest, bytes_per_parameter))

    def is_above(self, dearest: Cost, bytes_per_parameter: float) -> bool:
        """Whether it leaves room even beside the dearest anchor."""
        return all(value < limit for _, value, limit in self._limits(dearest, dearest, bytes_per_parameter))

    def binding(self, dearest: Cost, bytes_per_parameter: float) -> tuple[str, float]:
        """The cost that it limits most, by name (see `COSTS`), and the share of the dearest anchor's that is left.

        Example:
            >>> Budget.of("600, 1 KB").binding(Cost(macs=1000, parameters=1000), bytes_per_parameter=2)
            ('weight_bytes', 0.5)
        """
        limits = self._limits(dearest, dearest, bytes_per_parameter)
        shares = [(name, limit / value if value else math.inf) for name, value, limit in limits]
        return min(shares, key=lambda pair: pair[1], default=("macs", math.inf))

    def _limits(self, cost: Cost, dearest: Cost, bytes_per_parameter: float) -> list[tuple[str, float, float]]:
        """What a model takes of a cost, by its name in `COSTS`, and what it may take, wherever there is a limit."""
        if self.timed and cost.latency is None:
            raise ValueError(
                f"got a budget of {self.text}, and costs that were not measured on a device; expected a search with "
                "usage=Usage(…), which says how the model will be run"
            )
        limits = (
            ("macs", None if self.share is None else self.share * dearest.macs),
            ("macs", self.macs),
            ("parameters", self.parameters),
            ("weight_bytes", self.weight_bytes),
            ("kv_bytes_per_token", self.kv_bytes_per_token),
            ("seconds", self.seconds),
            ("latency", self.latency),
            ("latency", None if self.per_second is None else cost.batch / self.per_second),
            ("peak_bytes", self.peak_bytes),
        )
        return [(name, cost.of(name, bytes_per_parameter), limit) for name, limit in limits if limit is not None]


def check_budget(budget: Budget, costs: Sequence[Cost], dearest: Cost, bytes_per_parameter: float) -> None:
    """Raise ValueError, with the range, for a budget that no model meets, or that leaves room beside the dearest.

    Args:
        costs: of the models that can be had.
    """
    above = budget.is_above(dearest, bytes_per_parameter)
    if not above and any(budget.allows(cost, dearest, bytes_per_parameter) for cost in costs):
        return
    cheapest = min(costs, key=lambda cost: cost.macs)
    sizes = [described(cost, dearest, bytes_per_parameter) for cost in (cheapest, dearest)]
    where = "above the dearest anchor itself" if above else "below what any path found here reaches"
    near = "" if above else _nearest(budget, costs, dearest, bytes_per_parameter)
    raise ValueError(
        f"got a budget of {budget.text}, {where}; expected at least {sizes[0]} and at most {sizes[1]}{near}"
    )


def _nearest(budget: Budget, costs: Sequence[Cost], dearest: Cost, bytes_per_parameter: float) -> str:
    """The three costs that exceed a budget least, in words."""
    excess = {cost: budget.excess(cost, dearest, bytes_per_parameter) for cost in costs}
    near = sorted(excess, key=excess.__getitem__)[:3]
    told = [f"{described(cost, dearest, bytes_per_parameter)}, {excess[cost]:.2f} times the budget" for cost in near]
    return f". The nearest: {'; '.join(told)}"


def described(cost: Cost, dearest: Cost, bytes_per_parameter: float) -> str:
    """A cost in words."""
    size = cost.of("weight_bytes", bytes_per_parameter) / 1e9
    told = [f"{cost.parameters:,} parameters", f"{size:.3g} GB"]
    if cost.seconds is not None and cost.latency is not None and cost.peak_bytes is not None:
        if cost.token_seconds is not None:
            told.append(f"{1e3 * cost.seconds:.3g} ms to the first token")
        told += [f"{1e3 * cost.latency:.3g} ms", f"{cost.batch / cost.latency:.3g}/s"]
        told.append(f"{cost.peak_bytes / 1e6:.3g} MB of activations")
    return f"{cost.macs / dearest.macs:.1%} of the dearest anchor's MACs ({', '.join(told)})"


def _terms(budget: str) -> list[str]:
    """The limits of a budget, as they are given."""
    return re.split(r",|\band\b", budget)


def _limit(term: str, budget: str) -> tuple[str, float]:
    """The name and the value of one limit."""
    found = _TERM.fullmatch(term)
    try:
        number, unit, of = (float(found[1]), found[2].upper(), " ".join(found[3].split())) if found else (0.0, "?", "")
    except ValueError:
        number, unit, of = 0.0, "?", ""
    if unit == "%" or (unit == "" and number <= 1):
        if not of:
            return "share", _share(number / 100 if unit == "%" else number)
    elif unit in _UNITS and not of:
        return "parameters", int(number * _UNITS[unit])
    elif unit in _BYTES and of in _OF_BYTES:
        return _OF_BYTES[of], int(number * _BYTES[unit])
    elif unit in _SECONDS and of in _OF_SECONDS and number > 0:
        return _OF_SECONDS[of], number * _SECONDS[unit]
    elif unit in _RATES and of in ("/s", "per second") and number > 0:
        return "per_second", number
    raise ValueError(f"got budget={budget!r}; expected {_FORMS}")


def _share(share: float) -> float:
    if not 0 < share <= 1:
        raise ValueError(f"got a budget of {share:.0%} of the dearest anchor; expected more than 0 and at most 100 %")
    return share


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}
_BYTES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SECONDS = {"MS": 1e-3, "S": 1.0}
_RATES = ("TOKENS", "IMAGES")
_OF_BYTES = {
    "": "weight_bytes", "of weights": "weight_bytes", "per token": "kv_bytes_per_token",
    "/token": "kv_bytes_per_token", "of activations": "peak_bytes",
}  # fmt: skip
_OF_SECONDS = {
    "": "latency", "per token": "latency", "/token": "latency", "per image": "latency",
    "to the first token": "seconds", "to first token": "seconds",
}  # fmt: skip
_TERM = re.compile(r"\s*([\d.]+)\s*([a-zA-Z%]*)\s*(.*?)\s*")
_FORMS = (
    'a share of the dearest anchor\'s MACs (0.6 or "60%"), parameters ("2B"), bytes of weights ("4 GB"), of a cached '
    'token ("96 KB per token") or of activations ("1 GB of activations"), seconds between tokens ("20 ms") or before '
    '("300 ms to first token"), a rate ("40 tokens/s"), several of them ("4 GB, 20 ms"), or a Cost'
)
