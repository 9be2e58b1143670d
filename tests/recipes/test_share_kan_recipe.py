"""The SHARe-KAN recipe as it is run: rows, table, picture, and that a second run measures nothing again."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "share_kan.py"


def run(folder: Path, *options: str) -> None:
    places = ["--output_dir", str(folder / "out"), "--cache_dir", str(folder / "cache")]
    argv, sys.argv = sys.argv, ["share_kan.py", "--smoke", *places, *options]
    try:
        runpy.run_path(str(RECIPE), run_name="__main__")
    finally:
        sys.argv = argv


@pytest.mark.slow
def test_smoke_run_measures_every_form_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path)
    out = tmp_path / "out"
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()[1:]]
    by_form = {row["rule"]: row for row in rows}
    assert len(by_form) == len(rows) == 10
    sizes = {form: row["metrics"]["head_bytes"] for form, row in by_form.items()}
    edges, outputs = 32 * 64 + 64 * 10, 64 + 10
    assert sizes["dense"] == 4 * 13 * edges
    assert sizes["SHARe-KAN int8, K=16"] == edges // 2 + edges + 8 * outputs + 16 * 13 + 4
    assert sizes["SHARe-KAN int8, bias per edge, K=64"] == sizes["SHARe-KAN int8, K=64"] + edges
    assert sizes["mlp"] == 4 * (32 * 64 + 64 + 64 * 10 + 10)
    assert by_form["mlp"]["macs"] == edges and by_form["dense"]["macs"] == 13 * edges
    report = (out / "report.md").read_text()
    assert report.strip() in capsys.readouterr().out and all(form in report for form in by_form)
    assert (out / "curve.png").stat().st_size > 1000
    before = (out / "rows.jsonl").read_text()
    run(tmp_path)
    assert (out / "rows.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "x"], "data=x and .*backbone=None; expected both"),
        (["--seeds", "1", "1"], "at least one, each once"),
    ],
)
def test_bad_options_are_refused(options: list[str], message: str, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, *options)
    assert re.search(message, capsys.readouterr().err)
