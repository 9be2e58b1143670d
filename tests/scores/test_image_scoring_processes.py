"""Two CPU processes train the probes, give the scores and write the rows that one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from image_scoring_run import found

from klas_hf import RowFile, StitchScores

HERE = Path(__file__).parent


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command = ["torch.distributed.run", "--nproc_per_node", "2", *rendezvous, str(HERE / "image_scoring_run.py")]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-m", *command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((tmp_path / "processes.json").read_text()) == 2
    own = RowFile(tmp_path / "own.jsonl", {})
    scores, reports = found(own)
    told = [(row.rule, row.seed, row.model) for row in RowFile(tmp_path / "rows.jsonl", {})]
    assert told == [(row.rule, row.seed, row.model) for row in own]
    assert {"klas", "dm", "class_cka", "klas_shuffled"} <= set(scores.available)
    for process in range(2):
        other = StitchScores.load(tmp_path / f"scores-{process}.safetensors")
        assert (other.sequences, other.tokens) == (scores.sequences, scores.tokens) == (24, 24)
        for name in ("cross", "capacity", "cross_error", "capacity_error", "gamma_error"):
            np.testing.assert_allclose(getattr(other, name), getattr(scores, name), rtol=1e-3, err_msg=name)
        assert other.statistics.keys() == scores.statistics.keys()
        for name, statistic in scores.statistics.items():
            np.testing.assert_allclose(other.statistics[name], statistic, rtol=2e-3, err_msg=name)
        there = json.loads((tmp_path / f"reports-{process}.json").read_text())
        assert there["macs"] == [list(macs) for macs in reports["macs"]]
        assert there["images"] == reports["images"] == [24] * 4
        for name in ("divergences", "r2", "metrics"):
            np.testing.assert_allclose(there[name], reports[name], rtol=1e-6, err_msg=name)
        for got, expected in zip(there["reports"], reports["reports"], strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-3)
