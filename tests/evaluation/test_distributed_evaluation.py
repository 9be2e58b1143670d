"""Two CPU processes measure what one does, and `evaluate` loads our metric from its file, offline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
from evaluation_run import ANSWERS, ASKED, measured

from klas_hf.evaluation import truthfulqa_rouge

HERE = Path(__file__).parent
METRIC = str(truthfulqa_rouge.__file__)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(HERE / "evaluation_run.py")]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path]),
    }
    run = [sys.executable, "-m", *command, METRIC, str(tmp_path)]
    done = subprocess.run(run, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    (rouge, first), (nothing, second) = (json.loads((tmp_path / f"found-{n}.json").read_text()) for n in (0, 1))
    alone = evaluate.load(METRIC, cache_dir=str(tmp_path / "alone")).compute(predictions=ANSWERS, references=ASKED)
    assert nothing is None and rouge == alone
    assert 0 < rouge["best_rouge2"] < rouge["best_rouge1"] < 1
    assert first == second
    for got, expected in zip(first, measured(), strict=True):
        assert got == pytest.approx(expected, rel=1e-6)
