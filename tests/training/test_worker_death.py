"""A process that dies ends the run within a minute, with its error or signal: the others do not wait for ever."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "how"), [(0, "killed"), (1, "killed"), (1, "failed")])
@pytest.mark.parametrize("work", ["scoring", "search", "training", "evaluation"])
def test_the_run_ends_with_a_message(work: str, rank: int, how: str) -> None:
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command = ["torch.distributed.run", "--nproc_per_node", "2", *rendezvous, str(HERE / "dying_run.py")]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), *sys.path]),
    }  # fmt: skip
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", *command, work, str(rank), how], env=environment, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode and time.monotonic() - begun < 60
    told = "SIGKILL" if how == "killed" else "ValueError: got a file that cannot be read"
    assert told in done.stderr and f"rank      : {rank}" in done.stderr.split("Root Cause")[1]
