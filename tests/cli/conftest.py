"""Tiny anchors in folders, as commands take them: two Llamas with a tokenizer, two ViTs with an image processor."""

from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import VOCABULARY, save_with_tokenizer, tiny_model
from tiny_vision import LABELS, tiny_classifier
from transformers import ViTImageProcessorPil


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="session")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the anchors `small` and `large`, and `text`, a folder of text files."""
    folder = tmp_path_factory.mktemp("language")
    for name, large in (("small", False), ("large", True)):
        save_with_tokenizer(tiny_model("llama", large=large, seed=int(large)), folder / name)
    (folder / "text" / "deeper").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for place in ("a.txt", "deeper/b.txt"):
        ids = torch.randint(3, VOCABULARY, (400,), generator=generator).tolist()
        (folder / "text" / place).write_text(" ".join(f"word{number}" for number in ids))
    return folder


@pytest.fixture(scope="session")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the anchors `small` and `large`, and `images`, whose classes are told apart by their colour."""
    folder = tmp_path_factory.mktemp("vision")
    for name, large in (("small", False), ("large", True)):
        tiny_classifier("vit", large=large, seed=int(large)).float().save_pretrained(folder / name)
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / name)
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("validation", 6)):
        for number, label in LABELS.items():
            place = folder / "images" / split / label
            place.mkdir(parents=True)
            for image in range(count):
                pixels = generator.integers(0, 100, (32, 32, 3))
                pixels[..., number % 3] += 30 * number
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{image}.png")
    return folder
