"""`klas-hf push` and `doctor` against a Hub on the loopback, as programs of their own."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from klas_hf.cli import main

TESTS = Path(__file__).parents[1]
Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(TESTS / "hub")
    from hub_server import HubServer

    with HubServer() as server:
        yield server


@pytest.fixture
def run(hub: Any, tmp_path: Path) -> Run:
    """`klas-hf`, online, with a cache of its own."""

    def run(*words: str) -> subprocess.CompletedProcess:
        settings = {
            "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_right", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "klas_hf.cli", *words]
        return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=120)

    return run


def test_a_model_is_pushed_with_its_tokenizer_and_card(language: Path, tmp_path: Path, hub: Any, run: Run) -> None:
    model = tmp_path / "model"
    words = ["--stitch", "1", "2", "--data", str(language / "text"), "--output", str(model), "--length", "12"]
    assert main(["stitch", str(language / "small"), str(language / "large"), *words]) == 0
    assert main(["card", str(model), "me/between", "--licence", "mit"]) == 0
    (model / "README.md").write_text((model / "README.md").read_text() + "\nMy own words.\n")
    done = run("push", str(model), "me/between", "--licence", "mit", "--private")
    assert done.returncode == 0, done.stderr
    repo = hub.repos["me/between"]
    files = repo.files()
    assert repo.private and {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files.keys()
    assert files["model.safetensors"] == (model / "model.safetensors").read_bytes()
    assert files["README.md"].decode().endswith("My own words.\n")
    assert ModelCard(files["README.md"].decode()).data.license == "mit"
    assert repo.head().oid in done.stdout


def test_the_doctor_downloads_no_weights(language: Path, tmp_path: Path, hub: Any, run: Run) -> None:
    for name in ("small", "large"):
        hub.make(f"me/{name}", {path.name: path.read_bytes() for path in (language / name).iterdir()})
    found = run("doctor", "me/small", "me/large", "--stitch", "1", "2")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "0 problems" in found.stdout and "1 of 1 files (model.safetensors)" in found.stdout
    kept = {path.name for path in (tmp_path / "home").rglob("*") if path.is_file()}
    assert "config.json" in kept and not [name for name in kept if name.endswith(".safetensors")]
