"""Two CPU processes give what one gives with twice the batch: fits, scores, training, losses and generations."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent


def launch(folder: Path, processes: int, trainable: str, batch_size: int, accumulation: int) -> dict:
    """Run distributed_run.py under torchrun, as `accelerate launch` does for several CPU processes."""
    folder.mkdir()
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    script = str(HERE / "distributed_run.py")
    command = ["torch.distributed.run", "--nproc_per_node", str(processes), *rendezvous, script]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-m", *command, str(folder), trainable, str(batch_size), str(accumulation)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((folder / "found.json").read_text())
    return found | {"state": load_file(folder / "state.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize(("trainable", "accumulation"), [("full", 1), ("lora", 2)])
def test_two_processes_equal_one_with_twice_the_batch(tmp_path: Path, trainable: str, accumulation: int) -> None:
    one = launch(tmp_path / "one", 1, trainable, 4, accumulation)
    two = launch(tmp_path / "two", 2, trainable, 2, accumulation)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(one["losses"]) == 6
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-6)
    np.testing.assert_allclose(two["validation"], one["validation"], rtol=1e-9)
    assert len(one["examples"]) == 9 and two["kept"] == pytest.approx(one["kept"], rel=1e-9)
    np.testing.assert_allclose(two["examples"], one["examples"], rtol=1e-9)
    for name, tensor in one["state"].items():
        torch.testing.assert_close(two["state"][name], tensor, atol=1e-10, rtol=1e-9, msg=name)
    assert two["tokens"] == one["tokens"]
    assert two["answers"] == one["answers"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert two["r2"] == pytest.approx(one["r2"], rel=1e-9)
    np.testing.assert_allclose(two["cross"], one["cross"], rtol=1e-4)
    np.testing.assert_allclose(two["gamma_error"], one["gamma_error"], rtol=1e-3)
