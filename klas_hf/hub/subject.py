"""What a model card says of one thing, and what its config.json calls it by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from klas_hf.hub import usage
from klas_hf.hub.pages import AnchorPage
from klas_hf.scores.values import StitchScores
from klas_hf.tables import markdown_table


@dataclass(frozen=True)
class Subject:
    """What a model card says of one kind of thing.

    Attributes:
        kind: its name in the card's heading.
        summary: what it is, in Markdown.
        anchors: the pages of its anchors, in their order.
        code: repo id, and whether the repo has a tokenizer or image processor → the lines that use it.
        facts: name → value, the table of what is known of it.
        origin: how it came to be, in Markdown.
        limits: what to know before it is trusted, one sentence each.
        tags, library_name, pipeline_tag: as the Hub knows them.
        task: what its measurements are of; None for what is not measured.
        relation: how it is made from its anchors ("merge", "adapter"); None: it holds nothing of them.
        paths: those whose measured rows are its own.
        trained: whether it was, after it was put together.
        processor: what a repo of it needs beside it, "tokenizer", "image processor" or None.
        identity: the entries of config.json that make it this one and no other.
        carries_code: whether it loads without klas_hf, from the code beside its weights.
    """

    kind: str
    summary: str
    anchors: tuple[AnchorPage, ...]
    code: usage.Code
    facts: Mapping[str, str]
    origin: str
    limits: Sequence[str]
    tags: tuple[str, ...] = ("stitched", "klas")
    library_name: str | None = "transformers"
    pipeline_tag: str | None = None
    task: str | None = None
    relation: str | None = "merge"
    paths: tuple[str, ...] = ()
    trained: bool = False
    processor: str | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    carries_code: bool = False


def public_config(config: Any, anchors: Sequence[AnchorPage]) -> Any:
    """A config.json, or any part of one, with the anchors called as on the card: nobody else has the user's folders."""
    if isinstance(config, Mapping):
        return {key: public_config(value, anchors) for key, value in config.items()}
    if isinstance(config, list):
        return [public_config(value, anchors) for value in config]
    return next((anchor.title for anchor in anchors if isinstance(config, str) and config == anchor.name), config)


def scores_config(scores: StitchScores, anchors: Sequence[AnchorPage]) -> dict[str, Any]:
    """The config.json of a repo of scores, which makes the Hub count its downloads."""
    return {"model_type": "stitch_scores", "score": scores.score} | {
        f"{side}_name": anchor.title for side, anchor in zip(("source", "target"), anchors, strict=True)
    }


_IDENTITY = (
    "model_type", "architectures", "path", "source_name", "target_name", "anchor_names", "paths", "anchor_name",
    "anchor_fingerprint", "kind",
)  # fmt: skip


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config.json by which two repos hold the same thing, trained further or again."""
    return {key: config[key] for key in _IDENTITY if key in config}


def link(anchor: AnchorPage) -> str:
    """An anchor in Markdown, linked where it is on the Hub."""
    if anchor.base_model:
        return f"[{anchor.base_model}](https://huggingface.co/{anchor.base_model})"
    return anchor.title


def with_revision(anchor: AnchorPage) -> str:
    """The same, with the revision that was read."""
    return link(anchor) + (f" at `{anchor.revision}`" if anchor.revision else "")


def facts_table(facts: Mapping[str, str]) -> str:
    """Facts as a Markdown table."""
    return markdown_table([["what", "value"], *([name, value] for name, value in facts.items())])
