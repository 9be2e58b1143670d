"""The command line as a whole: help that fits a screen, exit codes, errors of one message."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from klas_hf.cli import _COMMANDS, main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("command", [None, *_COMMANDS])
def test_help_fits_a_screen(
    command: str | None, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*([command] if command else []), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 10 < len(lines) <= 40 and max(map(len, lines)) <= 80
    assert any(line.startswith("usage: klas-hf") for line in lines)


def test_the_settings_of_training_are_named_and_explained(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from klas_hf import TrainingConfig
    from klas_hf.options import names as option_names

    names = option_names(TrainingConfig)
    monkeypatch.setenv("COLUMNS", "80")
    main(["train", "--help"])
    assert names <= set(capsys.readouterr().out.split())
    assert main(["train", "--settings"]) == 0
    explained = " ".join(capsys.readouterr().out.split())
    assert all(f"--{name}" in explained for name in names) and "(default: 0.0001)" in explained


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "required: COMMAND"),
        (["sew"], "invalid choice: 'sew'"),
        (["doctor", "one"], "required: target"),
        (["doctor", "one", "two", "--stitch", "1"], "expected 2 arguments"),
        (["doctor", "one", "two", "--jso"], "unrecognized arguments: --jso"),
        (
            ["stitch", "a", "b", "--data", "d", "--output", "o", "--stitch", "1", "x"],
            "Got value: x",
        ),
        (["select", "nothing.safetensors"], "nothing.safetensors, which is no file"),
        (["plot", "nothing.jsonl", "--output", "x"], "No such file"),
        (["plot", "nothing.jsonl", "--output", "/proc/nowhere/x"], "nothing can be written in /proc"),
        (["score", "one", "one", "--data", "d", "--output", "o"], "as the source and as the target"),
        (
            ["stitch", "a", "b", "--data", "d", "--output", "o", "--stitch", "1", "2", "--length", "1"],
            "got --length 1;",
        ),
        (["score", "a", "b", "--data", "d", "--output", "o", "--score", "best"], "got --score 'best'"),
    ],
)
def test_bad_usage_ends_with_two(words: list[str], expected: str, capsys: pytest.CaptureFixture) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert expected in captured.err and "Traceback" not in captured.err and captured.out == ""


def test_a_traceback_is_shown_when_asked_for(capsys: pytest.CaptureFixture) -> None:
    assert main(["select", "nothing.safetensors", "--traceback"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and error.endswith("expected what `klas-hf score` wrote\n")


def _run(words: list[str], folder: Path, largest_file: int) -> subprocess.CompletedProcess:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": ""}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # cut short by the limit, it would break later imports
    command = [sys.executable, "-m", "klas_hf.cli", *words]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, preexec_fn=limit, timeout=120
    )


def test_a_full_disk_is_a_failure(language: Path, tmp_path: Path) -> None:
    """No file may grow over 1 kB: the scores are not written, and what was there stays."""
    kept = tmp_path / "scores.safetensors"
    kept.write_text("old")
    words = ["score", "small", "large", "--data", "text", "--length", "12", "--samples", "20", "--overwrite"]
    done = _run([*words, "--output", str(kept)], language, largest_file=1024)
    assert done.returncode == 1
    assert "klas-hf: error:" in done.stderr and "Traceback" not in done.stderr and "too large" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["scores.safetensors"] and kept.read_text() == "old"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        *((([command] if command else []) + ["--help"], 0) for command in [None, *_COMMANDS]),
        (["select", "nothing.safetensors"], 2),
        (["score", "one", "one", "--data", "d", "--output", "o"], 2),
    ],
)
def test_what_touches_no_model_loads_no_library_of_models(words: list[str], code: int) -> None:
    """They take seconds to load; without them a command answers at once."""
    check = (
        "import sys, klas_hf_command\n"
        "try: klas_hf_command.main()\n"
        "except SystemExit as end: code = end.code\n"
        f"heavy = {{'torch', 'transformers', 'accelerate', 'datasets', 'scipy', 'matplotlib'}} & set(sys.modules)\n"
        f"assert (code, heavy) == ({code}, set()), (code, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", check, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_models_are_registered_where_a_command_loads_one() -> None:
    check = (
        "import klas_hf_command\n"
        "from klas_hf.cli.data import load_model\n"
        "try: load_model('/nothing')\n"
        "except OSError: pass\n"
        "from transformers import AutoConfig\n"
        "print(type(AutoConfig.for_model('stitched')).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "StitchedConfig", done.stderr
