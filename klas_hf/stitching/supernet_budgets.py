"""Which path of a supernet a budget asks for."""

from collections.abc import Mapping
from typing import Any

from klas_hf.budgets import Budget, Cost, check_budget
from klas_hf.costs import Usage
from klas_hf.paths import Path
from klas_hf.stitching.supernet_joints import costs_of


def best_path(supernet: Any, budget: Budget, usage: Usage | None) -> Path:
    """The best path within a budget by the supernet's ranking, or the one of most MACs where it has none.

    Raises:
        ValueError: no path is within it, or it is above the dearest anchor.
    """
    costs, dearest = path_costs(supernet, usage)
    size = float(supernet.dtype.itemsize)
    check_budget(budget, list(costs.values()), dearest, size)
    within = [path for path, cost in costs.items() if budget.allows(cost, dearest, size)]
    ranking = supernet.config.ranking
    if ranking is None:
        return max(within, key=lambda path: costs[path].macs)
    return min(within, key=lambda path: ranking.index(str(path)))


def path_costs(supernet: Any, usage: Usage | None = None) -> tuple[dict[Path, Cost], Cost]:
    """Costs of all paths of a supernet, counted or measured once, and of its dearest anchor."""
    kept = supernet.kept_costs
    if usage not in kept:
        costs = costs_of(supernet.config, usage)
        whole = [costs.of(f"{place}[:]") for place in range(len(supernet.anchors))]
        kept[usage] = {path: costs.of(path) for path in supernet.paths}, max(whole, key=lambda cost: cost.macs)
    return kept[usage]


def ranked(supernet: Any, losses: Mapping[Any, float]) -> list[Path]:
    """All paths of a supernet, that of the least loss first; of equals, the cheaper.

    Raises:
        ValueError: a path without a number, or one that is not the supernet's.
    """
    given = {Path.of(path): loss for path, loss in losses.items()}
    missing = [str(path) for path in supernet.paths if path not in given]
    unknown = [str(path) for path in given if path not in supernet.paths]
    if missing or unknown:
        raise ValueError(
            f"got losses of {len(given)} paths, without {', '.join(missing) or 'none'} of the supernet's and with "
            f"{', '.join(unknown) or 'none'} that it does not have; expected one for each of {len(supernet.paths)}"
        )
    costs, _ = path_costs(supernet)
    return sorted(supernet.paths, key=lambda path: (given[path], costs[path].macs))
