"""The digits recipe as it is launched, by one process and by two: rows, report, pictures, and what is kept."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from launching import RECIPES, launch

PICTURES = ("curve.png", "curve.svg", "probes.png", "anchors.png")


def run(folder: Path, *options: str) -> None:
    places = ["--output_dir", str(folder / "out"), "--cache_dir", str(folder / "cache")]
    launch("digits.py", "--smoke", *places, *options)


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()[1:]]


@pytest.mark.slow
def test_smoke_run_compares_all_rules_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path)
    shown = capsys.readouterr().out
    out = tmp_path / "out" / "vit"
    found = rows(out / "rows.jsonl")
    rules = ["klas", "snnet", "min_kl", "cka", "random"]
    assert {row["rule"] for row in found} == {"anchor", *rules} and {row["seed"] for row in found} == {0}
    keys = Counter((row["rule"], row["path"], str(row["made_from"])) for row in found)
    assert set(keys.values()) == {1} and sum(key[0] == "anchor" for key in keys) == 3
    report = (out / "report.md").read_text()
    assert report.strip() in shown and "has the largest area" in report
    assert all(f"| {rule} |" in report for rule in rules)
    assert all((out / name).stat().st_size > 1000 for name in PICTURES) and list(out.glob("heatmap-*.png"))
    cached = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.safetensors")}
    assert len(cached) == 3
    run(tmp_path)
    assert rows(out / "rows.jsonl") == found and (out / "report.md").read_text() == report
    assert cached == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.safetensors")}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--families", "mlp", r"\['mlp'\].*swin.*vit"), ("--rules", "best", r"\['best'\].*klas")],
)
def test_bad_options_are_refused(option: str, value: str, message: str, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, option, value)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """With a rule that needs no scores: the figures need them, and both processes must make them."""
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    places = ["--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache")]
    options = ["--smoke", "--rules", "snnet", *places]
    command = ["torch.distributed.run", "--nproc_per_node", "2", *rendezvous, str(RECIPES / "digits.py"), *options]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", *command], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-4000:]
    out = tmp_path / "out" / "vit"
    found = rows(out / "rows.jsonl")
    keys = Counter((row["rule"], row["path"], str(row["made_from"])) for row in found)
    assert set(keys.values()) == {1} and {key[0] for key in keys} == {"anchor", "snnet"}
    assert all(row["details"]["images"] == 450 for row in found)  # the two shares together
    assert done.stdout.count("has the largest area") == 1
    assert all((out / name).stat().st_size > 1000 for name in PICTURES)
