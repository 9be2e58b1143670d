"""The notebooks run from top to bottom, offline, and the pages in git are whole, small and clean.

    OMP_NUM_THREADS=2 python tests/notebooks/test_notebooks.py [name.ipynb …]

runs all notebooks, or those named, at full length and writes their outputs into them. What a cell says on stderr
(progress bars, notices of libraries) goes to the terminal and not into the page.
"""

import ast
import base64
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

import klas_hf
from klas_hf.data.digits import load_digits_split

FOLDER = Path(__file__).parents[2] / "notebooks"
HEATMAP, LANGUAGE = "reading_a_heatmap.ipynb", "stitch_two_language_models.ipynb"
BUDGET, VISION = "choosing_a_stitch_for_a_budget.ipynb", "the_vision_curve.ipynb"
NOTEBOOKS = (LANGUAGE, VISION, HEATMAP, BUDGET)
MOST_BYTES = 150_000
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
NO_BARS = {"TQDM_DELAY": "86400"}  # seconds; where ipywidgets is installed, bars would be part of the page
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<~])/(?:[\w.+-]+/)+[\w.+-]*")

Cell = dict[str, Any]
Page = dict[str, Any]


def execute(name: str, folder: Path, setting: tuple[str, str] = ("", ""), **environment: str) -> Page:
    """A notebook run in a folder, with its new outputs; stderr is printed, not kept.

    Args:
        setting: a line of the setting cell, and what stands there in its place.
    """
    import nbformat
    from nbclient import NotebookClient

    page = nbformat.read(FOLDER / name, as_version=4)
    assert setting[0] in page.cells[1].source
    page.cells[1].source = page.cells[1].source.replace(*setting) if setting[0] else page.cells[1].source
    client = NotebookClient(
        page, timeout=3600, kernel_name="python3", record_timing=False, resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=os.environ | OFFLINE | NO_BARS | environment)
    for cell in code_cells(page):
        noise = [output for output in cell.outputs if output.get("name") == "stderr"]
        cell.outputs = [output for output in cell.outputs if output not in noise]
        sys.stderr.writelines(output.text for output in noise)
    page.metadata.language_info = {"name": "python"}  # which version ran them is no news
    return page


def main(names: list[str]) -> None:
    """Run notebooks in a new folder, so that nothing of an earlier run is in the pages; they share trained anchors."""
    import nbformat

    with tempfile.TemporaryDirectory() as folder:
        for name in names or NOTEBOOKS:
            page = execute(name, Path(folder))
            nbformat.write(page, FOLDER / name)
            print(f"ran {name}")


def code_cells(page: Page) -> list[Any]:
    return [cell for cell in page["cells"] if cell["cell_type"] == "code"]


def source(cell: Cell) -> str:
    return "".join(cell["source"])


def outputs(page: Page) -> list[Cell]:
    return [output for cell in code_cells(page) for output in cell["outputs"]]


def printed(page: Page) -> str:
    return "".join("".join(output["text"]) for output in outputs(page) if output["output_type"] == "stream")


def pictures(page: Page) -> list[bytes]:
    found = (output["data"].get("image/png") for output in outputs(page) if "data" in output)
    return [base64.b64decode("".join(png)) for png in found if png]


def committed(name: str) -> Page:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def programs(page: Page) -> list[ast.Module]:
    """What the code cells, and the snippets between the texts, say in Python."""
    texts = "\n".join(source(cell) for cell in page["cells"] if cell["cell_type"] == "markdown")
    snippets = re.findall(r"^```python\n(.*?)^```", texts, flags=re.MULTILINE | re.DOTALL)
    return [ast.parse(text) for text in (*map(source, code_cells(page)), *snippets)]


def nodes(page: Page, *kinds: type) -> Iterator[Any]:
    return (node for program in programs(page) for node in ast.walk(program) if isinstance(node, kinds))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Page, Path]]:
    """Runs a notebook once, at CI's size; gives the page and the folder it ran in."""
    pytest.importorskip("nbclient")
    done: dict[str, tuple[Page, Path]] = {}

    def run(name: str) -> tuple[Page, Path]:
        if name not in done:
            folder = tmp_path_factory.mktemp(name.removesuffix(".ipynb"))
            done[name] = execute(name, folder, KLAS_HF_SMOKE="1", OMP_NUM_THREADS="1"), folder
        return done[name]

    return run


