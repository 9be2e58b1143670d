"""One process at a time writes to a place; one that dies, however, lets go of it."""

import gc
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model, token_ids

from klas_hf import ResultRow, RowFile, TrainingConfig, files, train_stitches
from klas_hf.cli import main
from klas_hf.files import claim

# The module alone: klas_hf would bring torch, which takes seconds to import.
HOLDS = f"""import sys, time; sys.path.append({str(Path(files.__file__).parent)!r})
from files import claim; held = claim(sys.argv[1]); print('held', flush=True)
"""


@contextmanager
def held_elsewhere(path: Path) -> Iterator[subprocess.Popen]:
    """Another process has claimed the place meanwhile."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS + "time.sleep(600)", str(path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def row(seed: int) -> ResultRow:
    return ResultRow("klas", (1, 2), seed, 10, 10, {"loss": 1.0})


def test_a_second_process_is_refused_until_the_first_ends_or_is_killed(tmp_path: Path) -> None:
    place = tmp_path / "rows.jsonl"
    with held_elsewhere(place) as process:
        with pytest.raises(BlockingIOError, match="to which another run is writing; wait for its end, stop it, or"):
            claim(place)
        claim(tmp_path / "other.jsonl")
        process.send_signal(signal.SIGKILL)
        process.wait()
        held = claim(place)
        assert claim(place) is held
        second = subprocess.run([sys.executable, "-c", HOLDS, str(place)], capture_output=True, text=True)
        assert second.returncode and "another run is writing" in second.stderr
    del held
    gc.collect()
    assert not list(tmp_path.iterdir())  # nothing is left behind
    assert subprocess.run([sys.executable, "-c", HOLDS, str(place)], capture_output=True).stdout == b"held\n"


def test_rows_of_two_runs_do_not_mix(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "rows.jsonl", {})
    file.append(row(0))
    RowFile(file.path, {}).append(row(1))  # of the same process
    del file
    gc.collect()
    again = RowFile(tmp_path / "rows.jsonl", {})
    before = again.path.read_bytes()
    with held_elsewhere(again.path), pytest.raises(BlockingIOError, match="rows.jsonl, to which another run"):
        again.append(row(2))
    assert again.path.read_bytes() == before and len(again) == 2
    again.append(row(2))
    assert len(RowFile(again.path, {})) == 3


def test_two_trainings_do_not_share_checkpoints(tmp_path: Path) -> None:
    ids = token_ids(8, 10).tolist()
    examples = [{"input_ids": one, "labels": one} for one in ids]
    config = TrainingConfig(trainable="full", max_steps=1, per_device_batch_size=4, gradient_accumulation_steps=1)
    model = tiny_model()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with held_elsewhere(tmp_path / "out"), pytest.raises(BlockingIOError, match="out, to which another run"):
        train_stitches(model, examples, config, output_dir=tmp_path / "out")
    assert all(torch.equal(tensor, start[name]) for name, tensor in model.state_dict().items())
    train_stitches(model, examples, config, output_dir=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_make_is_refused_before_anything_is_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "between"
    options = ["--budget", "60%", "--data", "no_such.txt", "--output", str(output)]
    with held_elsewhere(output):
        assert main(["make", "no/such", "no/anchor", *options]) == 2
    assert "between, to which another run is writing" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} <= {".between.lock"}
