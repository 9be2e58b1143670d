"""How functional KL is measured, and on which data."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from klas_hf.anchors.anchor import Anchor
from klas_hf.maths.least_squares import RIDGE
from klas_hf.paths import Stitch
from klas_hf.scores.answers import WORKSPACE_BYTES

SCREENING_ROWS = 8  # calibration rows per feature of the widest joint, while candidates are screened


@dataclass(frozen=True)
class FunctionalScoring:
    """How functional KL is measured: a score of ours, the target's answers against an untrained stitched network's.

    Attributes:
        calibration: batches that the least-squares maps are fitted to; None takes as many from the front of the data as
            are scored behind them, at most the first half.
        candidates: the stitches to score; None scores all that are possible with target_start >= 1 and cost no less
            than the source and no more than the target.
        temperature: softens both distributions; 4 foretold best of 0.5, 1, 2 and 4 (LOG.md).
        ridge: penalty of the fits, relative to the variance of a standardised feature.
        moment_bytes: memory that the sums of one group of pairs may take. Maps that are solved from them come on top.
        rear_bytes: memory that the states of one forward of a rear, of several stitches together, may take.
        workspace_bytes: memory for distributions.
        scored_items: images or sequences to score on, in whole batches at least so many; None takes all, and then
            measures all candidates on them.
        survivors: of more than 20 times so many candidates that are not named, all are measured on the first quarter
            of the scored batches, and the best of each of 20 cost buckets, so many, on all; None measures all on all.

    Raises:
        ValueError: a temperature that is not above 0.

    Example:
        >>> settings = FunctionalScoring(calibration=batches[:3], candidates=[Stitch(1, 2), Stitch(3, 1)])
        >>> scores = score_stitches(source, target, batches[3:], score="functional", functional=settings)
        >>> scores.stitches == (Stitch(1, 2), Stitch(3, 1))
        True
    """

    calibration: Iterable[Any] | None = None
    candidates: Iterable[Stitch] | None = None
    temperature: float = 4.0
    ridge: float = RIDGE
    moment_bytes: int = 3 << 30
    rear_bytes: int = 1 << 28
    workspace_bytes: int = WORKSPACE_BYTES
    scored_items: int | None = 128
    survivors: int | None = 3

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"got temperature={self.temperature}; expected a number above 0")
        if self.scored_items is not None and self.scored_items < 1:
            raise ValueError(f"got scored_items={self.scored_items}; expected at least 1, or None for all")
        if self.survivors is not None and self.survivors < 1:
            raise ValueError(f"got survivors={self.survivors}; expected at least 1, or None to keep all candidates")


def calibration_and_scored(
    anchor: Anchor, data: Iterable[Any], settings: FunctionalScoring
) -> tuple[Iterable[Any], Iterable[Any]]:
    """Batches to fit to and batches to score on; no more are held in memory than are used."""
    items = settings.scored_items
    if settings.calibration is not None:
        calibration = list(anchor.read(settings.calibration))
        scored: Iterable[Any] = _Batches(anchor, data) if items is None else _first(anchor, data, items)
        if not calibration:
            raise ValueError("got no batches to calibrate on; expected at least one. Was an iterator used up before?")
        return calibration, scored
    taken = _first(anchor, data, None if items is None else 2 * items)
    half = len(taken) // 2
    if not half:
        raise ValueError(
            f"got {len(taken)} batches; expected at least two, one to calibrate on and one to score on. Pass smaller "
            "batches, or calibration=batches"
        )
    return taken[:half], taken[half:]


def enough_rows(calibration: Sequence[Any], widest: int) -> int:
    """How many of the batches, from the first, have enough rows to screen candidates by joints so wide."""
    rows = 0
    for number, batch in enumerate(calibration, 1):
        rows += batch.fewest_rows
        if rows >= SCREENING_ROWS * widest:
            return number
    return len(calibration)


def _first(anchor: Anchor, data: Iterable[Any], items: int | None) -> list[Any]:
    """The first batches, until they hold so many images or sequences."""
    taken, seen = [], 0
    for batch in anchor.read(data):
        taken.append(batch)
        seen += len(batch)
        if items is not None and seen >= items:
            break
    return taken


class _Batches:
    """All batches, read anew for every group of pairs."""

    def __init__(self, anchor: Anchor, data: Iterable[Any]):
        self.anchor, self.data = anchor, data

    def __iter__(self) -> Iterator[Any]:
        return self.anchor.read(self.data)
