"""Each long step, killed by SIGKILL at 20 random moments and begun again, gives what it gives undisturbed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("step", ["probes", "scores", "search", "training", "evaluation", "saving"])
def test_killed_at_random_moments(step: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "killed_run.py"), step, str(tmp_path)], capture_output=True,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{step}: 20 kills" in done.stdout
