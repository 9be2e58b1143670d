"""What a model costs, and a budget in the words that people use: a share of the dearest anchor, parameters, bytes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}
_BYTES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_NUMBER = re.compile(r"\s*([\d.]+)\s*([a-zA-Z%]*)\s*")


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


@dataclass(frozen=True)
class Budget:
    """What a model may cost at most; None is no limit.

    Attributes:
        share: of the dearest anchor's MACs.
        macs, parameters: numbers.
        weight_bytes: bytes of the weights, in the dtype of the dearest anchor.
        text: as it was given.

    Example:
        >>> whole = Cost(macs=1000, parameters=50)
        >>> Budget.of("60%").allows(Cost(macs=600, parameters=90), whole, bytes_per_parameter=2)
        True
        >>> Budget.of("1 KB").allows(Cost(macs=600, parameters=501), whole, bytes_per_parameter=2)
        False
    """

    share: float | None = None
    macs: int | None = None
    parameters: int | None = None
    weight_bytes: int | None = None
    text: str = ""

    @classmethod
    def of(cls, budget: "Budget | Cost | str | float") -> "Budget":
        """Accept a share (0.6, "60%"), parameters ("2B"), bytes of weights ("4 GB") or a `Cost` where one is expected.

        Raises:
            TypeError, ValueError: anything else.
        """
        if isinstance(budget, Budget):
            return budget
        if isinstance(budget, Cost):
            return cls(macs=budget.macs, parameters=budget.parameters, text=f"{budget.macs:,} MACs")
        if isinstance(budget, int | float) and not isinstance(budget, bool):
            return cls._share(float(budget), str(budget))
        if not isinstance(budget, str):
            raise TypeError(f"got budget={budget!r}; expected {_FORMS}")
        found = _NUMBER.fullmatch(budget)
        try:
            number, unit = (float(found[1]), found[2].upper()) if found else (0.0, "?")
        except ValueError:
            number, unit = 0.0, "?"
        if unit == "%":
            return cls._share(number / 100, budget)
        if unit in _BYTES:
            return cls(weight_bytes=int(number * _BYTES[unit]), text=budget)
        if unit == "" and number <= 1:
            return cls._share(number, budget)
        if unit in _UNITS:
            return cls(parameters=int(number * _UNITS[unit]), text=budget)
        raise ValueError(f"got budget={budget!r}; expected {_FORMS}")

    @classmethod
    def _share(cls, share: float, text: str) -> "Budget":
        if not 0 < share <= 1:
            raise ValueError(
                f"got a budget of {share:.0%} of the dearest anchor; expected more than 0 and at most 100 %"
            )
        return cls(share=share, text=text)

    def allows(self, cost: Cost, dearest: Cost, bytes_per_parameter: float) -> bool:
        """Whether a model of this cost is within it."""
        return all(value <= limit for value, limit in self._limits(cost, dearest, bytes_per_parameter))

    def is_above(self, dearest: Cost, bytes_per_parameter: float) -> bool:
        """Whether it leaves room even beside the dearest anchor."""
        return all(value < limit for value, limit in self._limits(dearest, dearest, bytes_per_parameter))

    def _limits(self, cost: Cost, dearest: Cost, bytes_per_parameter: float) -> list[tuple[float, float]]:
        """What a model takes, and what it may take, wherever there is a limit."""
        limits = (
            (cost.macs, None if self.share is None else self.share * dearest.macs),
            (cost.macs, self.macs),
            (cost.parameters, self.parameters),
            (cost.parameters * bytes_per_parameter, self.weight_bytes),
        )
        return [(value, limit) for value, limit in limits if limit is not None]


def check_budget(budget: Budget, costs: Sequence[Cost], dearest: Cost, bytes_per_parameter: float) -> None:
    """Raise ValueError, with the range, for a budget that no model meets, or that leaves room beside the dearest.

    Args:
        costs: of the models that can be had.
    """
    above = budget.is_above(dearest, bytes_per_parameter)
    if not above and any(budget.allows(cost, dearest, bytes_per_parameter) for cost in costs):
        return
    cheapest = min(costs, key=lambda cost: cost.macs)
    sizes = [
        f"{cost.macs / dearest.macs:.1%} of the dearest anchor's MACs ({cost.parameters:,} parameters, "
        f"{cost.parameters * bytes_per_parameter / 1e9:.3g} GB)"
        for cost in (cheapest, dearest)
    ]
    where = "above the dearest anchor itself" if above else "below what any path found here reaches"
    raise ValueError(f"got a budget of {budget.text}, {where}; expected at least {sizes[0]} and at most {sizes[1]}")


_FORMS = 'a share of the dearest anchor\'s MACs (0.6 or "60%"), parameters ("2B"), bytes of weights ("4 GB") or a Cost'
