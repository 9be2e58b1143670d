"""Every path of a supernet, as rows: accuracy on images, loss on text."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from klas_hf.anchors.classes import check_classes
from klas_hf.anchors.weights import evaluating, fingerprint
from klas_hf.costs import Usage
from klas_hf.evaluation.images import recalibrated
from klas_hf.evaluation.measuring import Sums, task_of
from klas_hf.evaluation.models import Measurement, used
from klas_hf.paths import Path
from klas_hf.processes import process_state, progress, shared_out
from klas_hf.rows import AnyPath, ResultRow, RowFile
from klas_hf.stitching import StitchedSupernet
from klas_hf.stitching.supernet_budgets import path_costs

GROUP = 24  # paths that are evaluated in one pass, and written when it ends


def evaluate_supernet(
    supernet: StitchedSupernet,
    batches: Iterable[object],
    *,
    rule: str,
    rows: RowFile,
    training: Mapping[str, Any] | None = None,
    seed: int = 0,
    classes: Sequence[int] | None = None,
    recalibration: Iterable[object] | None = None,
    usage: Usage | None = None,
) -> list[ResultRow]:
    """Measure every path of a supernet, one row each, leaving out what the file already has of this very supernet.

    Args:
        supernet: it is put back in the mode it was in.
        batches: images with labels, or token ids with `labels`, such that they can be read several times.
        rule: the name under which the rows are kept.
        rows: where rows go; their metrics are `evaluate`'s.
        training: how the supernet was fine-tuned, as JSON values; None: it was not.
        seed: recorded with the rows.
        classes: of images, measure among these classes only too.
        recalibration: images on which BatchNorm statistics are taken anew for each path, and put back after it; None
            measures with the supernet's own.
        usage: how the paths will be run; given, their seconds and bytes are foretold, for curves over them.

    Returns:
        A row per path, in the order of `supernet.paths`, whether it was measured now or before.

    Raises:
        ValueError: nothing to measure on, or classes or recalibration for text.

    Example:
        >>> supernet = StitchedSupernet.from_anchors([small, large], [(1, 2), (2, 1)], calibration=images)
        >>> file = RowFile(folder / "results.jsonl", {"data": "random"})
        >>> rows = evaluate_supernet(supernet, images, rule="mine", rows=file)
        >>> [row.path for row in rows], sorted(rows[0].metrics)
        (['0[:]', '1[:]', '0[:1] 1[2:]', '0[:2] 1[1:]'], ['accuracy', 'loss'])
    """
    check_classes(batches, supernet.config)
    setting = {"classes": None if classes is None else list(classes), "recalibrated": recalibration is not None}
    setting |= used(usage)
    weights, (costs, _) = [fingerprint(supernet)], path_costs(supernet, usage)
    wanted = {
        path: ResultRow(
            rule, path, seed, cost.macs, cost.parameters, {}, cost.details, training=training, made_from=weights,
            setting=setting,
        )
        for path, cost in costs.items()
    }  # fmt: skip
    missing = [path for path, row in wanted.items() if rows.find(row) is None]
    for group, found in _measured(supernet, missing, batches, classes, recalibration):
        for path, measured in zip(group, found, strict=True):
            details = {**wanted[path].details, **measured.details}
            row = replace(wanted[path], metrics=dict(measured.metrics), details=details)
            rows.append(row, to_disk=process_state().is_main_process)
    return [there for row in wanted.values() if (there := rows.find(row)) is not None]


def supernet_rows(
    rows: Iterable[ResultRow],
    paths: Iterable[AnyPath],
    *,
    rule: str,
    seed: int,
    training: Mapping[str, Any] | None,
) -> list[ResultRow] | None:
    """The rows of one supernet that has all these paths, where `evaluate_supernet` wrote them; None where it did not.

    Args:
        rows: of any supernets.
        paths: those that it must have.
        rule, seed, training: as the rows were written with.

    Returns:
        All its rows, those of the anchors included.

    Example:
        >>> supernet_rows([], [(1, 2)], rule="klas", seed=0, training=None) is None
        True
    """
    like = ResultRow(rule, None, seed, 0, 0, {}, training=training)
    wanted = {str(Path.of(path)) for path in paths}
    found: dict[tuple[str, ...], list[ResultRow]] = {}
    for row in rows:
        if (row.rule, row.seed, row.training) == (like.rule, like.seed, like.training):
            found.setdefault(tuple(row.made_from), []).append(row)
    return next((of_one for of_one in found.values() if wanted <= {row.path for row in of_one}), None)


def _measured(
    supernet: StitchedSupernet,
    paths: Sequence[Path],
    batches: Iterable[object],
    classes: Sequence[int] | None,
    recalibration: Iterable[object] | None,
) -> Iterator[tuple[Sequence[Path], list[Measurement]]]:
    """Paths in groups, each measured in one pass."""
    if supernet.config.image_size is None and (classes is not None or recalibration is not None):
        raise ValueError("got classes or recalibration images for language models; leave them out")
    for group in _groups(paths, GROUP if recalibration is None else 1):
        with nullcontext() if recalibration is None else recalibrated(supernet, group[0], recalibration):
            yield group, _measure_paths(supernet, group, batches, classes)


@torch.no_grad()
def _measure_paths(
    supernet: StitchedSupernet, paths: Sequence[Path], batches: Iterable[object], classes: Sequence[int] | None
) -> list[Measurement]:
    """Some paths in one pass; each anchor's front runs once per batch."""
    task = task_of(supernet)
    sums = [Sums(task, classes) for _ in paths]
    with evaluating(supernet):
        for batch, labels in progress(task.labelled(shared_out(batches)), f"measuring {len(paths)} paths"):
            for one, logits in zip(sums, supernet.logits_of(paths, batch), strict=True):
                one.add(logits, labels)
    return [one.measured() for one in sums]


def _groups(paths: Sequence[Path], size: int) -> Iterator[Sequence[Path]]:
    return (paths[start : start + size] for start in range(0, len(paths), size))
