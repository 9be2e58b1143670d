"""Stitching: the model of a path through anchors.

Each stitching layer starts from the least-squares map between hidden states (KLAS Sec. 5; SN-Net's pseudo-inverse
initialisation), fitted on what the path before it gives.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from klas_hf.anchors.classes import mapped_classes
from klas_hf.anchors.dense import is_dense
from klas_hf.anchors.language import anchor_config, hub_options, on_accelerator
from klas_hf.anchors.vision import is_vision
from klas_hf.budgets import Budget, Cost
from klas_hf.models import StitchedModel
from klas_hf.paths import Path as AnchorPath
from klas_hf.paths import Stitch
from klas_hf.stitching.calibration import sampled

if TYPE_CHECKING:
    from klas_hf.costs import Usage
    from klas_hf.scores.path_scores import PathScores
    from klas_hf.selection.plan import SearchConfig

logger = logging.get_logger(__name__)
Anchor: TypeAlias = str | Path | PreTrainedModel
# What anchors by themselves are not told.
_OF_ASSEMBLY = {"calibration", "calibration_items", "ridge", "joint", "image_size"}


def assemble_path(
    anchors: Sequence[Anchor],
    path: AnchorPath | Stitch | str | Sequence[int],
    *,
    revisions: Sequence[str | None] | None = None,
    **kwargs: Any,
) -> StitchedModel:
    """The model of a path through anchors.

    Args:
        anchors: Hub ids, local folders or models in memory; they are read, never changed, and those that the path does
            not use are not read. All are causal language models, or all image classifiers, or all dense models
            (Mask2Former, UperNet) on backbones of several stages.
        path: `Path`, its text such as "0[:8] 1[14:]", or a `Stitch`; anchors by position.
        revisions: commits of the anchors on the Hub.
        kwargs: `calibration`: batches of token ids (see `token_batches`) or images (`image_batches`) on which the
            stitching layers are fitted by least squares, one after the other; None leaves them random, with a warning.
            `calibration_items`: read so many sequences or images, in whole batches, spread over all batches where
            their number is known; None: 256, or as many more as make ten rows per feature.
            `ridge`: penalty of the fits; None chooses (see `LeastSquares.solve`). `joint`: what joints are: layers that
            start from "least_squares" (default); "merged", no layers between slices of one anchor, for least squares
            go into the MLP before each cut (ReplaceMe), where the family allows it; layers from LinearPatch's map
            ("linear_patch") or from the map that turns states towards the next anchor's ("cosine"), both between
            states of one width; or "identity", no layers between slices of one anchor, which is this anchor without
            the blocks left out. `dtype`: None takes that of the last anchor. `device_map` (None, and no anchor in
            memory: accelerate's device) and others as for `from_pretrained`; for images also `image_size`, where the
            anchors' configurations are for different ones; and `head`, a `UperNetConfig` or `Mask2FormerConfig` whose
            new head the path's maps go to, which is to be trained.

    Returns:
        A `StitchedForCausalLM` or a `StitchedForImageClassification`, or a dense model of transformers' own class on a
        `StitchedBackbone`, with the last slice's head or a new one, in eval mode.

    Raises:
        ValueError: path out of range, or between different grids; family unknown; vocabularies or classes of the ends
            differ; anchors for text and for images; nothing to calibrate on; a path without a map that a head needs.
        OSError: an anchor cannot be reached.
    """
    path = AnchorPath.of(path)
    return _assemble(anchors, path, revisions, _configs(anchors, path, revisions, kwargs), kwargs)


def stitch_anchors(
    source: Anchor,
    target: Anchor,
    stitch: AnchorPath | Stitch | str | Sequence[int] | None = None,
    *,
    budget: Budget | Cost | str | float | None = None,
    search: "SearchConfig | None" = None,
    usage: "Usage | None" = None,
    source_revision: str | None = None,
    target_revision: str | None = None,
    **kwargs: Any,
) -> StitchedModel:
    """Join `source.blocks[:i]` to `target.blocks[j:]`: `assemble_path` for two anchors.

    Args:
        stitch: `Stitch(i, j)` or `(i, j)`, or any path through the two.
        budget: in its place, what the model may cost (see `Budget.of`): the best path within it is searched for.
        search: settings of that search; None takes the defaults.
        usage: how the model will be run, for a budget in seconds; None takes the defaults.
        kwargs: as for `assemble_path`.

    Raises:
        ValueError: as `assemble_path`; not one of stitch and budget, or a budget that no path meets; a source dearer
            than the target that it is stitched to.
    """
    anchors, revisions = (source, target), (source_revision, target_revision)
    if stitch is None and budget is not None:
        return _searched(anchors, Budget.of(budget), search, usage, revisions, kwargs)
    if stitch is None or budget is not None:
        raise ValueError(
            f"got stitch={stitch} and budget={budget}; expected exactly one of them: a stitch such as (8, 14), or what "
            'the model may cost, such as "60%"'
        )
    if search is not None or usage is not None:
        given = "usage" if search is None else "search"
        raise ValueError(f"got {given}=… with a stitch, which needs none; expected it with budget=… alone")
    path = AnchorPath.of(stitch)
    configs = _configs(anchors, path, revisions, kwargs)
    if path.stitch is not None:
        _check_pair(configs, kwargs.get("image_size"))
    return _assemble(anchors, path, revisions, configs, kwargs)


def assemble_best(
    anchors: Sequence[Anchor], found: "PathScores", budget: Budget | Cost | str | float,
    path: AnchorPath | None = None, **kwargs: Any,
) -> StitchedModel:  # fmt: skip
    """The model of the best path within a budget; its config says, as `search`, how the path was found.

    Args:
        anchors: those that were searched, in that order.
        found: what the search found.
        budget: see `Budget.of`.
        path: another of the paths within it; None: the best.
        kwargs: as for `assemble_path`.

    Raises:
        ValueError: as `assemble_path` and `PathScores.best`.
    """
    path, wanted = path or found.best(budget), Budget.of(budget)
    model = assemble_path(anchors, path, **{"joint": found.joint(path)} | kwargs)
    place = found.place(path)
    about = model.config.backbone_config if is_dense(model) else model.config
    about.search = {
        "budget": wanted.text, "share": found.share(path), "divergence": float(found.divergence[place]),
        "error": float(found.error[place]), "paths": len(found),
    }  # fmt: skip
    return model


def _searched(
    anchors: Sequence[Anchor],
    budget: Budget,
    search: "SearchConfig | None",
    usage: "Usage | None",
    revisions: Sequence[str | None],
    kwargs: dict[str, Any],
) -> StitchedModel:
    """The model of the best path within a budget, searched for on the calibration data."""
    from klas_hf.costs import Usage
    from klas_hf.selection.plan import SearchPlan, unallocated_anchors
    from klas_hf.selection.search import search_paths

    if kwargs.get("calibration") is None:
        raise ValueError(
            f"got budget={budget.text!r} and no calibration; expected calibration=batches, on which paths are compared"
        )
    shapes = unallocated_anchors(anchors, revisions, **hub_options(kwargs))
    widest, items = max(max(anchor.widths) for anchor in shapes), kwargs.get("calibration_items")
    batches = list(
        sampled(
            kwargs["calibration"],
            shapes[0].read,
            lambda batch: widest * len(batch) / max(1, batch.fewest_rows),
            items,
        )
    )
    ids = batches[0].inputs.get("input_ids") if batches else None
    tokens = 128 if ids is None else ids.shape[1]
    usage = Usage() if usage is None and budget.timed else usage
    about: dict[str, Any] = {"usage": usage, "budget": budget}
    SearchPlan(shapes, batches, search, tokens, **about).check(budget)
    given = {name: value for name, value in kwargs.items() if name not in _OF_ASSEMBLY and value is not None}
    about["classes"] = mapped_classes(kwargs["calibration"], shapes[0].classes)
    found = search_paths(anchors, batches, search, tokens=tokens, revisions=revisions, **about, **given)
    return assemble_best(anchors, found, budget, revisions=revisions, **kwargs | {"calibration": batches})


def _configs(
    anchors: Sequence[Anchor], path: AnchorPath, revisions: Sequence[str | None] | None, kwargs: dict[str, Any]
) -> list[PreTrainedConfig]:
    """The configurations of the anchors that the path uses.

    Raises:
        ValueError: some are for images and some for text, an anchor is not there, or there are not as many revisions.
    """
    if isinstance(anchors, str) or not len(anchors):
        raise ValueError(f"got anchors={anchors!r}; expected a list of Hub ids, folders or models")
    if revisions is not None and len(revisions) != len(anchors):
        raise ValueError(f"got {len(revisions)} revisions for {len(anchors)} anchors; expected one, or None, for each")
    path.bounds([10**9] * len(anchors))  # an anchor that is not there
    pairs = list(zip(anchors, revisions or [None] * len(anchors), strict=True))
    configs = [
        anchor.config if isinstance(anchor, PreTrainedModel) else anchor_config(anchor, **hub_options(kwargs, revision))
        for anchor, revision in (pairs[place] for place in path.anchors)
    ]
    kinds = [_kind(config) for config in configs]
    if len(set(kinds)) > 1:
        raise ValueError(f"got the anchors {' and '.join(kinds)}; expected all of one kind")
    if kwargs.get("head") is not None and kinds[0] != "image classifier":
        raise ValueError(
            f"got head=a {type(kwargs['head']).__name__} for anchors of the kind {kinds[0]!r}; expected image "
            "classifiers, whose heads it takes the place of"
        )
    return configs


def _kind(config: PreTrainedConfig) -> str:
    if is_dense(config):
        return "dense model"
    return "image classifier" if is_vision(config) else "language model"


def _assemble(
    anchors: Sequence[Anchor],
    path: AnchorPath,
    revisions: Sequence[str | None] | None,
    configs: Sequence[PreTrainedConfig],
    kwargs: dict[str, Any],
) -> StitchedModel:
    if kwargs.get("head") is None:
        kwargs.pop("head", None)
    if "torch_dtype" in kwargs:
        logger.warning_once("`torch_dtype` is deprecated! Use `dtype` instead!")
        kwargs["dtype"] = kwargs.pop("torch_dtype")
    if kwargs.get("device_map") is None and not any(isinstance(anchors[n], PreTrainedModel) for n in path.anchors):
        kwargs["device_map"] = on_accelerator()
    model = _joining(configs[0], kwargs)(anchors, path, revisions=revisions, **kwargs)
    embeds = path.slices[0].anchor
    if isinstance(model, StitchedModel) and not isinstance(anchors[embeds], PreTrainedModel):
        revision = None if revisions is None else revisions[embeds]
        model.processor_from = str(anchors[embeds]), hub_options(kwargs, revision)
    return model


# Anchors of one kind are joined without importing what joins the others, which takes longer than a small model.


def _check_pair(configs: Sequence[PreTrainedConfig], image_size: Any) -> None:
    """Raise ValueError for two anchors that are not to be stitched in this order."""
    if is_dense(configs[0]):
        from klas_hf.stitching.dense import check_dense_pair

        check_dense_pair(configs[0], configs[1], image_size)
    elif is_vision(configs[0]):
        from klas_hf.stitching.images import check_pair, common_size

        check_pair(configs[0], configs[1], common_size(configs, image_size))
    else:
        from klas_hf.stitching.language import check_direction

        check_direction([str(config.name_or_path or None) for config in configs], configs)


def _joining(config: PreTrainedConfig, options: dict[str, Any]) -> Callable[..., Any]:
    """What joins anchors of this kind."""
    if is_dense(config) or options.get("head") is not None:
        from klas_hf.stitching.dense import stitch_dense

        return stitch_dense
    if is_vision(config):
        from klas_hf.stitching.images import stitch_classifiers

        return stitch_classifiers
    from klas_hf.stitching.language import stitch_decoders

    return stitch_decoders
