"""How much of the calibration data is read: least squares gains nothing from a whole corpus."""

from collections.abc import Callable, Iterable, Iterator, Sized
from math import ceil
from typing import Any, TypeVar

ENOUGH_ITEMS = 256  # sequences or images
ENOUGH_ROWS = 10  # per feature of the widest map
B = TypeVar("B", bound=Sized)


def sampled(
    calibration: Iterable[Any],
    read: Callable[[Iterable[Any]], Iterator[B]],
    features_per_row: Callable[[B], float],
    items: int | None = None,
) -> Iterator[B]:
    """Whole batches of calibration data, of so many sequences or images in all.

    Where their number is known they are spread evenly over the data; else they are the first.

    Args:
        calibration: batches.
        read: brings them into one form.
        features_per_row: width of the widest map over the rows that a sequence or image has, told from the first batch.
        items: how many sequences or images; None: 256, or as many more as make ten rows per feature.

    Raises:
        ValueError: `items` below 1.
    """
    if items is not None and items < 1:
        raise ValueError(f"got calibration_items={items}; expected at least 1, or None for the default")
    return _chosen(calibration, read, features_per_row, items)


def _chosen(
    calibration: Iterable[Any], read: Callable[[Iterable[Any]], Iterator[B]],
    features_per_row: Callable[[B], float], items: int | None,
) -> Iterator[B]:  # fmt: skip
    seen, wanted, places = 0, 0, None
    for place, batch in enumerate(read(calibration)):
        if not place:
            wanted = items or max(ENOUGH_ITEMS, ceil(ENOUGH_ROWS * features_per_row(batch)))
            if isinstance(calibration, Sized):
                total = len(calibration)
                count = min(total, ceil(wanted / max(1, len(batch))))
                places = {number * total // count for number in range(count)}
        if places is None or place in places:
            yield batch
            seen += len(batch)
        if seen >= wanted or (places is not None and place >= max(places)):
            return
