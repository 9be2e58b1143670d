"""The tokenizer of the anchor that embeds goes wherever the model is saved (image processors: see vision saving)."""

import shutil
from pathlib import Path

import pytest
from saved_models import ascii_tokenizer
from tiny_models import tiny_model
from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline

from klas_hf import StitchedModel
from klas_hf.hub.delta import save_delta

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer is random")
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def anchors(tmp_path: Path) -> list[Path]:
    """Two folders whose tokenizers have one vocabulary, and chat templates that say whose they are."""
    folders = [tmp_path / "small", tmp_path / "large"]
    for number, folder in enumerate(folders):
        tokenizer = ascii_tokenizer()
        tokenizer.chat_template = folder.name
        tokenizer.save_pretrained(folder)
        tiny_model(large=bool(number), seed=number, vocab_size=len(tokenizer)).save_pretrained(folder)
    return folders


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} & TOKENIZER_FILES


def tokenizer_in(folder: Path) -> PreTrainedTokenizerFast:
    assert {file.name for file in folder.iterdir()} >= TOKENIZER_FILES
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("path", ["0[:2] 1[3:]", "1[:1] 0[2:]", "1[:2] 1[3:]"])
def test_the_tokenizer_of_the_anchor_that_embeds_is_saved(path: str, anchors: list[Path], tmp_path: Path) -> None:
    model = StitchedModel.from_path(anchors, path)
    model.save_pretrained(tmp_path / "stitched")
    tokenizer = tokenizer_in(tmp_path / "stitched")
    assert tokenizer.chat_template == ("small", "large")[int(path[0])]
    assert tokenizer.get_vocab() == ascii_tokenizer().get_vocab()
    say = pipeline("text-generation", str(tmp_path / "stitched"), device="cpu")
    said = say("the lazy dog", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert said.startswith("the lazy dog")


def test_of_from_anchors_and_of_a_delta_too(anchors: list[Path], tmp_path: Path) -> None:
    model = StitchedModel.from_anchors(*anchors, (2, 3))
    model.save_pretrained(tmp_path / "stitched")
    save_delta(model, tmp_path / "delta")
    for name in ("stitched", "delta"):
        assert tokenizer_in(tmp_path / name).chat_template == "small"


def test_a_tokenizer_that_the_folder_has_stays(anchors: list[Path], tmp_path: Path) -> None:
    mine = ascii_tokenizer()
    mine.add_tokens(["<new>"])
    model = StitchedModel.from_anchors(*anchors, (2, 3))
    mine.save_pretrained(tmp_path / "stitched")
    model.save_pretrained(tmp_path / "stitched")
    assert len(tokenizer_in(tmp_path / "stitched")) == len(mine) == len(ascii_tokenizer()) + 1


def test_anchors_in_memory_or_without_a_tokenizer_save_none(anchors: list[Path], tmp_path: Path) -> None:
    StitchedModel.from_anchors(tiny_model(), tiny_model(large=True), (2, 3)).save_pretrained(tmp_path / "memory")
    for folder in anchors:
        for name in TOKENIZER_FILES:
            (folder / name).unlink()
    StitchedModel.from_anchors(*anchors, (2, 3)).save_pretrained(tmp_path / "without")
    assert files(tmp_path / "memory") == files(tmp_path / "without") == set()


def test_an_anchor_that_is_gone_costs_a_warning_not_the_model(anchors: list[Path], tmp_path: Path) -> None:
    model = StitchedModel.from_anchors(*anchors, (2, 3))
    shutil.rmtree(anchors[0])
    with pytest.warns(UserWarning, match=r"without what makes its input_ids.* AutoTokenizer\.from_pretrained"):
        model.save_pretrained(tmp_path / "stitched")
    assert StitchedModel.from_pretrained(tmp_path / "stitched").config.path == "0[:2] 1[3:]"


def test_a_loaded_model_keeps_its_tokenizer(anchors: list[Path], tmp_path: Path) -> None:
    StitchedModel.from_anchors(*anchors, (2, 3)).save_pretrained(tmp_path / "first")
    loaded, info = StitchedModel.from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not info["missing_keys"]
    loaded.save_pretrained(tmp_path / "second")
    assert tokenizer_in(tmp_path / "second").chat_template == "small"
