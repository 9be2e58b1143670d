"""Options that say how a model will be run: what seconds and bytes depend on."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from klas_hf.budgets import Budget
    from klas_hf.costs import Usage


@dataclass(frozen=True, kw_only=True)
class UsageOptions:
    """Options of every command that counts seconds or bytes."""

    prompt: int = field(default=128, metadata={"metavar": "N", "help": "tokens that come first, for 20ms"})
    at_once: int = field(default=1, metadata={"metavar": "N", "help": "sequences at once, for 20ms"})
    weight_bits: float | None = field(default=None, metadata={"metavar": "N", "help": "where quantised, for 4GB"})

    def usage(self, budget: "Budget | None" = None) -> "Usage | None":
        """How the model will be run; None where a budget does not depend on it."""
        if budget is not None and not budget.timed and self.weight_bits is None:
            return None
        from klas_hf.costs import Usage

        return Usage(prompt=self.prompt, batch=self.at_once, weight_bits=self.weight_bits)
