"""Functional KL of any path: what it answers at its least-squares start, against what the dearest anchor answers.

    F(path) = mean over x of KL(dearest(x) ‖ path(x)),  every joint fitted to what the path before it really gives

One reference for all, so that paths of every kind can be ranked together. A joint is a layer, or merged into what the
block before it writes last. Paths are taken in groups: one pass over the
calibration data for each joint that a path has, in which paths with a common beginning run it once, then one pass over
the data that are scored. Only sums are kept, so memory does not grow with the data.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from klas_hf.anchors.anchor import Anchor
from klas_hf.anchors.fitting import fitted_joint
from klas_hf.anchors.weights import evaluating
from klas_hf.maths.estimates import RatioSums
from klas_hf.maths.least_squares import RIDGE, LinearFit, warn_of_few_rows
from klas_hf.maths.similarities import PairMoments
from klas_hf.paths import Path
from klas_hf.processes import progress, shared_out, sum_array_over_processes, sum_over_processes
from klas_hf.scores.answers import WORKSPACE_BYTES, Reference

Bound = tuple[int, int, int]  # anchor, start, stop
Beginning = tuple[Bound, ...]  # a path up to a joint
TOGETHER = 8  # paths whose last states are kept, to be compared with the reference's answers at once


@dataclass(frozen=True)
class PathScore:
    """What was found of one path.

    Attributes:
        divergence, error: functional KL in nats per token or image, at least 0, and its standard error.
        items: sequences or images that the mean is over.
    """

    divergence: float
    error: float
    items: int


class PathScorer:
    """Scores paths through some anchors.

    Args:
        anchors: as the paths count them.
        reference: position of the dearest.
        calibration: batches that joints are fitted to; held in memory.
        scored: batches to score on; held in memory.
        temperature: softens both distributions.
        ridge: penalty of the fits, relative to the variance of a standardised feature.
        moment_bytes: memory that the sums of one group's fits may take.
        workspace_bytes: memory for distributions.
        merged: whether the joints of a path are merged (`joint="merged"`); None: of no path.
        classes: that answers are compared among; None: all.

    Attributes:
        forwards: runs of one block on one sequence or image so far, in this process.
    """

    def __init__(
        self,
        anchors: Sequence[Anchor],
        reference: int,
        calibration: Sequence[Any],
        scored: Sequence[Any],
        *,
        temperature: float = 1.0,
        ridge: float = RIDGE,
        moment_bytes: int = 2 << 30,
        workspace_bytes: int = WORKSPACE_BYTES,
        merged: Callable[[Path], bool] | None = None,
        classes: Sequence[int] | None = None,
    ):
        self.anchors, self.reference = anchors, reference
        self.calibration, self.scored = calibration, scored
        self.temperature, self.ridge, self.moment_bytes = temperature, ridge, moment_bytes
        self.workspace_bytes = workspace_bytes
        self.merged = merged or (lambda _: False)
        self.classes = classes
        self.forwards = 0
        self.depths = [anchor.num_blocks for anchor in anchors]
        self._joints: dict[tuple[Beginning, int, int], nn.Module] = {}
        self._merging = False  # what the joints of the group at hand are
        self._warned = False
        for place, anchor in enumerate(anchors):
            anchor.meet([one for other, one in enumerate(anchors) if other != place], calibration)

    @torch.no_grad()
    def score(self, paths: Sequence[Path], batches: int | None = None, fitted: int | None = None) -> list[PathScore]:
        """Functional KL of each path.

        Args:
            batches: how many of those to score on are run, from the first; None: all.
            fitted: the same of those that joints are fitted to.

        Raises:
            ValueError: a path out of range, or activations that are not finite.
        """
        found: dict[Path, PathScore] = {}
        with ExitStack() as modes:
            for anchor in self.anchors:
                modes.enter_context(evaluating(anchor.model))
            for self._merging in (False, True):
                for group in self._groups([path for path in paths if self.merged(path) == self._merging]):
                    found |= zip(group, self._of_group(group, batches, fitted), strict=True)
        return [found[path] for path in paths]

    def _of_group(self, group: Sequence[Path], batches: int | None, fitted: int | None) -> list[PathScore]:
        for number in range(max(path.joints for path in group)):
            self._fit(group, number, self.calibration[:fitted])
        found = self._measured(group, self.scored[:batches])
        self._joints.clear()
        return found

    def _groups(self, paths: Sequence[Path]) -> Iterator[list[Path]]:
        """Paths whose joints' sums fit into the memory allowed together; common beginnings stand beside each other."""
        group: list[Path] = []
        taken = 0
        order = list(paths)
        for path in order:
            widths = [
                (self.anchors[one[0]].widths[one[2]], self.anchors[other[0]].widths[other[1]])
                for one, other in pairwise(path.bounds(self.depths))
            ]
            needed = max((8 * (x * x + x * y + y * y) for x, y in widths), default=0)
            if group and taken + needed > self.moment_bytes:
                yield group
                group, taken = [], 0
            group.append(path)
            taken += needed
        if group:
            yield group

    def _fit(self, paths: Sequence[Path], number: int, calibration: Sequence[Any]) -> None:
        """Fit the joints that stand behind `number` others, in one pass over the calibration data."""
        wanted: dict[tuple[Beginning, int, int], None] = {}
        for path in paths:
            bounds = tuple(path.bounds(self.depths))
            if len(bounds) > number + 1:
                wanted[bounds[: number + 1], bounds[number + 1][0], bounds[number + 1][1]] = None
        fronts = list(dict.fromkeys((front, place) for front, place, _ in wanted))  # class tokens depend on the place
        ends = list(dict.fromkeys((place, start) for _, place, start in wanted))
        if self._merging:  # what is wanted of a layer depends on the state beside what it writes
            ends = [(place, start) for _, place, start in wanted]
        pairs = [
            (fronts.index((front, place)), row if self._merging else ends.index((place, start)))
            for row, (front, place, start) in enumerate(wanted)
        ]
        moments = PairMoments(
            pairs,
            [self.anchors[front[-1][0]].widths[front[-1][2]] for front, _ in fronts],
            [self.anchors[place].widths[start] for place, start in ends],
            self.anchors[self.reference].device,
        )
        for batch in progress(shared_out(calibration), f"calibrating joint {number + 1} of {len(paths)} paths"):
            run = _Run(self, batch, [*(front for front, _ in fronts), *(((place, 0, start),) for place, start in ends)])
            x = [self._rows(front, run.state(front), batch, self.anchors[place]) for front, place in fronts]
            y = [self._rows(((place, 0, start),), run.state(((place, 0, start),)), batch) for place, start in ends]
            if self._merging:
                y = [one.double() - x[front].double() for one, (front, _) in zip(y, pairs, strict=True)]
                y = [self._signed(front, one) for one, (front, *_) in zip(y, wanted, strict=True)]
                x = [self._signed(front, self._rows(front, run.written(front), batch)) for front, _ in fronts]
            moments.update(x, y)
        moments.combine(sum_over_processes)
        fewest: list[tuple[int, int]] = []
        for pair, (front, place, start) in sorted(zip(pairs, wanted, strict=True), key=lambda one: one[0]):
            fit = moments.least_squares(*pair, ridge=self.ridge)
            doubled = self._merging and not self._biased(front)
            fewest.append((fit.rows // (1 + doubled), fit.weight.shape[1]))
            source = self.anchors[front[-1][0]]
            self._joints[front, place, start] = (
                _Merged(fit, source.model.dtype)
                if self._merging
                else fitted_joint(source, front[-1][2], self.anchors[place], start, fit)
            )
        if not self._warned:
            self._warned = True
            warn_of_few_rows(*min(fewest, key=lambda one: one[0] / one[1]))

    def _signed(self, front: Beginning, rows: Tensor) -> Tensor:
        """Rows; for a layer without a bias with both signs, so that they have no mean and the fit has none either."""
        return rows if self._biased(front) else torch.cat([rows, -rows])

    def _biased(self, front: Beginning) -> bool:
        """Whether the layer that a joint behind this beginning is merged into has a bias."""
        place, _, stop = front[-1]
        writer = self.anchors[place].writer(stop - 1)
        return writer is not None and getattr(writer, "bias", None) is not None

    def _rows(self, front: Beginning, state: Any, batch: Any, into: Anchor | None = None) -> Tensor:
        rows = self.anchors[front[-1][0]].rows(state, batch, into)
        return rows.to(self.anchors[self.reference].device)

    def _measured(self, paths: Sequence[Path], batches: Sequence[Any]) -> list[PathScore]:
        bounds = [tuple(path.bounds(self.depths)) for path in paths]
        sums = RatioSums((len(paths),))
        whole = ((self.reference, 0, self.depths[self.reference]),)
        for batch in progress(shared_out(batches), f"scoring {len(paths)} paths"):
            run = _Run(self, batch, [whole, *bounds])
            reference = Reference(
                self.anchors[self.reference],
                run.state(whole),
                batch,
                self.temperature,
                self.workspace_bytes,
                self.classes,
            )
            found = []
            for first in range(0, len(bounds), TOGETHER):
                states = [(self.anchors[b[-1][0]], run.state(b)) for b in bounds[first : first + TOGETHER]]
                found.append(reference.compare(states)[0])
            terms = torch.cat(found)
            if not terms.isfinite().all():
                raise ValueError("got NaN or infinite divergences; expected finite activations. Check the anchors")
            totals = torch.zeros(len(batch), len(paths), dtype=torch.float64)
            totals.index_add_(0, batch.unit_items, terms.double().T)
            units = torch.bincount(batch.unit_items, minlength=len(batch))
            sums.update(totals.numpy(), units[:, None].numpy())
        sums.set_moments(sum_array_over_processes(sums.moments()))
        if not sums.sequences:
            raise ValueError("got no data to score on; expected batches. Check that an iterator was not used up before")
        values, errors = np.maximum(sums.value, 0.0), sums.standard_error
        return [PathScore(float(v), float(e), sums.sequences) for v, e in zip(values, errors, strict=True)]


class _Merged(nn.Module):
    """What merging least squares into a layer adds to the state behind it: (T − 1) m + b, of what the layer writes."""

    def __init__(self, fit: LinearFit, dtype: torch.dtype):
        super().__init__()
        self.weight, self.bias = fit.weight.to(dtype), fit.bias.to(dtype)

    def forward(self, state: Any, written: Any) -> Any:
        if not isinstance(state, Tensor):
            return state._replace(hidden=self(state.hidden, written.hidden))
        return state + written @ self.weight.to(state.device).T + self.bias.to(state.device)


class _Run:
    """States of one batch at the ends of some beginnings, each common part run once.

    Args:
        wanted: the beginnings that will be asked for.
    """

    def __init__(self, scorer: PathScorer, batch: Any, wanted: Sequence[Beginning]):
        self.scorer, self.batch = scorer, batch
        stops: dict[int, int] = {}
        for front in wanted:
            place, _, stop = front[0]
            stops[place] = max(stop, stops.get(place, 0))
        self._written: dict[Beginning, Tensor] = {}  # by the last block, where joints are merged
        self._whole = {}
        for place, stop in stops.items():
            with self._writing({front[:1] for front in wanted if front[0][0] == place}):
                self._whole[place] = scorer.anchors[place].states(batch, stop)
        scorer.forwards += len(batch) * sum(stops.values())
        self._known: dict[Beginning, Any] = {}

    def state(self, front: Beginning) -> Any:
        """The state at the end of a beginning."""
        if len(front) == 1:
            return self._whole[front[0][0]][front[0][2]]
        place, start, stop = front[-1]
        before = front[:-1]
        scorer, anchor = self.scorer, self.scorer.anchors[place]
        known = next((at for at in range(stop, start - 1, -1) if (*before, (place, start, at)) in self._known), None)
        if known is None:
            known = start
            given = (self.state(before), self.written(before)) if scorer._merging else (self.state(before),)
            state = scorer._joints[before, place, start](*map(anchor.take, given))
        else:
            state = self._known[(*before, (place, start, known))]
        with self._writing({front}):
            state = anchor.run(state, self.batch.inputs, known, stop)
        scorer.forwards += len(self.batch) * (stop - known)
        if stop < anchor.num_blocks:
            self._known[(*before, (place, start, stop))] = state
        return state

    def written(self, front: Beginning) -> Any:
        """What the block at the end of a beginning wrote last, in the form of a state."""
        state = self.state(front)
        return self._written[front] if isinstance(state, Tensor) else state._replace(hidden=self._written[front])

    @contextmanager
    def _writing(self, fronts: Iterable[Beginning]) -> Iterator[None]:
        """Keep what the last blocks of these beginnings write meanwhile, where joints are merged."""
        handles = []
        for front in fronts if self.scorer._merging else ():
            place, start, stop = front[-1]
            writer = self.scorer.anchors[place].writer(stop - 1) if stop > start else None
            if writer is not None:
                keep = partial(self._keep, front)
                handles.append(writer.register_forward_hook(keep))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, front: Beginning, module: nn.Module, args: Any, output: Tensor) -> None:
        self._written[front] = output
