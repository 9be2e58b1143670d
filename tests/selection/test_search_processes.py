"""Two CPU processes search the paths that one does, score and measure as one does, under FSDP2's configuration too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from klas_hf.scores.path_scores import PathScores

HERE = Path(__file__).parent


def run(folder: Path, processes: int, configured: str = "replicas") -> Path:
    folder.mkdir()
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2"] if processes == 2 else []
    launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"] if processes == 2 else []
    settings = {
        "HF_HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, *launch, str(HERE / "search_run.py"), str(folder), configured],
        capture_output=True, text=True, env=os.environ | settings, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("one") / "process", 1)


@pytest.mark.slow
@pytest.mark.parametrize("configured", ["replicas", "fsdp2"])
def test_two_processes_find_what_one_finds(configured: str, alone: Path, tmp_path: Path) -> None:
    both = run(tmp_path / "both", 2, configured)
    one, found = PathScores.load(alone / "process0of1.safetensors"), json.loads((alone / "process0.json").read_text())
    for number in (0, 1):
        other = PathScores.load(both / f"process{number}of2.safetensors")
        assert other.paths == one.paths and len(one) > 5
        np.testing.assert_allclose(other.divergence, one.divergence, rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(other.error, one.error, rtol=1e-4, atol=1e-8)
        there = json.loads((both / f"process{number}.json").read_text())
        np.testing.assert_allclose(there["scores"], found["scores"], rtol=1e-5, atol=1e-8)
        assert there["loss"] == pytest.approx(found["loss"], rel=1e-6)
        sharded = "got LlamaForCausalLM with weights that several processes share out; expected whole ones"
        assert [text.startswith(sharded) for text in there["refused"]] == [True] * 2 * (configured == "fsdp2")
    timed = [PathScores.load(both / f"timed{number}of2.safetensors") for number in (0, 1)]
    assert timed[0].paths == timed[1].paths and timed[0].costs == timed[1].costs  # the main process's clock
    rows = [(folder / "rows.jsonl").read_text().splitlines()[1:] for folder in (alone, both)]
    assert [json.loads(row)["path"] for row in rows[0]] == [json.loads(row)["path"] for row in rows[1]]
