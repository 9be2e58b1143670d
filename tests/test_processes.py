"""Progress: bars and lines where they are wanted, and nowhere else."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from tiny_models import save_with_tokenizer, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from klas_hf import StitchedModel, processes
from klas_hf.anchors import load_anchor
from klas_hf.cli.data import load_model
from klas_hf.cli.output import save_model
from klas_hf.hub.delta import save_delta
from klas_hf.processes import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], str]:
    """What 60 steps of a second each write to a terminal, or to a file."""

    def show(terminal: bool) -> str:
        stream, clock = Terminal() if terminal else io.StringIO(), iter(range(1000))
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.setattr(processes.time, "monotonic", lambda: next(clock))
        assert list(progress(range(60), "training", "step")) == list(range(60))
        return stream.getvalue()

    logging.enable_progress_bar()
    return show


def test_a_bar_on_a_terminal(shown: Callable[[bool], str]) -> None:
    assert "training:" in shown(True) and "\r" in shown(True)


def test_rare_plain_lines_elsewhere(shown: Callable[[bool], str]) -> None:
    assert shown(False).splitlines() == ["training: step 30 of 60, 30 s", "training: step 60 of 60, 60 s"]


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("switch", ["transformers", "huggingface_hub", "TQDM_DISABLE", "verbosity"])
def test_every_switch_works(
    shown: Callable[[bool], str], switch: str, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    verbosity = logging.get_verbosity()
    try:
        if switch == "transformers":
            logging.disable_progress_bar()
        elif switch == "huggingface_hub":
            disable_progress_bars()
        elif switch == "verbosity":
            logging.set_verbosity_error()
        else:
            monkeypatch.setenv("TQDM_DISABLE", "1")
        assert shown(terminal) == ""
    finally:
        enable_progress_bars()
        logging.enable_progress_bar()
        logging.set_verbosity(verbosity)


def test_what_is_done_already_counts(shown: Callable[[bool], str], capsys: pytest.CaptureFixture) -> None:
    clock = iter([0.0, 40.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes.time, "monotonic", lambda: next(clock))
        with processes.ProgressBar("training", "step", 9, done=7) as bar:
            bar.update("loss=1.5")
    assert capsys.readouterr().err == "training: step 8 of 9, 40 s, loss=1.5\n"


def loaded(folder: Path) -> None:
    """All ways in which models are loaded and saved here."""
    StitchedModel.from_anchors(folder / "small", folder / "large", (1, 1))
    load_anchor(folder / "small")
    StitchedModel.from_pretrained(folder / "delta")
    save_model(load_model(str(folder / "small")), AutoTokenizer.from_pretrained(folder / "small"), folder / "again")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    for name, large in (("small", False), ("large", True)):
        save_with_tokenizer(tiny_model(large=large, seed=int(large)), place / name)
    model = StitchedModel.from_anchors(place / "small", place / "large", (1, 1))
    save_delta(model, place / "delta")
    return place


@pytest.mark.filterwarnings("ignore:the stitching layer is random")
def test_transformers_bars_of_loading_are_for_terminals_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logging.enable_progress_bar()
    for stream, wanted in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr("sys.stderr", stream)
        loaded(folder)
        assert ("Loading weights" in stream.getvalue()) is ("Writing model" in stream.getvalue()) is wanted
        assert logging.is_progress_bar_enabled() and logging.set_tqdm_hook(None) is None
    AutoModelForCausalLM.from_pretrained(folder / "small")
    assert "Loading weights" in stream.getvalue()  # what others load is their affair


@pytest.mark.filterwarnings("ignore:the stitching layer is random")
def test_a_hook_of_the_users_own_is_left_in_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        seen.append(settings["desc"])
        return factory(*args, **settings | {"disable": True})

    monkeypatch.setattr("sys.stderr", io.StringIO())
    logging.set_tqdm_hook(hook)
    try:
        loaded(folder)
    finally:
        assert logging.set_tqdm_hook(None) is hook
    assert {"Loading weights", "Writing model shards"} <= set(seen)
