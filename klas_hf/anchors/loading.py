"""Anchors of either kind, from whatever names them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from klas_hf.anchors.anchor import Anchor
from klas_hf.anchors.language import hub_options, load_anchor
from klas_hf.anchors.vision import is_vision, load_vision_anchor

_ONE_ANCHOR = "as source and as target; expected two different anchors, the cheaper one as the source"


def load_anchors(anchors: Sequence[Any], revisions: Sequence[str | None] | None = None, **options: Any) -> list[Anchor]:
    """Hub ids, folders, models or anchors, all language models, all image classifiers or all dense, as anchors.

    Args:
        revisions: their commits on the Hub.
        options: for `from_pretrained` (dtype, device_map, token, …) where they are not loaded yet.

    Raises:
        OSError: neither a folder nor to be had from the Hub.
        ValueError: an unknown family, or anchors for text and for images.
    """
    own = [options | ({"revision": one} if one else {}) for one in revisions or [None] * len(anchors)]
    images = [is_vision(anchor, **hub_options(one)) for anchor, one in zip(anchors, own, strict=True)]
    if len(set(images)) > 1:
        raise ValueError("got anchors for images and for text; expected all of one kind")
    load: Callable[..., Anchor] = load_vision_anchor if images[0] else load_anchor
    return [load(anchor, **kwargs) for anchor, kwargs in zip(anchors, own, strict=True)]


def load_pair(
    source: Any, target: Any, revisions: Sequence[str | None] | None = None, **options: Any
) -> tuple[Anchor, Anchor]:
    """Two different anchors, loaded where they are not; arguments as for `load_anchors`.

    Raises:
        ValueError: one anchor twice, an unknown family, other classes or vocabularies.
    """
    check_different(source, target)
    first, last = load_anchors([source, target], revisions, **options)
    first.check_like(last)
    if first.fingerprint == last.fingerprint:
        raise ValueError(f"got the anchor {last.name} {_ONE_ANCHOR}")
    return first, last


def check_different(source: Any, target: Any) -> None:
    """Raise ValueError where two anchors are one by their names, or one model; nothing is loaded."""
    named = all(isinstance(one, str | Path) for one in (source, target))
    if source is target or (named and Path(source) == Path(target)):
        raise ValueError(f"got the anchor {source if named else type(source).__name__} {_ONE_ANCHOR}")
