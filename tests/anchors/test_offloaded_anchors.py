"""Anchors that a `device_map` spreads over places, as where they do not fit into one, give what they give in one.

The disk stands for a second device: tensors come to where the module runs for its forward, and go again.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_vision
import torch
from tiny_models import tiny_model, token_ids

from klas_hf import FunctionalScoring, SearchConfig, score_stitches, search_paths
from klas_hf.anchors.loading import load_anchors

PARTS = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
PLACES = {
    "blocks": dict.fromkeys(PARTS, "cpu") | {"model.layers": "disk"},
    "all but the blocks": dict.fromkeys(PARTS, "disk") | {"model.layers": "cpu"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A small and a large Llama, of which the large one's head is its embedding."""
    found = []
    for large in (False, True):
        found.append(tmp_path_factory.mktemp("anchor"))
        tiny_model(large=large, seed=1 + large).save_pretrained(found[-1])
    return found


def options(name: str, tmp_path: Path) -> dict[str, Any]:
    return {"device_map": PLACES[name], "offload_folder": tmp_path}


DATA = [{"input_ids": token_ids(4, 24, seed=seed)} for seed in range(2)]


@pytest.mark.filterwarnings("ignore:.*rows")
@pytest.mark.parametrize("name", PLACES)
def test_scores_are_those_of_anchors_in_memory(name: str, folders: list[Path], tmp_path: Path) -> None:
    (source, target), expected = load_anchors(folders, **options(name, tmp_path)), score_stitches(*folders, DATA)
    away = {tensor.is_meta for tensor in target.model.parameters()}
    assert away == {True, False}
    found = score_stitches(source, target, DATA)
    np.testing.assert_array_equal(found.values, expected.values)
    for side in ("source", "target"):
        assert found.provenance[side]["fingerprint"] == expected.provenance[side]["fingerprint"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*rows")
@pytest.mark.parametrize("name", PLACES)
def test_a_search_finds_what_it_finds_in_memory(name: str, folders: list[Path], tmp_path: Path) -> None:
    config = SearchConfig(joints=2, scoring=FunctionalScoring(temperature=1.0))
    expected = search_paths(folders, DATA, config, tokens=24)
    found = search_paths(folders, DATA, config, tokens=24, **options(name, tmp_path))
    assert found.paths == expected.paths and len(found.paths) > 5
    np.testing.assert_array_equal(found.divergence, expected.divergence)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*rows")
def test_image_classifiers_may_be_spread_too(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("small", "large")]
    for large, folder in enumerate(folders):
        tiny_vision.tiny_classifier("vit", large=bool(large), seed=large).float().save_pretrained(folder)
    data = [{"pixel_values": tiny_vision.images("vit", 6, seed=seed, dtype=torch.float32)} for seed in range(2)]
    places = {"vit.embeddings": "cpu", "vit.layers": "disk", "vit.layernorm": "cpu", "classifier": "disk"}
    found = score_stitches(*folders, data, device_map=places, offload_folder=tmp_path / "offloaded")
    np.testing.assert_array_equal(found.values, score_stitches(*folders, data).values)
