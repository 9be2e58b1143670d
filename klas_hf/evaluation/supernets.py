"""Every path of a supernet, as rows: accuracy on images, loss on text."""

from collections.abc import Iterable, Iterator, Sequence

from klas_hf.evaluation.images import measure_image_paths, recalibrated
from klas_hf.evaluation.language import measure_text_paths
from klas_hf.evaluation.models import Measurement
from klas_hf.paths import Stitch
from klas_hf.processes import process_state
from klas_hf.rows import ResultRow, RowFile
from klas_hf.stitching.supernet import Path, StitchedSupernet
from klas_hf.stitching.supernet_images import StitchedSupernetForImageClassification
from klas_hf.stitching.supernet_language import StitchedSupernetForCausalLM

GROUP = 24  # paths that are evaluated in one pass, and written when it ends


def evaluate_supernet(
    supernet: StitchedSupernet,
    batches: Iterable[object],
    *,
    rule: str,
    rows: RowFile,
    seed: int = 0,
    classes: Sequence[int] | None = None,
    recalibration: Iterable[object] | None = None,
) -> list[ResultRow]:
    """Measure every path of a supernet, one row each, leaving out what the file already has.

    Args:
        supernet: it is put back in the mode it was in.
        batches: images with labels, or token ids with `labels`, such that they can be read several times.
        rule: the name under which the rows are kept; the anchors as paths get rows of stitch None.
        rows: where rows go; their metrics are `accuracy` and `loss` of images, `loss` of text.
        seed: recorded with the rows.
        classes: of images, measure among these classes only too.
        recalibration: images on which BatchNorm statistics are taken anew for each path, and put back after it; None
            measures with the supernet's own.

    Returns:
        A row per path, in the order of `supernet.paths`, whether it was measured now or before.

    Raises:
        ValueError: nothing to measure on, or classes or recalibration for text.

    Example:
        >>> supernet = StitchedSupernet.from_anchors([small, large], [(1, 2), (2, 1)], calibration=images)
        >>> file = RowFile(folder / "results.jsonl", {"data": "random"})
        >>> rows = evaluate_supernet(supernet, images, rule="mine", rows=file)
        >>> [row.stitch for row in rows], sorted(rows[0].metrics)
        ([None, None, (1, 2), (2, 1)], ['accuracy', 'loss'])
    """
    missing = [path for path in supernet.paths if _find(rows, rule, path, seed) is None]
    for group, found in _measured(supernet, missing, batches, classes, recalibration):
        for path, measured in zip(group, found, strict=True):
            rows.append(_row(supernet, path, measured, rule, seed), to_disk=process_state().is_main_process)
    return [row for path in supernet.paths if (row := _find(rows, rule, path, seed)) is not None]


def _measured(
    supernet: StitchedSupernet,
    paths: Sequence[Path],
    batches: Iterable[object],
    classes: Sequence[int] | None,
    recalibration: Iterable[object] | None,
) -> Iterator[tuple[Sequence[Path], list[Measurement]]]:
    """Paths in groups, each measured in one pass."""
    if isinstance(supernet, StitchedSupernetForCausalLM):
        if classes is not None or recalibration is not None:
            raise ValueError("got classes or recalibration images for language models; leave them out")
        for group in _groups(paths, GROUP):
            yield group, measure_text_paths(supernet, group, batches)
        return
    assert isinstance(supernet, StitchedSupernetForImageClassification)
    for group in _groups(paths, GROUP if recalibration is None else 1):
        if recalibration is None:
            yield group, measure_image_paths(supernet, group, batches, classes)
        else:
            with recalibrated(supernet, group[0], recalibration):
                yield group, measure_image_paths(supernet, group, batches, classes)


def _groups(paths: Sequence[Path], size: int) -> Iterator[Sequence[Path]]:
    return (paths[start : start + size] for start in range(0, len(paths), size))


def _find(rows: RowFile, rule: str, path: Path, seed: int) -> ResultRow | None:
    if isinstance(path, Stitch):
        return rows.find(rule, path, seed)
    return rows.find(rule, None, seed, anchors=(path, path))


def _row(supernet: StitchedSupernet, path: Path, measured: Measurement, rule: str, seed: int) -> ResultRow:
    number = supernet.paths.index(path)
    return ResultRow(
        rule=rule,
        stitch=(path.source_stop, path.target_start) if isinstance(path, Stitch) else None,
        seed=seed,
        macs=supernet.path_macs[number],
        parameters=supernet.path_parameters[number],
        metrics=dict(measured.metrics),
        details=dict(measured.details),
        anchors=(path.source, path.target) if isinstance(path, Stitch) else (path, path),
    )
