"""What a search over paths may look at, and what that takes: from configurations and the data alone, no weight."""

import copy
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from klas_hf.anchors.anchor import Anchor
from klas_hf.anchors.dense import dense_head, is_dense
from klas_hf.anchors.language import anchor_config
from klas_hf.anchors.loading import load_anchors
from klas_hf.anchors.vision import is_vision
from klas_hf.budgets import COSTS, Budget, Cost, check_budget
from klas_hf.costs import PathCosts, Usage, measure_path_costs
from klas_hf.paths import Path
from klas_hf.processes import from_main_process
from klas_hf.scores.functional_settings import FunctionalScoring, calibration_and_scored, enough_rows
from klas_hf.scores.path_scores import KINDS, kind_of
from klas_hf.selection.moves import Moves

GROUP = 128  # paths that are measured in one pass, and written when it ends


@dataclass(frozen=True)
class SearchConfig:
    """How paths are searched.

    Attributes:
        buckets: cost buckets of equal width between `cheapest` and the dearest anchor, each with a best path.
        beam: paths of each bucket that are grown, and measured on all items where no cheaper one is far better.
        joints: that a path may have.
        kinds: of paths, of "pruned", "stitch", "mixed", and "repeated" for those that run a block twice.
        least_slice: blocks that a slice has at least.
        cost: what buckets are of, one of `COSTS`; None: what the budget limits most, MACs without one.
        cheapest: share of the dearest anchor's cost below which nothing is searched.
        screened: share of the scored items that candidates are first measured on.
        forwards: runs of a block on one sequence or image that may be spent; None: three times what scoring all
            stitches between the anchors' costs on all items takes (of one anchor, all its cuts); but where these are
            few, or so are the batches, three times what screening all paths of one joint takes, and a path of every
            bucket on all items.
        merged: joints of paths of one anchor are merged into the blocks before (`joint="merged"`), and cost nothing,
            where its family allows it.
        scoring: how functional KL is measured.

    Raises:
        ValueError: a number out of its range, or an unknown kind.

    Example:
        >>> found = search_paths([source, target], batches, SearchConfig(joints=1, kinds=("pruned",)), tokens=16)
        >>> {len(path.anchors) for path in found.paths}, max(path.joints for path in found.paths)
        ({1}, 1)
    """

    buckets: int = 20
    beam: int = 3
    joints: int = 3
    kinds: tuple[str, ...] = ("pruned", "stitch", "mixed")
    least_slice: int = 1
    cost: str | None = None
    cheapest: float = 0.2
    screened: float = 0.125
    forwards: int | None = None
    merged: bool = True
    scoring: FunctionalScoring = FunctionalScoring(temperature=1.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(self.kinds))
        for name in ("buckets", "beam", "joints", "least_slice"):
            if getattr(self, name) < 1:
                raise ValueError(f"got {name}={getattr(self, name)}; expected at least 1")
        for name in ("cheapest", "screened"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"got {name}={getattr(self, name)}; expected a share above 0 and at most 1")
        if not self.kinds or not set(self.kinds) < set(KINDS) - {"anchor"} | {""}:
            raise ValueError(f"got kinds={self.kinds}; expected some of {KINDS[1:]}")
        if self.cost not in (None, *COSTS):
            raise ValueError(f"got cost={self.cost!r}; expected one of {', '.join(COSTS)}")


def search_within(
    budget: Budget, dearest: Cost, bytes_per_parameter: float, config: SearchConfig | None = None
) -> SearchConfig:
    """The search for a budget: over the cost that it limits most; by default, for a small share, below that too."""
    cost, share = budget.binding(dearest, bytes_per_parameter)
    if config is None:
        return SearchConfig(cost=cost, cheapest=min(SearchConfig.cheapest, 0.8 * share))
    return replace(config, cost=config.cost or cost)


