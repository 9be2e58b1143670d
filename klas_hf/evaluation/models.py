"""Rows of whatever is measured, of stitched models one by one, and of anchors."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel

from klas_hf.costs import measure_costs
from klas_hf.paths import Stitch
from klas_hf.processes import process_state
from klas_hf.rows import ResultRow, RowFile


@dataclass(frozen=True)
class Measurement:
    """What was measured of one model.

    Attributes:
        metrics: name → value.
        details: anything else worth keeping with the row, as JSON values.

    Example:
        >>> Measurement({"loss": evaluate_loss(target, batches)}, {"data": "my_text"}).details
        {'data': 'my_text'}
    """

    metrics: Mapping[str, float]
    details: Mapping[str, Any] = field(default_factory=dict)


def evaluate_stitches(
    stitches: Iterable[Stitch],
    make: Callable[[Stitch], PreTrainedModel],
    measure: Callable[[PreTrainedModel], Measurement],
    *,
    rule: str,
    rows: RowFile,
    seed: int = 0,
    tokens: int = 128,
) -> list[ResultRow]:
    """Make and measure each stitch, one row each, leaving out what the file already has.

    A stitch that another rule chose with the same seed is not made again: the row is repeated under this rule.

    Args:
        stitches: the selection of one rule.
        make: builds (and trains) the model of a stitch; must depend on nothing but the stitch and the seed.
        measure: figures of a model.
        rule: name of the selection rule.
        rows: where rows go.
        seed: recorded with the rows.
        tokens: sequence length that costs are for.

    Returns:
        A row per stitch, in order, whether it was measured now or before.

    Raises:
        ValueError: a stitch that the anchors do not have; whatever `make` and `measure` raise.

    Example:
        >>> def make(stitch):
        ...     return StitchedModel.from_anchors(source, target, stitch, calibration=batches)
        >>> def measure(model):
        ...     return Measurement({"loss": evaluate_loss(model, batches)})
        >>> file = RowFile(folder / "results.jsonl", {"data": "random"})
        >>> rows = evaluate_stitches(select_stitches(scores, buckets=2), make, measure, rule="klas", rows=file)
        >>> len(rows) == len(file) == len(select_stitches(scores, buckets=2))
        True
    """
    done = []
    for stitch in stitches:
        row = rows.find(rule, stitch, seed)
        if row is None:
            row = next((r for r in rows if r.is_of(stitch) and r.seed == seed), None)
            if row is None:
                model = make(stitch)
                pair = (stitch.source_stop, stitch.target_start)
                row = _row(rule, pair, seed, model, measure(model), tokens)
                row = replace(row, anchors=(stitch.source, stitch.target))
            row = replace(row, rule=rule)
            rows.append(row, to_disk=process_state().is_main_process)
        done.append(row)
    return done


def evaluate_anchor(
    model: PreTrainedModel,
    measure: Callable[[PreTrainedModel], Measurement],
    *,
    rule: str,
    rows: RowFile,
    seed: int = 0,
    tokens: int = 128,
) -> ResultRow:
    """Measure an anchor itself: the ends of a curve.

    Args:
        model: the anchor.
        measure, rows, seed, tokens: as for `evaluate_stitches`.
        rule: the name under which the row is kept, such as "source" or "target".

    Returns:
        Its row, measured now or before.

    Raises:
        ValueError: a family whose costs cannot be counted; whatever `measure` raises.

    Example:
        >>> file = RowFile(folder / "results.jsonl", {"data": "random"})
        >>> def measure(model):
        ...     return Measurement({"loss": evaluate_loss(model, batches)})
        >>> row = evaluate_anchor(target, measure, rule="target", rows=file)
        >>> row.stitch, row.parameters == target.num_parameters(), len(file)
        (None, True, 1)
    """
    row = rows.find(rule, None, seed)
    if row is None:
        row = _row(rule, None, seed, model, measure(model), tokens)
        rows.append(row, to_disk=process_state().is_main_process)
    return row


def _row(
    rule: str, stitch: tuple[int, int] | None, seed: int, model: PreTrainedModel, measured: Measurement, tokens: int
) -> ResultRow:
    cost = measure_costs(model, tokens=tokens)
    fit = model.config.to_dict().get("stitch_fit")
    details = {"kv_bytes_per_token": cost.kv_bytes_per_token} | ({"stitch_fit": fit} if fit else {})
    return ResultRow(
        rule, stitch, seed, cost.macs, cost.parameters, dict(measured.metrics), details | dict(measured.details)
    )
