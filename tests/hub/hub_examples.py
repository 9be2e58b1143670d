"""Anchors in folders with cards, tokenizers and licence files, and what is made from them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tiny_models import randomise_joints, save_with_tokenizer, tiny_model, token_ids
from tiny_vision import images, possible, tiny_classifier
from transformers import PreTrainedModel, ViTImageProcessor

from klas_hf import ResultRow, StitchedForCausalLM, StitchedModel, StitchScores
from klas_hf.stitch_costs import StitchCosts

STITCH = (2, 3)
CARD = "---\nlicense: {licence}\n---\n# An anchor\n"


def page(folder: Path, licence: str | None, files: Mapping[str, str] | None = None) -> None:
    """Give an anchor's folder a card with a licence, and further files."""
    if licence is not None:
        (folder / "README.md").write_text(CARD.format(licence=licence))
    for name, content in (files or {}).items():
        (folder / name).write_text(content)


def text_anchors(root: Path, licences: tuple[str | None, str | None] = ("mit", "mit")) -> tuple[Path, Path]:
    """A small and a large decoder in folders, with tokenizers and cards."""
    folders = root / "small-lm", root / "large-lm"
    for large, (folder, licence) in enumerate(zip(folders, licences, strict=True)):
        words = ["<pad>", "<s>", "</s>", "Once", "upon", "a", "time"]
        model = tiny_model(large=bool(large), seed=large + 1)
        model.generation_config.update(do_sample=False, max_new_tokens=7, repetition_penalty=1.5)
        save_with_tokenizer(model, folder, words)
        page(folder, licence)
    return folders


def stitched_lm(anchors: tuple[Any, Any], **options: Any) -> StitchedForCausalLM:
    model = StitchedModel.from_anchors(*anchors, STITCH, **{"calibration": [token_ids(8, 16)], **options})
    randomise_joints(model)
    return model


def image_anchors(root: Path, licence: str | None = "apache-2.0") -> tuple[Path, Path]:
    """A small and a large ViT in folders, with image processors and cards."""
    folders = root / "small-vit", root / "large-vit"
    for large, folder in enumerate(folders):
        tiny_classifier("vit", large=bool(large), seed=large + 1).float().save_pretrained(folder)
        size = {"height": 32, "width": 32}
        ViTImageProcessor(size=size, image_mean=[0.4] * 3, image_std=[0.3] * 3).save_pretrained(folder)
        page(folder, licence)
    return folders


def image_stitches(anchors: tuple[PreTrainedModel, PreTrainedModel]) -> list[tuple[int, int]]:
    return possible(*anchors, images("vit", 1, dtype=anchors[0].dtype))


def rows_of(model_stitch: tuple[int, int] = STITCH, metric: str = "loss", other: float = 3.0) -> list[ResultRow]:
    """Rows of both anchors, this stitch under two rules and two seeds, and another stitch."""
    return [
        ResultRow("source", None, 0, 1_000_000, 100, {metric: 4.0, "extra": 1.0}),
        ResultRow("klas", model_stitch, 0, 2_000_000, 200, {metric: 2.5, "extra": 1.0}),
        ResultRow("klas", model_stitch, 1, 2_000_000, 200, {metric: 3.5, "extra": 2.0}),
        ResultRow("esta", model_stitch, 0, 2_000_000, 200, {metric: 2.5, "extra": 1.0}),
        ResultRow("esta", (1, 1), 0, 3_000_000, 300, {metric: other, "extra": 1.0}),
        ResultRow("target", None, 0, 4_000_000, 400, {metric: 1.0, "extra": 0.5}),
    ]


def some_scores(root: Path, *, probed: bool = True) -> StitchScores:
    """Scores of two anchors in folders; without probes only the functional score is there."""
    generator = np.random.default_rng(0)
    m, n = 3, 5
    cross = generator.gamma(2.0, size=(m, n)) if probed else np.full((m, n), np.nan)
    return StitchScores(
        score="klas" if probed else "functional",
        cross=cross,
        capacity=generator.gamma(2.0, size=n - 1) if probed else np.full(n - 1, np.nan),
        cross_error=generator.random((m, n)),
        capacity_error=generator.random(n - 1),
        gamma_error=generator.random((m, n - 1)),
        sequences=12,
        tokens=345,
        costs=StitchCosts(
            tokens=128, source_blocks=np.arange(1, m + 1), target_blocks=np.arange(10, 10 + n), stitch=3,
            source_total=9, target_total=70, ends=2, source_parameters=np.arange(m), target_parameters=np.arange(n),
            stitch_parameters=4, ends_parameters=5,
        ),
        provenance={"source": {"name": str(root / "small-lm"), "revision": None}, "target": {"name": "big/model"}},
        statistics={} if probed else {"functional": generator.gamma(2.0, size=(m, n))},
    )  # fmt: skip