class SearchPlan:
    """The paths that a search begins with, and the forwards that it may spend.

    Args:
        anchors: those that are searched; their weights are not looked at.
        data: batches, as for `search_paths`.
        config: settings of the search; None takes the defaults.
        tokens: sequence length that a language model's costs are counted for.
        usage: how the models will be run; given, paths have costs in seconds.
        budget: what a path is searched for; None: one for every size.

    Attributes:
        config: the settings, with the cost that is searched over.
        costs: of every path.
        reference: position of the dearest anchor.
        dearest: its cost.
        calibration, scored: the batches that joints are fitted to, and those that are scored.
        few, fitted: how many of the scored, and of the calibration batches, candidates are screened with.
        head: runs of a block that a run of a dense head counts as, which every path's score takes; 0 of other heads,
            which cost little.
        forwards: runs of a block on one sequence or image that may be spent.

    Raises:
        ValueError: too little data, or a family whose costs cannot be counted.
    """

    def __init__(
        self,
        anchors: Sequence[Anchor],
        data: Iterable[Any],
        config: SearchConfig | None,
        tokens: int,
        usage: Usage | None = None,
        budget: Budget | None = None,
    ):
        self.anchors, self.budget = anchors, budget
        scoring = (config or SearchConfig()).scoring
        self.calibration, self.scored = map(list, calibration_and_scored(anchors[0], data, scoring))
        first = self.scored[0]
        size = tuple(first.inputs["pixel_values"].shape[-2:]) if "pixel_values" in first.inputs else None
        models = [anchor.model for anchor in anchors]
        self.costs: PathCosts = from_main_process(
            lambda: measure_path_costs(models, tokens=tokens, image_size=size, usage=usage)
        )
        self.wholes = [Path.parse(f"{place}[:]") for place in range(len(anchors))]
        self._values: dict[Path, float] = {}
        self.reference = max(range(len(anchors)), key=lambda place: self.costs.of(self.wholes[place]).macs)
        self.dearest = self.costs.of(self.wholes[self.reference])
        self.config = config = self._settled(config)
        grids = [anchor.grids(first) for anchor in anchors]
        self.moves = Moves(grids, config.joints, config.least_slice, "repeated" in config.kinds)
        self.few = max(1, round(len(self.scored) * config.screened))
        self.fitted = enough_rows(self.calibration, max(max(anchor.widths) for anchor in anchors))
        self.head = self._head()
        self.forwards = self._forwards() if config.forwards is None else config.forwards

    @property
    def bytes_per_parameter(self) -> int:
        """Of the dearest anchor's dtype."""
        return self.anchors[self.reference].model.dtype.itemsize

    @property
    def digest(self) -> str:
        """What identifies the data."""
        digest = hashlib.sha256()
        for batch in [*self.calibration, *self.scored]:
            for name, tensor in batch.inputs.items():
                digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def joint(self, path: Path) -> str:
        """What the joints of a path are to be."""
        return "merged" if self.config.merged and self.costs.mergeable(path) else "least_squares"

    def cost(self, path: Path) -> Cost:
        """What a path costs, with such joints."""
        return self.costs.of(path, identity=self.joint(path) == "merged")

    def value(self, path: Path) -> float:
        """What a path takes of the cost that is searched over."""
        if path not in self._values:
            self._values[path] = self._of(self.cost(path))
        return self._values[path]

    def place(self, path: Path) -> int | None:
        """The cost bucket of a path; None where nothing is searched."""
        value, dearest = self.value(path), self._of(self.dearest)
        low = self.config.cheapest * dearest
        if not low <= value < dearest:
            return None
        return int((value - low) * self.config.buckets // (dearest - low))

    def searched(self, path: Path) -> bool:
        """Whether a path is of the kinds and costs that are asked for, and within the other limits of the budget."""
        return self._sized(path) and (
            self.budget is None
            or self.budget.allows(self.cost(path), self.dearest, self.bytes_per_parameter, but=str(self.config.cost))
        )

    def first(self) -> list[Path]:
        """The paths of one joint that a search begins with."""
        return list(filter(self.searched, self.moves.single()))

    def price(self, path: Path, batches: int | None) -> int:
        """Forwards of a block that measuring a path takes, a group's share of the whole anchors included.

        Counted beforehand, not as they run: a search that was interrupted spends the same.
        """
        bounds = path.bounds(self.moves.depths)
        items = sum(map(len, self.scored[:batches]))
        fitted = sum(map(len, self.calibration[: None if batches is None else self.fitted]))
        between = sum(stop - start for _, start, stop in bounds[1:-1])
        behind = between + (bounds[-1][2] - bounds[-1][1] if path.joints else 0)
        whole = sum(self.moves.depths) * (items + fitted * path.joints) + self.head * items
        return items * (behind + self.head) + fitted * between + whole // GROUP

    def check(self, budget: Budget) -> None:
        """Raise ValueError, with the range, for a budget that no path will meet or that even the dearest meets."""
        costs = [self.cost(path) for path in [*self.wholes, *filter(self._sized, self.moves.single())]]
        check_budget(budget, costs, self.dearest, self.bytes_per_parameter)

    def _settled(self, config: SearchConfig | None) -> SearchConfig:
        """The settings with the cost that is searched over, of which the dearest anchor must take some."""
        if self.budget is not None:
            config = search_within(self.budget, self.dearest, self.bytes_per_parameter, config)
        config = config or SearchConfig()
        config = config if config.cost else replace(config, cost="macs")
        if not self.dearest.of(str(config.cost), self.bytes_per_parameter):
            raise ValueError(f"got cost={config.cost!r}, of which these anchors take nothing; expected another")
        return config

    def _of(self, cost: Cost) -> float:
        return cost.of(str(self.config.cost), self.bytes_per_parameter)

    def _sized(self, path: Path) -> bool:
        return kind_of(path) in self.config.kinds and self.place(path) is not None

    def _forwards(self) -> int:
        first = self.first()
        screened = 3 * sum(self.price(path, self.few) for path in first)
        measured = self.config.buckets * max((self.price(path, None) for path in first), default=0)
        return max(3 * self._all_pairs(), screened + measured)

    def _all_pairs(self) -> int:
        """What scoring all stitches between the anchors' costs on all items takes; of one anchor, all its cuts."""
        prices, alone = 0, len(self.anchors) == 1
        for path in self.moves.single():
            if alone or path.stitch is not None:
                ends = [self.cost(self.wholes[one.anchor]).macs for one in path.slices]
                low = self.config.cheapest * self.dearest.macs if alone else ends[0]
                if low <= self.cost(path).macs <= ends[1]:
                    prices += self.price(path, None)
        return prices

    def _head(self) -> int:
        part = self.costs.anchors[self.reference]
        return round(part.head_macs * len(part.block_macs) / sum(part.block_macs)) if part.maps else 0


def unallocated_anchors(
    anchors: Sequence[Any], revisions: Sequence[str | None] | None = None, **hub: Any
) -> list[Anchor]:
    """Anchors whose weights are neither read nor allocated, for a plan.

    Args:
        anchors: Hub ids, folders or models.
        revisions: their commits on the Hub.
        hub: other options of the Hub (token, cache_dir, …).

    Raises:
        ValueError: an unknown family, anchors for text and for images, other vocabularies or classes.
        OSError: a configuration cannot be reached.
    """
    own = [hub | ({"revision": one} if one else {}) for one in revisions or [None] * len(anchors)]
    configs = [
        one.config if isinstance(one, PreTrainedModel) else anchor_config(one, **options)
        for one, options in zip(anchors, own, strict=True)
    ]
    found = load_anchors([_unallocated(config) for config in configs])
    for other in found[1:]:
        found[0].check_like(other)
    return found


def _unallocated(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        if is_dense(config):
            return dense_head(config).kind(copy.deepcopy(config))
        auto = AutoModelForImageClassification if is_vision(config) else AutoModelForCausalLM
        return auto.from_config(copy.deepcopy(config))
