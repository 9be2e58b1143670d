"""`klas-hf make`, killed again and again at any moment, gives what it gives undisturbed, and leaves nothing behind."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from klas_hf import PathScores
from klas_hf.rows import read_rows

KILLS = 20


def _command(language: Path, output: Path) -> list[str]:
    anchors = [str(language / name) for name in ("small", "large")]
    options = ["--budget", "70%", "--data", str(language / "text"), "--output", str(output), "--length", "12"]
    return [sys.executable, "-m", "klas_hf.cli", "make", *anchors, *options, "--steps", "6", "--contenders", "2"]


def _run(command: list[str]) -> float:
    begun = time.monotonic()
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return time.monotonic() - begun


@pytest.mark.slow
def test_killed_at_random_moments(language: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    seconds = _run(_command(language, whole))
    draw, kills, ends = random.Random(0), 0, 0
    while kills < KILLS or not ends:
        broken = tmp_path / f"broken-{ends}"
        process = subprocess.Popen(
            _command(language, broken), env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            assert process.wait(draw.uniform(0.5, 1.1) * seconds if kills < KILLS else None) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        else:
            _same(whole, broken)
            ends += 1
    assert not [path for path in tmp_path.iterdir() if path.name.endswith((".part", ".removed"))]


def _same(whole: Path, broken: Path) -> None:
    assert {path.name for path in broken.iterdir()} == {path.name for path in whole.iterdir()}
    models = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (whole, broken)]
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())
    found = [PathScores.load(folder / "paths.safetensors") for folder in (whole, broken)]
    assert found[0].paths == found[1].paths and (found[0].divergence == found[1].divergence).all()
    rows = [read_rows(folder / "rows.jsonl") for folder in (whole, broken)]
    assert [(row.rule, row.path, row.metrics) for row in rows[0]] == [(r.rule, r.path, r.metrics) for r in rows[1]]
