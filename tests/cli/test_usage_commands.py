"""Commands that count seconds and bytes: evaluate --timed, plot --cost, select --budget, draft."""

import json
from pathlib import Path

import pytest
from tiny_models import token_ids

from klas_hf import StitchedSupernet
from klas_hf.cli import main
from klas_hf.rows import read_rows


@pytest.fixture(autouse=True)
def _times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))


def test_measured_models_are_drawn_over_what_they_take(language: Path, tmp_path: Path) -> None:
    rows, anchors = tmp_path / "rows.jsonl", [str(language / name) for name in ("small", "large")]
    told = ["--data", str(language / "text"), "--length", "16", "--rows", str(rows)]
    assert main(["evaluate", *anchors, *told, "--timed", "--prompt", "4"]) == 0
    found = read_rows(rows)
    assert all(row.cost("latency") > 0 and row.cost("weight_bytes") == 4 * row.parameters for row in found)
    for cost in ("latency", "weight_bytes"):
        assert main(["plot", str(rows), "--output", str(tmp_path / cost), "--cost", cost]) == 0
        assert (tmp_path / f"{cost}.png").is_file()


def test_a_cost_that_is_not_there_is_refused(
    language: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    told = ["--data", str(language / "text"), "--length", "16", "--rows", str(rows)]
    assert main(["evaluate", str(language / "small"), *told]) == 0
    assert main(["plot", str(rows), "--output", str(tmp_path / "curve"), "--cost", "latency"]) == 2
    assert "got --cost 'latency' and a row that has" in capsys.readouterr().err
    assert main(["plot", str(rows), "--output", str(tmp_path / "curve"), "--cost", "joy"]) == 2
    assert "got --cost 'joy'; expected one of macs, parameters" in capsys.readouterr().err


def test_a_stitch_is_recommended_for_seconds_and_bytes(
    language: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores, anchors = tmp_path / "scores.safetensors", [str(language / name) for name in ("small", "large")]
    told = ["--data", str(language / "text"), "--length", "16", "--score", "functional", "--output", str(scores)]
    assert main(["score", *anchors, *told]) == 0
    capsys.readouterr()
    assert main(["select", str(scores), "--budget", "100 s, 60%", "--prompt", "4", "--json"]) == 0
    timed = json.loads(capsys.readouterr().out)["recommended"]
    assert main(["select", str(scores), "--budget", "60%", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recommended"]["macs"] == timed["macs"]
    cached = 4 * 2 * 8  # bytes of K and V of one block of the small anchor, of one head
    assert main(["select", str(scores), "--budget", f"{3 * cached / 1e3} KB per token"]) == 2
    assert main(["select", str(scores), "--budget", "0.0001 ms", "--prompt", "4"]) == 2
    assert "The nearest: " in capsys.readouterr().err


@pytest.mark.slow
def test_drafts_are_told_with_their_arithmetic(
    language: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    supernet = StitchedSupernet.from_anchors(
        [str(language / name) for name in ("small", "large")], ["0[:2] 1[2:]"], calibration=[token_ids(32, 12)]
    )
    supernet.save_pretrained(tmp_path / "net")
    told = ["--data", str(language / "text"), "--length", "16", "--measure", "1"]
    assert main(["draft", str(tmp_path / "net"), *told]) == 0
    said = capsys.readouterr().out
    assert "Drafts for 1[:], by MACs, not seconds" in said and "Where a <= c no draft pays" in said
    assert "| 0[:] " in said and "| 0[:2] 1[2:] " in said and "| pays above |" in said
    for option, value, message in (
        ("--measure", "-1", "got --measure -1; expected at least 0"),
        ("--drafted", "0", "got --drafted 0; expected at least 1"),
        ("--length", "4000", "got --length 4000; expected at most"),
    ):
        assert main(["draft", str(tmp_path / "net"), *told, option, value]) == 2
        assert message in capsys.readouterr().err
