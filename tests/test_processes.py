"""Progress: bars and lines where they are wanted, and nowhere else."""

import io
from collections.abc import Callable

import pytest
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from transformers.utils import logging

from klas_hf import processes
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
