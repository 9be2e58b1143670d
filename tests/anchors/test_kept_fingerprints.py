"""A fingerprint is taken once for an anchor's files, in whatever process, and never for others than they are."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from tiny_vision import tiny_classifier
from transformers import PreTrainedModel

from klas_hf.anchors import weights
from klas_hf.anchors.language import load_anchor
from klas_hf.anchors.vision import load_vision_anchor
from klas_hf.anchors.weights import fingerprint


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where they are kept, of files that count as settled at once."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(weights, "SETTLED", -60.0)
    return tmp_path / "home" / "klas_hf" / "fingerprints"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many values of a tensor went into a digest, each time."""
    sizes: list[int] = []
    update = weights._update
    monkeypatch.setattr(
        weights, "_update", lambda digest, tensor: (sizes.append(tensor.numel()), update(digest, tensor))
    )
    return sizes


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("images", [False, True])
def test_files_are_read_whole_for_one_model_only(images: bool, cache: Path, read: list[int], tmp_path: Path) -> None:
    model = tiny_classifier("vit") if images else tiny_model(large=True)
    folder, load = saved(model, tmp_path / "model"), load_vision_anchor if images else load_anchor
    known = load(folder).fingerprint
    whole = max(tensor.numel() for tensor in model.state_dict().values())
    assert max(read) == whole > 2 * weights.SAMPLED
    for options in ({}, {"attn_implementation": "eager"}, {"device_map": {"": "cpu"}}):
        read.clear()
        assert load(folder, **options).fingerprint == known
        assert read and max(read) < 2 * weights.SAMPLED
    assert fingerprint(model) == known and len(list(cache.iterdir())) == 1
    half = load(folder, dtype=torch.float16)  # which has other values in bfloat16
    assert half.fingerprint == fingerprint(model.half()) and len(list(cache.iterdir())) == 2


def other(folder: Path) -> bytes:
    """The same checkpoint with another value at the end of one tensor, which is not among those that are sampled."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.4.mlp.down_proj.weight"][-1, -1] += 1
    save_file(tensors, folder / "other", {"format": "pt"})
    content = (folder / "other").read_bytes()
    (folder / "other").unlink()
    return content


def written_over(folder: Path) -> None:
    """In place, with its times set back."""
    file = folder / "model.safetensors"
    about, content = file.stat(), other(folder)
    assert len(content) == about.st_size
    with file.open("r+b") as opened:
        opened.write(content)
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert file.stat().st_mtime_ns == about.st_mtime_ns


def replaced(folder: Path) -> None:
    """By another file with the times of the first."""
    file, new = folder / "model.safetensors", folder / "new"
    new.write_bytes(other(folder))
    shutil.copystat(file, new)
    new.replace(file)


def configured(folder: Path) -> None:
    """To have a head of its own, by the configuration alone."""
    config, file = folder / "config.json", folder / "model.safetensors"
    config.write_text(config.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file, {"format": "pt"})


@pytest.mark.parametrize("change", [written_over, replaced, configured])
def test_other_files_have_another(change: Callable[[Path], None], cache: Path, tmp_path: Path) -> None:
    folder = saved(tiny_model(large=True), tmp_path / "model")
    before = load_anchor(folder).fingerprint
    change(folder)
    after = load_anchor(folder)
    assert after.fingerprint != before
    assert load_anchor(folder).fingerprint == after.fingerprint and len(list(cache.iterdir())) == 2
    shutil.rmtree(cache)
    assert load_anchor(folder).fingerprint == after.fingerprint


def test_a_model_that_was_changed_leaves_nothing_behind(cache: Path, tmp_path: Path) -> None:
    folder = saved(tiny_model(large=True), tmp_path / "model")
    changed = load_anchor(folder)
    with torch.no_grad():
        changed.model.lm_head.weight[0, 0] += 1
    assert changed.fingerprint != fingerprint(tiny_model(large=True)) and not cache.exists()
    assert load_anchor(folder).fingerprint == fingerprint(tiny_model(large=True))
    again = load_anchor(folder)
    with torch.no_grad():
        again.model.lm_head.weight[0, 0] += 1
    assert again.fingerprint == changed.fingerprint


def test_files_that_were_only_just_written_are_not_known_by_their_times(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(weights, "SETTLED", 60.0)
    folder = saved(tiny_model(large=True), tmp_path / "model")
    assert load_anchor(folder).fingerprint == fingerprint(tiny_model(large=True)) and not cache.exists()


@pytest.mark.parametrize("content", [b"", b"\xff", b"0" * 63, b"g" * 64])
def test_a_damaged_cache_and_one_that_is_no_folder_are_passed_by(content: bytes, cache: Path, tmp_path: Path) -> None:
    folder = saved(tiny_model(large=True), tmp_path / "model")
    known = load_anchor(folder).fingerprint
    (kept,) = cache.iterdir()
    kept.write_bytes(content)
    assert load_anchor(folder).fingerprint == known and kept.read_text() == known
    shutil.rmtree(cache)
    cache.write_bytes(content)
    assert load_anchor(folder).fingerprint == known
