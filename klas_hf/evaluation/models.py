"""Rows of whatever is measured, of stitched models one by one, and of anchors."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from transformers import PreTrainedModel

from klas_hf.anchors.weights import fingerprint
from klas_hf.costs import Usage, measure_costs
from klas_hf.processes import process_state
from klas_hf.rows import AnyPath, ResultRow, RowFile


@dataclass(frozen=True)
class Measurement:
    """What was measured of one model.

    Attributes:
        metrics: name → value.
        details: anything else worth keeping with the row, as JSON values.

    Example:
        >>> Measurement({"loss": 3.1}, {"data": "my_text"}).details
        {'data': 'my_text'}
    """

    metrics: Mapping[str, float]
    details: Mapping[str, Any] = field(default_factory=dict)


P = TypeVar("P", bound=AnyPath)


def evaluate_stitches(
    stitches: Iterable[P],
    make: Callable[[P], PreTrainedModel],
    measure: Callable[[PreTrainedModel], Measurement],
    *,
    rule: str,
    rows: RowFile,
    anchors: Sequence[str],
    training: Mapping[str, Any] | None,
    seed: int = 0,
    tokens: int = 128,
    usage: Usage | None = None,
    setting: Mapping[str, Any] | None = None,
) -> list[ResultRow]:
    """Make and measure each stitch or other path, one row each, leaving out what the file already has.

    A row is taken up again only where its path, anchors, training, seed, tokens and setting are the same. One that
    another rule chose is not made again then: the row is repeated under this rule.

    Args:
        stitches: the selection of one rule: stitches, or any paths; an anchor alone (`"1[:]"`) is one.
        make: builds (and trains) the model of a path; must depend on nothing but the path and what is named here.
        measure: figures of a model.
        rule: name of the selection rule.
        rows: where rows go.
        anchors: what identifies the weights of the anchors: fingerprints, or Hub ids with commits.
        training: how `make` trains, as JSON values (`asdict(TrainingConfig(…))`, data, teacher); None: it does not.
        seed: recorded with the rows.
        tokens: sequence length that costs are for.
        usage: how the models will be run; given, each is timed so, for curves over seconds and bytes.
        setting: what else `make` and `measure` depend on, as JSON values: how slices are joined, say.

    Returns:
        A row per path, in order, whether it was measured now or before.

    Raises:
        ValueError: a path that the anchors do not have; whatever `make` and `measure` raise.

    Example:
        >>> def make(stitch):
        ...     return StitchedModel.from_anchors(source, target, stitch, calibration=batches)
        >>> def measure(model):
        ...     return Measurement({"loss": 1.0})
        >>> file = RowFile(folder / "results.jsonl", {"data": "random"})
        >>> rows = evaluate_stitches(
        ...     select_stitches(scores, buckets=2), make, measure, rule="klas", rows=file, training=None,
        ...     anchors=[fingerprint(source), fingerprint(target)],
        ... )
        >>> len(rows) == len(file) == len(select_stitches(scores, buckets=2))
        True
    """
    done = []
    for path in stitches:
        like = _wanted(rule, path, seed, tokens, anchors, training, used(usage) | dict(setting or {}))
        row = rows.find(like, any_rule=True)
        if row is None or row.rule != rule:
            if row is None:
                model = make(path)
                row = _measured(like, model, measure(model), usage)
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
    position: int | None = None,
    training: Mapping[str, Any] | None = None,
    seed: int = 0,
    tokens: int = 128,
    image_size: int | tuple[int, int] | None = None,
    usage: Usage | None = None,
) -> ResultRow:
    """Measure an anchor itself: the ends of a curve.

    Args:
        model: the anchor.
        measure, rows, seed, tokens, usage: as for `evaluate_stitches`.
        rule: the name under which the row is kept, such as "source" or "target".
        position: of the anchor among those that paths are made of; None: no path names it.
        training: how it was fine-tuned, as JSON values; None: it was not.
        image_size: of the images that costs are counted for, as for `measure_costs`.

    Returns:
        Its row, measured now or before; one of other weights does not count.

    Raises:
        ValueError: a family whose costs cannot be counted; whatever `measure` raises.

    Example:
        >>> file = RowFile(folder / "results.jsonl", {"data": "random"})
        >>> def measure(model):
        ...     return Measurement({"loss": 1.0})
        >>> row = evaluate_anchor(target, measure, rule="target", rows=file, position=1)
        >>> row.path, row.parameters == target.num_parameters(), len(file)
        ('1[:]', True, 1)
    """
    path = None if position is None else f"{position}[:]"
    setting = used(usage) | ({} if image_size is None else {"image_size": image_size})
    like = _wanted(rule, path, seed, tokens, [fingerprint(model)], training, setting)
    row = rows.find(like)
    if row is None:
        row = _measured(like, model, measure(model), usage, image_size)
        rows.append(row, to_disk=process_state().is_main_process)
    return row


def _wanted(
    rule: str, path: AnyPath | None, seed: int, tokens: int, anchors: Sequence[str],
    training: Mapping[str, Any] | None, setting: Mapping[str, Any],
) -> ResultRow:  # fmt: skip
    """The row, without its figures."""
    setting = {"tokens": tokens, **setting}
    return ResultRow(rule, path, seed, 0, 0, {}, training=training, made_from=anchors, setting=setting)


def used(usage: Usage | None) -> dict[str, Any]:
    """How models were run, as a setting of rows: nothing where they were not timed."""
    return {} if usage is None else {"usage": asdict(usage)}


def _measured(
    row: ResultRow, model: PreTrainedModel, measured: Measurement, usage: Usage | None,
    image_size: int | tuple[int, int] | None = None,
) -> ResultRow:  # fmt: skip
    cost = measure_costs(model, tokens=row.setting["tokens"], image_size=image_size, usage=usage)
    fits = model.config.to_dict().get("joint_fits")
    details = {"kv_bytes_per_token": cost.kv_bytes_per_token} | cost.details | ({"joint_fits": fits} if fits else {})
    return replace(
        row, macs=cost.macs, parameters=cost.parameters, metrics=dict(measured.metrics),
        details=details | dict(measured.details),
    )  # fmt: skip
