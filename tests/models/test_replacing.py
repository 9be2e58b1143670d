"""A checkpoint in the place of another, where the process dies or the list of its files is someone else's."""

import os
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from klas_hf import StitchedForCausalLM, StitchedModel

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer is random")


def stitched(seed: int = 1) -> StitchedModel:
    return StitchedModel.from_anchors(tiny_model(seed=seed), tiny_model(large=True, seed=seed + 1), (2, 3))


@pytest.mark.parametrize("moved", [0, 1, 2, 6, 13, 100])
def test_a_process_that_dies_while_it_replaces_a_checkpoint_leaves_the_old_or_the_new(
    moved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After so many of the steps that put files in place, 100 being all; the old one has other shards, and a note."""
    old, new = (stitched(seed) for seed in (1, 5))
    old.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "note.txt").write_text("kept")
    replace, calls = os.replace, iter(range(100))

    def until(one: Path, other: Path) -> None:
        if next(calls) == moved:
            os._exit(9)
        replace(one, other)

    child = os.fork()
    if not child:
        monkeypatch.setattr(os, "replace", until)
        new.save_pretrained(tmp_path, max_shard_size="30KB")
        os._exit(0)
    died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert died == (9 if moved < 100 else 0)
    assert len(list(tmp_path.glob(".moving-*"))) == (0 < moved < 100)
    expected = (old if moved < 2 else new).state_dict()
    for loader in (StitchedModel, StitchedForCausalLM, AutoModelForCausalLM):
        loaded = loader.from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in expected.items())
    assert (tmp_path / "note.txt").read_text() == "kept"
    old.save_pretrained(tmp_path)
    again = StitchedModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in old.state_dict().items())
    assert not list(tmp_path.glob("model-*.safetensors"))


@pytest.mark.parametrize(
    "told",
    [
        '{"written": ["../note.txt"], "variant": null}',
        '{"written": [".."], "variant": null}',
        '{"written": ["/etc/hosts"], "variant": null}',
        '{"written": ["model.safetensors"], "variant": 3}',
        '{"written": 3}',
        "[]",
        "{",
    ],
)
def test_a_list_of_files_that_leads_elsewhere_is_refused(told: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    stitched().save_pretrained(folder)
    (folder / "note.txt").write_text("kept")
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    (folder / ".moving-x").mkdir()
    (folder / ".moving-x" / "names.moving.json").write_text(told)
    with pytest.raises(ValueError, match="tells no checkpoint's files .*expected names of files beside it"):
        StitchedModel.from_pretrained(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before
    assert not (tmp_path / "note.txt").exists()
