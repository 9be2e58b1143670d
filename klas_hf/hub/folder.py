"""The folder that goes to the Hub: model or scores, tokenizer or image processor, licence files, picture."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel

from klas_hf.hub.licences import attribution, is_legal_file, stated_licence
from klas_hf.hub.pages import AnchorPage
from klas_hf.hub.results import draw_curve
from klas_hf.hub.subject import Subject, public_config, scores_config
from klas_hf.rows import ResultRow
from klas_hf.scores.values import SCORES_FILE, StitchScores

_PROCESSORS = {
    "tokenizer": (AutoTokenizer, ("tokenizer_config.json", "tokenizer.json")),
    "image processor": (AutoImageProcessor, ("preprocessor_config.json", "processor_config.json")),
}


def find_processor(subject: Subject, token: str | bool | None) -> Any:
    """The tokenizer or image processor of the last anchor, or None where none is needed or, with a warning, none found.

    Raises:
        OSError: the anchor should be on the Hub, but cannot be read.
    """
    if subject.processor is None:
        return None
    auto, files = _PROCESSORS[subject.processor]
    anchor = subject.anchors[-1]
    if any(anchor.file(name, token) for name in files):
        if anchor.folder:
            return auto.from_pretrained(anchor.folder)
        return auto.from_pretrained(anchor.base_model, revision=anchor.revision or "main", token=token)
    warnings.warn(
        f"the anchor {anchor.title} has no {subject.processor}, so the repo gets none; save one "
        "into the model's folder, or pass tokenizer_or_processor=…",
        stacklevel=3,
    )
    return None


def picture_name(what: PreTrainedModel | StitchScores, rows: Sequence[ResultRow] | None) -> str | None:
    """The file of the picture on the card: scores have a heatmap, what was measured a curve."""
    if isinstance(what, StitchScores):
        return "heatmap.png"
    return "curve.png" if rows else None


def draw_picture(
    folder: Path,
    what: PreTrainedModel | StitchScores,
    subject: Subject,
    rows: Sequence[ResultRow] | None,
    metric: str | None,
    cost: str,
) -> None:
    """Draw it, if there is one; curves over a cost, of `COSTS`.

    Raises:
        ValueError: a row lacks the metric or the cost.
    """
    if rows:
        draw_curve(rows, metric, subject.paths, folder / "curve.png", cost, subject.trained)
    if isinstance(what, StitchScores):
        what.plot().savefig(folder / "heatmap.png", dpi=130)


def save(folder: Path, what: PreTrainedModel | StitchScores, subject: Subject, max_shard_size: int | str) -> None:
    """Write the model or scores, with the anchors called as on the card."""
    path = folder / "config.json"
    if isinstance(what, StitchScores):
        _renamed(what, subject.anchors).save(folder / SCORES_FILE)
        config: Mapping[str, Any] = scores_config(what, subject.anchors)
    else:
        what.save_pretrained(folder, max_shard_size=max_shard_size)
        config = public_config(json.loads(path.read_text(encoding="utf-8")), subject.anchors)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def carry_legal_files(folder: Path, subject: Subject, token: str | bool | None) -> None:
    """Copy the anchors' licence files; of two that differ under one name the later gets its anchor's."""
    if subject.relation is None:
        return
    licences = []
    for anchor in subject.anchors:
        try:
            licences.append(stated_licence(anchor.card(token)))
            found = {name: anchor.file(name, token) for name in anchor.files(token) if is_legal_file(name)}
        except OSError as error:  # the card was written all the same, so the user has said which licence holds
            warnings.warn(f"no licence file is carried over from {anchor.title}: {error}", stacklevel=3)
            continue
        for name, path in found.items():
            assert path is not None
            _add(folder / name, path.read_bytes(), anchor.title.rpartition("/")[2])
    if lines := attribution(licences):
        notice = folder / "NOTICE"
        known = notice.read_text(encoding="utf-8") if notice.exists() else ""
        notice.write_text(known + "".join(f"{line}\n" for line in lines if line not in known), encoding="utf-8")


def _add(place: Path, content: bytes, owner: str) -> None:
    if place.exists() and place.read_bytes() != content:
        place = place.with_name(f"{place.stem}-{owner}{place.suffix}")
    place.write_bytes(content)


def _renamed(scores: StitchScores, anchors: Sequence[AnchorPage]) -> StitchScores:
    sides = {
        side: {**scores.provenance[side], "name": anchor.title}
        for side, anchor in zip(("source", "target"), anchors, strict=True)
        if side in scores.provenance
    }
    return replace(scores, provenance=scores.provenance | sides)
