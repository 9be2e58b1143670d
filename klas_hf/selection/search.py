"""The best model of every size: a search over paths through one, two or more anchors, by functional KL.

A size is MACs, or another cost: bytes, seconds, whatever a budget limits. Paths of one joint come first: every cut of
an anchor, every stitch of two, measured on a few items. The best of each cost bucket are grown by moves (`Moves`),
their neighbours measured, and so on, until no bucket gets better or the forwards that are allowed have run; at the end
the best of each bucket is measured on all items. Nothing is trained. The idea is the beam search of greedy depth
pruning, with the least-squares joints of ReplaceMe (arXiv 2505.02819) and SN-Net's stitches as further moves.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path as File
from typing import Any

from klas_hf.anchors.anchor import Anchor, check_anchors
from klas_hf.anchors.classes import mapped_classes
from klas_hf.anchors.loading import load_anchors
from klas_hf.budgets import Budget, Cost
from klas_hf.costs.usage import Usage
from klas_hf.paths import Path
from klas_hf.processes import process_state
from klas_hf.rows import ResultRow, RowFile, library_versions
from klas_hf.scores.path_scores import Ends, PathScores, as_scores, ends_of
from klas_hf.scores.paths import PathScore, PathScorer
from klas_hf.selection.plan import GROUP, SearchConfig, SearchPlan

ROUND = 64  # neighbours that are measured before it is decided anew which come next
BETTER = 0.95  # times the divergence of a cheaper path, below which a far one that ends with a small anchor is measured
NEAR = 1.25  # times the divergence of the best path of its size or below, up to which one is measured on all items


def search_paths(
    anchors: Sequence[Any],
    data: Iterable[Any],
    config: SearchConfig | None = None,
    *,
    tokens: int = 128,
    usage: Usage | None = None,
    budget: Budget | Cost | str | float | None = None,
    output: str | File | None = None,
    classes: Sequence[int] | None = None,
    revisions: Sequence[str | None] | None = None,
    **loading: Any,
) -> PathScores:
    """Costs and functional KL of the best paths of every size through some anchors.

    Args:
        anchors: Hub ids, folders or models, of one vocabulary or the same classes; one is enough.
        data: batches of token ids or images; the first half is what joints are fitted to, the second what is scored.
        config: settings; None takes the defaults.
        tokens: sequence length that a language model's costs are counted for.
        usage: how the models will be run; given, the anchors' parts are timed, and budgets may be in seconds.
        budget: that a path is searched for: sizes are of the cost that it limits most (`SearchConfig.cost` names
            another), and paths beyond its other limits are left out.
        output: JSONL file of all that was measured; a search that was interrupted goes on from it.
        classes: of image classifiers, the labels among which answers are compared; None: those that the images are
            mapped to (`map_labels`), where they say so, else all. Paths that are to tell ten of a thousand classes
            apart need not agree with the dearest anchor about the others.
        revisions: of the anchors on the Hub.
        loading: of anchors named by Hub id or folder, as for `from_pretrained`: dtype, device_map, attn_implementation,
            quantization_config, token, …; by themselves they lie on accelerate's device, in their checkpoints' dtype.

    Returns:
        All paths that were measured on all items, the anchors among them.

    Raises:
        ValueError: an anchor twice, other vocabularies or classes, classes that the anchors do not have, too little
            data, a cost that takes a usage to be known, or an output of another search.

    Example:
        >>> found = search_paths([source, target], batches, tokens=16)
        >>> found.best("60%").joints > 0, found.pareto()[-1] == Path.parse("1[:]")
        (True, True)
    """
    wanted = None if budget is None else Budget.of(budget)
    loaded = load_anchors(anchors, revisions, **loading)
    return _Search(loaded, data, config, tokens, output, usage, wanted, classes).run()


class _Search:
    """One search: its anchors, what is known of paths, and what has been spent."""

    def __init__(
        self,
        anchors: list[Anchor],
        data: Iterable[Any],
        config: SearchConfig | None,
        tokens: int,
        output: str | File | None,
        usage: Usage | None,
        budget: Budget | None,
        classes: Sequence[int] | None,
    ):
        self.anchors, self.usage = anchors, usage
        check_anchors(self.anchors, least=1)
        known = self.anchors[0].classes
        classes = mapped_classes(data, known) if classes is None else tuple(classes)
        if classes is not None and (len(set(classes)) < 2 or not set(classes) <= set(range(known))):
            raise ValueError(f"got classes={classes}; expected at least two of the anchors' {known}, from 0")
        self.plan = SearchPlan(self.anchors, data, config, tokens, usage, budget)
        self.config = config = self.plan.config
        self.scorer = PathScorer(
            self.anchors, self.plan.reference, self.plan.calibration, self.plan.scored,
            temperature=config.scoring.temperature, ridge=config.scoring.ridge,
            moment_bytes=config.scoring.moment_bytes, workspace_bytes=config.scoring.workspace_bytes,
            merged=lambda path: self.plan.joint(path) == "merged", classes=classes,
        )  # fmt: skip
        fingerprints = [anchor.fingerprint for anchor in self.anchors]
        plain = {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "scoring"}
        self.settings = plain | {
            "temperature": config.scoring.temperature, "ridge": config.scoring.ridge, "tokens": tokens,
            "anchors": fingerprints, "data": self.plan.digest,
        } | ({} if budget is None else {"budget": budget.text})  # fmt: skip
        self.settings |= {} if classes is None else {"classes": list(classes)}
        self.rows = None if output is None else RowFile(output, {"search": self.settings})
        self.known: dict[tuple[Path, int | None], tuple[float, float]] = {}
        self.priced: set[tuple[Path, int | None]] = set()
        for row in self.rows or []:
            self.known[Path.parse(str(row.path)), row.setting["batches"]] = (
                row.metrics["divergence"],
                row.details["error"],
            )
        self.spent = 0
        self.seen: set[Path] = set()
        self.tried: dict[str, int] = {}  # move → paths, and how many of them were the best of their size so far
        self.improved: dict[str, int] = {}

    def run(self) -> PathScores:
        """Screen, keep, grow."""
        self._measure(self.plan.wholes, None)
        self._measure(self._affordable(list(self._new(self.plan.first())), self.plan.few), self.plan.few)
        pool: dict[Path, tuple[Path, str]] = {}  # not yet measured → from which path, by which move
        grown: set[Path] = set()
        while True:
            for path in self._kept(self.config.beam):
                if path not in grown:
                    grown.add(path)
                    moves = {one: move for move, one in self.plan.moves.neighbours(path)}
                    pool |= {one: (path, moves[one]) for one in self._new(moves)}
            front = self._front()
            promise = {one: (self._promise(front, *origin), str(one)) for one, origin in pool.items()}
            chosen = self._affordable(sorted(pool, key=promise.__getitem__)[:ROUND], self.plan.few)
            if not chosen:
                break
            before = self._best()
            self._measure(chosen, self.plan.few)
            after = self._best()
            for one in chosen:
                _, move = pool.pop(one)
                self.tried[move] = self.tried.get(move, 0) + 1
                better = after.get(self.plan.place(one)) == one and before.get(self.plan.place(one)) != one
                self.improved[move] = self.improved.get(move, 0) + better
        self._measure(self._affordable(self._finalists(), None), None)
        full = {path: self.known[path, None] for path, batches in self.priced if batches is None}
        full = dict(sorted(full.items(), key=lambda pair: (self.plan.value(pair[0]), str(pair[0]))))
        costs, joints = [self.plan.cost(path) for path in full], tuple(map(self.plan.joint, full))
        seamless = tuple(self.config.merged and self.plan.costs.seamless(path) for path in full)
        return as_scores(
            full, costs, names=tuple(anchor.name for anchor in self.anchors),
            bytes_per_parameter=self.plan.bytes_per_parameter, joints=joints, depths=tuple(self.plan.moves.depths),
            cost=self.config.cost, seamless=seamless,
            provenance=self.settings
            | {"versions": library_versions(), "spent": self.spent, "limit": self.plan.forwards}
            | ({} if self.usage is None else {"usage": asdict(self.usage)}),
        )  # fmt: skip

    def _measure(self, paths: Sequence[Path], batches: int | None) -> None:
        """Score what is not known yet, in groups that are written as they are done."""
        wanted = [path for path in dict.fromkeys(paths) if (path, batches) not in self.priced]
        wanted.sort(key=lambda path: path.bounds(self.plan.moves.depths))  # common beginnings beside each other
        for start in range(0, len(wanted), GROUP):
            group = wanted[start : start + GROUP]
            self.spent += sum(self.plan.price(path, batches) for path in group)
            self.priced.update((path, batches) for path in group)
            missing = [path for path in group if (path, batches) not in self.known]
            for path, score in zip(missing, self._scores(missing, batches), strict=True):
                self.known[path, batches] = score.divergence, score.error
                if self.rows is not None:
                    cost = self.plan.cost(path)
                    row = ResultRow(
                        "search", path, 0, cost.macs, cost.parameters, {"divergence": score.divergence},
                        {"error": score.error, "items": score.items}, setting={"batches": batches},
                    )  # fmt: skip
                    self.rows.append(row, to_disk=process_state().is_main_process)

    def _scores(self, paths: Sequence[Path], batches: int | None) -> list[PathScore]:
        return self.scorer.score(paths, batches, None if batches is None else self.plan.fitted) if paths else []

    def _new(self, paths: Iterable[Path]) -> Iterator[Path]:
        """Paths not met before, of the kinds and costs that are asked for."""
        for path in paths:
            if path not in self.seen:
                self.seen.add(path)
                if self.plan.searched(path):
                    yield path

    def _promise(self, front: Sequence[tuple[float, float]], parent: Path, move: str) -> float:
        """Low for neighbours of paths that are near the best of their size, by moves that have paid before."""
        paid = (self.improved.get(move, 0) + 1) / (self.tried.get(move, 0) + 2)
        return self._excess(front, parent) / paid

    def _excess(self, front: Sequence[tuple[float, float]], path: Path) -> float:
        """How many times the divergence is that of the best path that costs no more, as screened."""
        own, size = self.known[path, self.plan.few][0], self.plan.value(path)
        best = min((value for cost, value in front if cost <= size), default=own)
        return max(own, 1e-12) / max(best, 1e-12)

    def _front(self) -> list[tuple[float, float]]:
        """Cost and divergence of what no cheaper path beats, as screened."""
        front: list[tuple[float, float]] = []
        found = ((self.plan.value(path), self.known[path, self.plan.few][0]) for path in self._kept(1))
        for cost, value in sorted(found):
            if not front or value < front[-1][1]:
                front.append((cost, value))
        return front

    def _finalists(self) -> list[Path]:
        """What is measured on all items: of every bucket the best that no cheaper path beats by far.

        The best of each number of joints first: screening, which fits them to few rows, flatters many joints. And the
        best of one joint between any two anchors, with the last block and without it, however far behind, for they gain
        unequally as they are healed, and what has a stitch and more joints besides gains least; but for those that a
        cheaper one beats, or nearly does and they end with another than the dearest anchor, from which they are to
        learn. Where nothing of a bucket is near the best, for those that a cheaper one beats by far.
        """
        front = self._front()
        found: list[tuple[int, Path]] = []  # with their rank: what comes first if not all can be measured
        best: dict[Ends, float] = {}  # of paths between the same ends, up to this bucket
        for of_one in self._screened():
            near = [path for path in of_one if self._excess(front, path) <= NEAR]
            first = list({path.joints: path for path in reversed(near)}.values())
            found += enumerate(sorted(near, key=lambda path: path not in first)[: max(self.config.beam, len(first))])
            single, depths = [path for path in of_one if path.joints == 1], self.plan.moves.depths
            ends = {ends_of(path, depths, tails=True): path for path in reversed(single)}
            for between, path in ends.items():
                own = self.known[path, self.plan.few][0]
                bar = (1 if near else NEAR) if between and between.last == self.plan.reference else BETTER
                if between is not None and own < bar * best.get(between, math.inf):
                    best[between] = min(own, best.get(between, math.inf))
                    found.append((0, path))
        return list(dict.fromkeys(path for _, path in sorted(found, key=lambda pair: pair[0])))

    def _affordable(self, paths: list[Path], batches: int | None) -> list[Path]:
        """As many of the paths, from the first, as what is left to spend can measure.

        While candidates are screened, what measuring the best on all items will take is set aside, and half of the rest
        too: what is screened now may be among them.
        """
        left = self.plan.forwards - self.spent
        if batches is not None:
            left = (left - sum(self.plan.price(path, None) for path in self._finalists())) // 2
        kept = []
        for path in paths:
            left -= self.plan.price(path, batches)
            if left < 0:
                break
            kept.append(path)
        return kept

    def _best(self) -> dict[int | None, Path]:
        """The best path of every bucket, as it was screened."""
        return {self.plan.place(path): path for path in self._kept(1)}

    def _kept(self, count: int) -> list[Path]:
        """The best paths of every bucket, as they were screened."""
        return [path for of_one in self._screened() for path in of_one[:count]]

    def _screened(self) -> list[list[Path]]:
        """By bucket, all paths that were screened, the best first."""
        buckets: dict[int, list[tuple[float, Path]]] = {}
        for path, on in self.priced:
            place = self.plan.place(path)
            if on == self.plan.few and path.joints and place is not None:
                buckets.setdefault(place, []).append((self.known[path, on][0], path))
        order = [sorted(of_one, key=lambda pair: (pair[0], str(pair[1]))) for _, of_one in sorted(buckets.items())]
        return [[path for _, path in of_one] for of_one in order]
