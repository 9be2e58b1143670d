"""Two CPU processes search the paths that one does, and write the rows that one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from klas_hf.scores.path_scores import PathScores

HERE = Path(__file__).parent


def run(folder: Path, processes: int) -> None:
    folder.mkdir()
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2"] if processes == 2 else []
    launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"] if processes == 2 else []
    settings = {
        "HF_HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, *launch, str(HERE / "search_run.py"), str(folder)],
        capture_output=True, text=True, env=os.environ | settings, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    for processes in (1, 2):
        run(tmp_path / str(processes), processes)
    one = PathScores.load(tmp_path / "1" / "process0of1.safetensors")
    for number in (0, 1):
        other = PathScores.load(tmp_path / "2" / f"process{number}of2.safetensors")
        assert other.paths == one.paths and len(one) > 5
        np.testing.assert_allclose(other.divergence, one.divergence, rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(other.error, one.error, rtol=1e-4, atol=1e-8)
    timed = [PathScores.load(tmp_path / "2" / f"timed{number}of2.safetensors") for number in (0, 1)]
    assert timed[0].paths == timed[1].paths and timed[0].costs == timed[1].costs  # the main process's clock
    rows = [(tmp_path / str(n) / "rows.jsonl").read_text().splitlines()[1:] for n in (1, 2)]
    assert [json.loads(row)["path"] for row in rows[0]] == [json.loads(row)["path"] for row in rows[1]]
