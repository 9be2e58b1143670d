"""The SHARe-KAN recipe as it is run: rows, table, picture, and that a second run measures nothing again."""

import json
import re
import runpy
from pathlib import Path

import pytest
from launching import RECIPES, launch
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil
from voc_folder import SIDE, write_voc


def run(folder: Path, *options: str) -> None:
    places = ["--output_dir", str(folder / "out"), "--cache_dir", str(folder / "cache")]
    launch("share_kan.py", "--smoke", *places, *options)


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


@pytest.mark.slow
def test_images_with_any_number_of_labels_are_measured_by_mean_average_precision(tmp_path: Path) -> None:
    """VOC's folders, made up."""
    write_voc(tmp_path / "voc", {"trainval": 24, "test": 16})
    labels = {"id2label": dict(enumerate("ab")), "label2id": {"a": 0, "b": 1}}
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(**sizes | labels)).save_pretrained(tmp_path / "backbone")
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(tmp_path / "backbone")
    options = ["--config", str(RECIPES / "share_kan_voc2007.yaml"), "--hidden", "16"]
    places = ["--data", str(tmp_path / "voc"), "--backbone", str(tmp_path / "backbone"), "--image_size", str(SIDE)]
    run(tmp_path, *options, *places)
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()[1:]]
    assert len(rows) == 10 and all(0 < row["metrics"]["test"] <= 1 for row in rows)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| mean average precision | with noise |" in report.splitlines()[0]


@pytest.mark.parametrize("name", ["share_kan_voc2007", "share_kan_coco"])
def test_the_files_for_others_data_parse(name: str) -> None:
    module = runpy.run_path(str(RECIPES / "share_kan.py"))
    argv = ["--config", str(RECIPES / f"{name}.yaml"), "--data", "somewhere"]
    (args,) = module["parse_options"](module["ShareKANArguments"], argv=argv)
    assert args.multi_label and args.backbone == "microsoft/resnet-50" and args.data == "somewhere"
    assert args.codebooks[-1] == 65536


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "x"], "data=x and .*backbone=None; expected both"),
        (["--seeds", "1", "1"], "at least one, each once"),
        (["--multi_label", "true"], "got multi_label without data"),
    ],
)
def test_bad_options_are_refused(options: list[str], message: str, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, *options)
    assert re.search(message, capsys.readouterr().err)
