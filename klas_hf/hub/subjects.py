"""What there is to say of each kind of thing that goes to the Hub: models of a path, supernets, probes, scores."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from klas_hf.anchors.dense import DENSE_HEADS, dense_head
from klas_hf.costs import measure_costs
from klas_hf.hub import usage
from klas_hf.hub.pages import anchor_pages
from klas_hf.hub.subject import Subject, identity, link, public_config, scores_config, with_revision
from klas_hf.models import StitchedVisionConfig
from klas_hf.models.vision_features import image_size
from klas_hf.paths import Path as AnchorPath
from klas_hf.scores.values import StitchScores


def describe(what: PreTrainedModel | StitchScores, base_model: Sequence[str] | None = None) -> Subject:
    """What there is to say of a model, probes or scores.

    Args:
        base_model: Hub ids of the anchors, where they were read from folders.

    Raises:
        TypeError: it is none of them.
    """
    if isinstance(what, StitchScores):
        return _scores(what, base_model)
    kind = type(what).__name__
    if not isinstance(what, PreTrainedModel) or kind not in _KINDS:
        raise TypeError(
            f"got {kind}; expected StitchScores or one of {', '.join(_KINDS)}. Other models have a push_to_hub "
            "of their own"
        )
    return _KINDS[kind](what, base_model)


def _stitched(config: Any, base_model: Sequence[str] | None, whole: Any = None, **about: Any) -> Subject:
    """What is alike for all models of one path.

    Args:
        config: that names the path and its anchors.
        whole: of the dense model that it is the backbone of; None: it is the model's own.
    """
    path, count = AnchorPath.parse(config.path), len(config.anchor_blocks)
    names, revisions = config.anchor_names or [None] * count, config.anchor_revisions or [None] * count
    anchors = anchor_pages([(names[place], revisions[place]) for place in path.anchors], base_model)
    pages = dict(zip(path.anchors, anchors, strict=True))
    parts = [
        f"blocks {start + 1}–{stop} of {link(pages[place])}" for place, start, stop in config.slices if stop > start
    ]
    layers = 0 if config.identity_joints else path.joints
    joints = {0: "no stitching layer", 1: "a linear stitching layer between"}.get(
        layers, f"{layers} linear stitching layers between"
    )
    head = f"and the head of {link(pages[path.slices[-1].anchor])}"
    if whole is not None:
        head = f"as the backbone of a `{dense_head(whole).model_class}`"
    facts = {f"anchor {place}": with_revision(page) for place, page in pages.items()} | {"path": f"`{path}`"}
    if config.search:
        facts["chosen as"] = _choice(config.search)
    about["facts"] = facts | about["facts"]
    return Subject(
        summary=f"The {', then the '.join(parts)}, {joints}, {head}: path `{path}`, made with `klas_hf`.",
        anchors=anchors, origin=_start(config.joint_fits, layers), paths=(str(path),), trained=bool(config.training),
        identity=identity(public_config((whole or config).to_dict(), anchors)), carries_code=whole is None, **about,
    )  # fmt: skip


_STARTS = {None: "least squares", "linear_patch": "LinearPatch's map", "cosine": "the map of largest cosine"}


def _choice(search: Mapping[str, Any]) -> str:
    """How a path was found."""
    near = f"{search['divergence']:.4f} ± {search['error']:.4f} nats before training"
    within = f"of {search['paths']:,} measured, within a budget of {search['budget']}"
    healed = search.get("contenders", [])
    if len(healed) < 2:
        return f"the one of least divergence from the dearest anchor, {near}, {within}"
    paths = ", ".join(f"`{one['path']}` {one['end']:.4f}" for one in healed)
    return (
        f"the best on held-out data of {len(healed)} that were healed alike ({paths}); its divergence from the dearest "
        f"anchor was {near}; {within}"
    )


def _start(fits: Sequence[Mapping[str, Any]] | None, joints: int) -> str:
    """How the stitching layers started."""
    if not joints and fits:
        listed = ", ".join(f"{fit['r2']:.3f} (ridge {fit['ridge']:.2g})" for fit in fits)
        return (
            "It has no stitching layer: least squares were merged into the MLP of the block before each cut (as in "
            f"ReplaceMe), on {fits[0]['rows']:,} positions: R² = {listed}."
        )
    if not joints:
        return "It has no stitching layer."
    if not fits:
        return "The stitching layers started from random weights."
    listed = ", ".join(f"{fit['r2']:.3f} (ridge {fit['ridge']:.2g})" for fit in fits)
    return (
        f"The stitching layers started from {_STARTS[fits[0].get('joint')]}, each from what the path before it gives "
        f"to the hidden states of the next anchor, on {fits[0]['rows']:,} positions: R² = {listed}."
    )


def _language(what: PreTrainedModel, base_model: Sequence[str] | None) -> Subject:
    return _stitched(
        what.config, base_model, kind="Stitched language model", pipeline_tag="text-generation", task="text-generation",
        processor="tokenizer", code=usage.language, facts=_cost_facts(what, "sequence of 128 tokens"),
        limits=_MODEL_LIMITS,
    )  # fmt: skip


def _headless(what: PreTrainedModel, base_model: Sequence[str] | None) -> Subject:
    return _stitched(
        what.config, base_model, kind="Stitched decoder", pipeline_tag="feature-extraction", processor="tokenizer",
        code=usage.decoder, facts=_parameter_facts(what), limits=_MODEL_LIMITS,
    )  # fmt: skip


def _classifier(what: PreTrainedModel, base_model: Sequence[str] | None) -> Subject:
    height, width = what.config.image_size
    return _stitched(
        what.config, base_model, kind="Stitched image classifier", pipeline_tag="image-classification",
        task="image-classification", processor="image processor", code=usage.classifier(height, width),
        facts=_cost_facts(what, f"image of {height}×{width} pixels"), limits=_MODEL_LIMITS,
    )  # fmt: skip


def _backbone(what: PreTrainedModel, base_model: Sequence[str] | None) -> Subject:
    height, width = what.config.image_size
    return _stitched(
        what.config, base_model, kind="Stitched backbone", pipeline_tag="image-feature-extraction",
        processor="image processor", code=usage.backbone(height, width), facts=_parameter_facts(what),
        limits=_MODEL_LIMITS,
    )  # fmt: skip


def _dense(what: PreTrainedModel, base_model: Sequence[str] | None) -> Subject:
    config = what.config.backbone_config
    if not isinstance(config, StitchedVisionConfig):
        raise TypeError(f"got a {type(what).__name__} whose backbone is not stitched; expected one made by from_path")
    height, width = image_size(config)
    return _stitched(
        config, base_model, what.config, kind="Stitched segmentation model", pipeline_tag="image-segmentation",
        task="image-segmentation", processor="image processor",
        code=usage.segmenter(type(what).__name__, height, width),
        facts=_cost_facts(what, f"image of {height}×{width} pixels"), limits=_MODEL_LIMITS,
    )  # fmt: skip


def _supernet(what: PreTrainedModel, base_model: Sequence[str] | None) -> Subject:
    config = what.config
    names, revisions = (given or [None] * len(config.anchor_configs) for given in (
        config.anchor_names, config.anchor_revisions))  # fmt: skip
    anchors = anchor_pages(list(zip(names, revisions, strict=True)), base_model)
    fits = [fit["r2"] for fit in config.joint_fits or []]
    start = "The stitching layers started from random weights."
    if fits:
        start = f"The stitching layers started from least squares (R² from {min(fits):.3f} to {max(fits):.3f})."
    listed = "\n".join(f"{place}. {with_revision(anchor)}" for place, anchor in enumerate(anchors))
    images = config.image_size is not None
    macs = [cost.macs / 1e6 for cost in what.path_costs]
    between = f"{min(macs):,.1f} to {max(macs):,.1f} million"
    return Subject(
        kind="Stitched supernet",
        summary=f"{len(anchors)} anchors and {len(config.paths)} paths through them that were trained together, made "
        f"with `klas_hf`. Every path is a model of its own.\n\n{listed}",
        anchors=anchors,
        code=usage.supernet(config.paths[-1]),
        facts={"paths": str(len(what.paths)), "MACs of a path": between} | _parameter_facts(what),
        origin=start,
        limits=_MODEL_LIMITS,
        task="image-classification" if images else "text-generation",
        paths=tuple(config.paths),
        trained=bool(config.training),
        processor="image processor" if images else "tokenizer",
        identity=identity(public_config(config.to_dict(), anchors)),
    )


def _probes(what: PreTrainedModel, base_model: Sequence[str] | None) -> Subject:
    config = what.config
    anchors = anchor_pages([(config.anchor_name, config.anchor_revision)], base_model)
    images = type(what).__name__ == "ImageProbeNet"
    if images:
        origin = f"Linear classifiers on pooled features, at most {config.epochs} epochs, early stopping for each."
        good = config.accuracy and _span("validation accuracy", config.accuracy)
    else:
        origin = f"Kind `{config.kind}`: maps in hidden space before the anchor's own norm and unembedding."
        good = config.r2 and _span("R² of the ridge maps", config.r2)
    return Subject(
        kind="Probes",
        summary=f"One probe per block of {link(anchors[0])}, made with `klas_hf` to score stitches (KLAS, Alg. 1).",
        anchors=anchors,
        code=usage.probes(type(what).__name__),
        facts={"anchor": with_revision(anchors[0])}
        | {"blocks": str(len(config.widths) if images else config.num_blocks)}
        | dict([good] if good else []),
        origin=origin,
        limits=("They fit the very weights of their anchor and are refused for others.",),
        tags=("probes", "klas"),
        relation="adapter",
        identity=identity(public_config(config.to_dict(), anchors)),
    )


def _scores(what: StitchScores, base_model: Sequence[str] | None) -> Subject:
    sides = [what.provenance.get(side, {}) for side in ("source", "target")]
    anchors = anchor_pages([(side.get("name"), side.get("revision")) for side in sides], base_model)
    amount = (
        f"{what.tokens:,} tokens of {what.sequences:,} sequences" if what.costs.tokens else f"{what.tokens:,} images"
    )
    return Subject(
        kind="Stitch scores",
        summary=f"How well each block of {link(anchors[0])} can be followed by each block of {link(anchors[1])}, "
        "scored with `klas_hf` (KLAS, Alg. 2). Lower is better.",
        anchors=anchors,
        code=usage.scores,
        facts={
            "source": with_revision(anchors[0]),
            "target": with_revision(anchors[1]),
            "score": what.score,
            "also there": ", ".join(name for name in what.available if name != what.score) or "–",
            "stitches with a score": str(len(what.stitches)),
        },
        origin=f"Measured over {amount}.",
        limits=("No score wins everywhere: compare the stitches it picks at matched size.",),
        tags=("stitch-scores", "klas"),
        library_name=None,
        relation=None,
        identity=identity(scores_config(what, anchors)),
    )


_KINDS: dict[str, Callable[[Any, Sequence[str] | None], Subject]] = {
    "StitchedForCausalLM": _language,
    "StitchedTextModel": _headless,
    "StitchedForImageClassification": _classifier,
    "StitchedBackbone": _backbone,
    **{head.model_class: _dense for head in DENSE_HEADS.values()},
    "StitchedSupernet": _supernet,
    "StitchedSupernetForCausalLM": _supernet,
    "StitchedSupernetForImageClassification": _supernet,
    "ProbeNet": _probes,
    "ImageProbeNet": _probes,
}

_MODEL_LIMITS = (
    "It knows and gets wrong what its anchors do; their cards hold for it too.",
    "What was not measured above is not known: that it runs says nothing of how good it is.",
    "No score foretells the quality of every stitch, and a curve is of one run.",
)


def _cost_facts(what: PreTrainedModel, unit: str) -> dict[str, str]:
    cost = measure_costs(what)
    facts = {
        "parameters": f"{cost.parameters / 1e6:,.2f} million",
        f"MACs per {unit}": f"{cost.macs / 1e6:,.1f} million",
    }
    return facts | ({"cache, bytes per token": f"{cost.kv_bytes_per_token:,}"} if cost.kv_bytes_per_token else {})


def _parameter_facts(what: PreTrainedModel) -> dict[str, str]:
    return {"parameters": f"{sum(parameter.numel() for parameter in what.parameters()) / 1e6:,.2f} million"}


def _span(name: str, values: Sequence[float]) -> tuple[str, str]:
    return name, f"{min(values):.3f} to {max(values):.3f}"