@pytest.mark.slow
def test_a_stitched_language_model_is_left_behind(ran: Callable[[str], tuple[Page, Path]]) -> None:
    page, folder = ran(LANGUAGE)
    model = AutoModelForCausalLM.from_pretrained(folder / "outputs/stitched")
    tokenizer = AutoTokenizer.from_pretrained(folder / "outputs/stitched")
    assert isinstance(model, klas_hf.StitchedForCausalLM)
    prompt = "The “for” statement is used to"
    with torch.no_grad():
        answer = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=40, do_sample=False)
    assert printed(page).rstrip().endswith(tokenizer.decode(answer[0], skip_special_tokens=True).rstrip())
    scores = klas_hf.StitchScores.load(folder / "outputs/scores.safetensors")
    assert scores.score == "klas" and "functional" in scores.available
    row = re.search(r"\| stitched \| 0\[:(\d)\] 1\[(\d):\] +\| (\S+) ", printed(page))
    assert row is not None
    assert float(row[3]) == pytest.approx(model.num_parameters() / 1e6, abs=0.01)
    assert scores.costs.of(klas_hf.Stitch(int(row[1]), int(row[2])))[1] == model.num_parameters()


@pytest.mark.slow
def test_the_reader_s_own_language_models(ran: Callable[[str], tuple[Page, Path]], tmp_path: Path) -> None:
    _, first = ran(LANGUAGE)
    names = [str(folder) for folder in sorted(first.glob("outputs/llama-*"))]
    for name in names:
        AutoTokenizer.from_pretrained(first / "outputs/stitched").save_pretrained(name)
    anchors = f"ANCHORS = {tuple(names)}"
    page = execute(LANGUAGE, tmp_path, ("ANCHORS = None", anchors), KLAS_HF_SMOKE="1", OMP_NUM_THREADS="1")
    assert not list(tmp_path.glob("outputs/llama-*"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "outputs/stitched")
    assert [one.hidden_size for one in model.config.slice_configs] == [64, 128]
    assert re.findall("^source: .*", printed(page), re.MULTILINE) == re.findall(
        "^source: .*", printed(ran(LANGUAGE)[0]), re.MULTILINE
    )


@pytest.mark.slow
def test_a_curve_and_a_classifier_are_left_behind(ran: Callable[[str], tuple[Page, Path]]) -> None:
    page, folder = ran(VISION)
    rows = [json.loads(line) for line in (folder / "outputs/curve-after.jsonl").read_text().splitlines()[1:]]
    assert [klas_hf.Path.parse(row["path"]).joints for row in rows].count(0) == 2 and len(rows) > 3
    assert all(f"{row['metrics']['accuracy']:.4f}" in printed(page) for row in rows)
    assert pictures(page) == [(folder / "outputs/curve.png").read_bytes()]
    model = AutoModelForImageClassification.from_pretrained(folder / "outputs/between")
    assert isinstance(model, klas_hf.StitchedForImageClassification)
    assert f"{model.num_parameters():,} parameters" in printed(page)
    test = load_digits_split()[2].select(range(5))
    pixels = torch.stack([image for image, _ in test]).expand(-1, 3, -1, -1)
    with torch.no_grad():
        best = model((pixels / 255 - 0.3) / 0.37).logits.softmax(-1).max(-1)
    expected = zip(test.labels, best.indices.tolist(), best.values.tolist(), strict=True)
    lines = [f"a {label}: read as {answer} with {share:.0%}" for label, answer, share in expected]
    assert printed(page).rstrip().endswith("\n".join(lines))


@pytest.mark.slow
def test_the_heatmap_is_explained_in_numbers(ran: Callable[[str], tuple[Page, Path]]) -> None:
    page, _ = ran(HEATMAP)
    table = [line.split()[1:] for line in printed(page).splitlines() if re.match(r"i=\d ", line)]
    assert len(table) == 6 and {len(row) for row in table} == {11}
    assert np.isfinite(np.array(table, dtype=float)).all()
    assert len(re.findall(r"target block +\d+: capacity", printed(page))) == 11
    (numbers,) = re.findall(r"stitch \(\d+, \d+\): (\S+), 95 % interval (\S+) to (\S+)", printed(page))
    lowest, low, high = map(float, numbers)
    assert low <= lowest <= high
    assert all(f"| {label}" in printed(page) for label in ("Γ", "Θ", "functional KL"))


@pytest.mark.slow
def test_the_chosen_stitch_is_within_the_budget(ran: Callable[[str], tuple[Page, Path]]) -> None:
    page, folder = ran(BUDGET)
    code = "\n".join(map(source, code_cells(page)))
    limits = {name: float(value) for name, value in re.findall(r"^(MOST_\w+|CONTEXT) = (\S+)", code, re.MULTILINE)}
    counted = re.findall(r"^(MACs|parameters|KV bytes per token) +([\d,]+) +([\d,]+)$", printed(page), re.MULTILINE)
    assert len(counted) == 3 and all(before == now for _, before, now in counted)
    macs, parameters, kv = (int(now.replace(",", "")) for _, _, now in counted)
    assert macs <= limits["MOST_MACS"] and kv <= limits["MOST_KV_BYTES"]
    assert 2 * parameters + limits["CONTEXT"] * kv <= limits["MOST_BYTES"]
    rows = [json.loads(line) for line in (folder / "outputs/budget.jsonl").read_text().splitlines()[1:]]
    assert [row["rule"] for row in rows] == ["source", "target", "lowest score", "ESTA"]
    stitch = klas_hf.Path.parse(rows[2]["path"]).stitch
    assert stitch is not None
    place = folder / f"outputs/{stitch.source_stop}-{stitch.target_start}"
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16)
    cost = klas_hf.measure_costs(model, tokens=64)
    assert (cost.macs, cost.parameters, cost.kv_bytes_per_token) == (macs, parameters, kv)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_page_is_whole_small_and_clean(name: str) -> None:
    page = committed(name)
    assert (FOLDER / name).stat().st_size < MOST_BYTES
    assert 10 <= len(page["cells"]) <= 25
    assert [cell["execution_count"] for cell in code_cells(page)] == list(range(1, len(code_cells(page)) + 1))
    assert {output["output_type"] for output in outputs(page)} <= {"stream", "display_data", "execute_result"}
    assert {output["name"] for output in outputs(page) if output["output_type"] == "stream"} == {"stdout"}
    assert len(pictures(page)) == 1 and pictures(page)[0].startswith(b"\x89PNG")
    assert len(printed(page).splitlines()) < 100
    texts = [printed(page), *(str(output.get("data", {}).get("text/plain")) for output in outputs(page))]
    assert not ABSOLUTE_PATH.findall("\n".join([*texts, *map(source, page["cells"])]))
    assert "execution" not in {key for cell in page["cells"] for key in cell["metadata"]}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_page_holds_a_full_run(name: str) -> None:
    """Source and target have learnt, the target more, which CI's size does not show."""
    found = dict(
        re.findall(r"^(source|target): .*?(\d\.\d{3,4})(?: nats/token)?$", printed(committed(name)), re.MULTILINE)
    )
    if not found:  # the budget's last table has them
        found = dict(re.findall(r"^\| (source|target) .* (\d\.\d{4}) \|$", printed(committed(name)), re.MULTILINE))
    weak, strong = float(found["source"]), float(found["target"])
    if name in (VISION, HEATMAP):
        assert 0.5 < weak < strong <= 1
    else:
        assert 5 > weak > strong


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_page_begins_and_ends_as_all_do(name: str) -> None:
    page = committed(name)
    first, setting = page["cells"][:2]
    assert first["cell_type"] == "markdown" and source(first).startswith("# ") and "minutes" in source(first)
    assert 'SMOKE = bool(os.environ.get("KLAS_HF_SMOKE"))' in source(setting)
    assert "## Your own models" in source(page["cells"][-1])


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_only_public_names_are_used(name: str) -> None:
    page = committed(name)
    imported = [(node.module or "", alias.name) for node in nodes(page, ast.ImportFrom) for alias in node.names]
    ours = [(module, name) for module, name in imported if module.split(".")[0] == "klas_hf"]
    assert ours and not [node for node in nodes(page, ast.Import) if "klas_hf" in ast.unparse(node)]
    for module, one in ours:
        assert not one.startswith("_")
        if module == "klas_hf":
            assert one in klas_hf.__all__
        assert module == "klas_hf" or module.startswith("klas_hf.data.")
        assert one in vars(import_module(module)) or one in klas_hf.__all__
    assert not [node.attr for node in nodes(page, ast.Attribute) if re.match("_(?!_)", node.attr)]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_score_is_always_named(name: str) -> None:
    calls = [node for node in nodes(committed(name), ast.Call) if ast.unparse(node.func) == "score_stitches"]
    assert calls and all("score" in [keyword.arg for keyword in call.keywords] for call in calls)


if __name__ == "__main__":
    main(sys.argv[1:])
