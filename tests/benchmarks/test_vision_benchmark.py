"""The benchmark of image classifiers runs, and its children measure what they are asked for."""

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_vision import tiny_pair

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "vision.py"
ROWS = (
    "one run per block",
    "each run stopping",
    "supernet step",
    "anchors + stitches + one path",
    "costs of all",
    "from_pretrained, s ",
    "from_pretrained, peak KiB",
    "stitched forward",
    "scoring pass",
    "CKA and DM",
)


@pytest.mark.slow
def test_every_figure_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["vision.py", "--smoke"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert [sum(what in line for line in table) for what in ROWS] == [1] * len(ROWS) and len(table) == len(ROWS)
    for line in table:
        ours, bound, ratio = (float(cell) for cell in line.split("|")[2:5])
        assert math.isfinite(ratio) and ours >= 0 and bound >= 0


@pytest.mark.slow
def test_a_child_reports_its_own_memory(tmp_path: Path) -> None:
    source, target = tiny_pair("swin")
    source.save_pretrained(tmp_path / "stitched")  # any model will do
    command = [sys.executable, str(SCRIPT), "--smoke", "--child", "load_stitched", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    found = json.loads(done.stdout)
    assert found["seconds"] > 0
    assert 4 * source.num_parameters() / 1024 < found["peak"] < 1e6
