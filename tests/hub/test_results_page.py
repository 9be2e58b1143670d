"""The page of an output folder: what stands on it, that it asks nothing of any network, and how Chromium shows it."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hub_examples import some_scores
from PIL import Image

from klas_hf import ResultRow, RowFile
from klas_hf.cli import main
from klas_hf.hub.page import results_page
from klas_hf.hub.page_drawings import svg_heatmap, svg_lines
from klas_hf.hub.results import headline_metrics
from klas_hf.plotting import Series

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian's package chromium)")
TASKS = {"piqa": ("acc", "acc_norm"), "perplexity_c4": ("perplexity",), "speed": ("bytes",)}
MODELS = [("anchors", "0[:]", 20), ("klas", "0[:2] 1[2:]", 60), ("search", "1[:2] 1[4:]", 60), ("anchors", "1[:]", 100)]


def row(rule: str, path: str, macs: int, seed: int) -> ResultRow:
    metrics = {f"{task}: {name}": 0.3 + macs / 400 + seed / 50 for task, names in TASKS.items() for name in names}
    tasks = {task: {"task": task, "version": 1.0, "lm_eval": "0.4.13"} for task in TASKS}
    sources = {"piqa: acc_norm": {"dataset": "baber/piqa", "split": "validation"}}
    return ResultRow(
        rule, path, seed, macs * 10**6, macs * 10**4, metrics, {"tasks": tasks, "sources": sources},
        training={"steps": 100, "seed": seed, "note": "<b>&"}, made_from=["abc", "def"], setting={"tokens": 64},
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("a study <of> sizes")
    file = RowFile(place / "rows.jsonl", {"study": "field", "anchors": ["small", "large"]})
    for rule, path, macs in MODELS:
        for seed in (0, 1):
            file.append(row(rule, path, macs, seed))
    values = np.arange(1.0, 16.0).reshape(3, 5)
    replace(some_scores(place), score="theta", cross=values).save(place / "scores.safetensors")
    (place / "command.txt").write_text("accelerate launch recipes/benchmark_language.py --seeds 0 1\n")
    (place / "report.md").write_text("# A report\n\n| a | b < c |\n")
    Image.new("RGB", (20, 10), "red").save(place / "curve.png")
    return place


class Parts(HTMLParser):
    """Tags with their attributes, ids, and text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_whole_and_asks_nothing_of_a_network(folder: Path) -> None:
    page = results_page(folder)
    parts = Parts(page)
    ids = [attrs["id"] for _, attrs in parts.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in parts.tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        assert not any(name.startswith("on") for name in attrs)
        for name in ("href", "src"):
            if attrs.get(name):
                assert attrs[name].startswith("data:image/png;base64,") or attrs[name][1:] in ids
    assert "url(" not in page and "@import" not in page and "http://" not in page and "https://" not in page
    assert "<b>&" not in page and "a study &lt;of&gt;" in page and "<of>" not in page


def test_numbers_stand_with_their_rows_and_how_to_repeat_them(folder: Path) -> None:
    page = results_page(folder)
    text = " ".join(Parts(page).text)
    assert "0.4600 ± 0.0100" in text  # 0.3 + 60 / 400 + (0 and 0.02) of both seeds
    klas = page.index('<details id="m1"')
    assert "klas" in page[klas : klas + 200] and "rows.jsonl, line 4" in text and "rows.jsonl, line 5" in text
    lines = (folder / "rows.jsonl").read_text().splitlines()
    assert json.loads(lines[3])["rule"] == "klas"  # line 4 of the file
    assert "baber/piqa, validation" in text and "lm_eval 0.4.13" in text
    assert "accelerate launch recipes/benchmark_language.py --seeds 0 1" in text
    assert "speed: bytes" not in page[: page.index("Where each number is from</h2>")]
    assert "theta" in text and "3, 4: 14" in text


def test_curves_and_heatmaps_place_their_points() -> None:
    drawn = svg_lines(
        [Series("a", [0.0, 50.0, 100.0], [1.0, 3.0, 2.0]), Series("b", [25.0], [1.5], line=False)], "x", "y"
    )
    circles = [tuple(map(float, one)) for one in re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="5"><title>', drawn)]
    (left, low), (middle, high), (right, _), (quarter, _) = circles
    assert left < quarter < middle < right and high < low  # upwards is more
    assert middle == pytest.approx((left + right) / 2) and quarter == pytest.approx((3 * left + right) / 4, abs=0.1)
    assert drawn.count("<polyline") == 1 and "a: 3 at 50" in drawn
    cells = svg_heatmap(np.array([[1.0, 2.0], [np.nan, 4.0]]), "j", "i")
    shares = {title: float(share) for share, title in re.findall(r"fill-opacity:([\d.]+)\"><title>([^<]+)", cells)}
    assert list(shares) == ["1, 1: 1", "1, 2: 2", "2, 2: 4"]
    assert shares["1, 1: 1"] == 1.0 and shares["1, 2: 2"] == pytest.approx(0.53) and shares["2, 2: 4"] == 0.06


def test_figures_are_over_the_cost_that_the_run_names(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "rows.jsonl", {"cost": "latency"})
    models = [("anchors", "0[:]", 0.9), ("search", "0[:2] 1[2:]", 0.02), ("search", "1[:2] 1[4:]", 0.01)]
    for macs, (rule, path, seconds) in enumerate(models):  # the more MACs, the faster
        file.append(ResultRow(rule, path, 0, macs, 1, {"loss": 1.0}, {"latency": seconds}))
    page = results_page(tmp_path)
    assert ">ms per token, or of the images</text>" in page and "MACs (millions)" not in page
    assert "anchors: 1 at 900" in page and "search: 1 at 20" in page
    xs = [float(x) for x in re.findall(r"<polyline[^>]*points=\"([^\"]*)\"", page)[0].replace(",", " ").split()[::2]]
    assert len(xs) == 2 and xs == sorted(xs)
    assert re.findall(r"<td>([\d.]+)</td><td><a", page) == ["900", "20", "10"]


def test_each_length_of_healing_has_its_figure(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "rows.jsonl", {})
    for steps in (None, 100, 300):
        training = steps and {"max_steps": steps}
        for rule, path, macs in MODELS:
            value = {"loss": 3.0 - macs / 100 - (steps or 0) / 1000}
            file.append(ResultRow(rule, path, 0, macs * 10**6, 1, value, training=training))
    page = results_page(tmp_path)
    figures = re.findall(r"<figcaption>(.*?) <small>.*?</figure>", page)
    assert figures == ["loss, not healed", "loss, 100 steps", "loss, 300 steps"]


def test_anchors_as_they_are_stand_beside_what_was_healed(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "rows.jsonl", {})
    for rule, path, macs in MODELS:
        if rule == "anchors":
            file.append(ResultRow(rule, path, 0, macs * 10**6, 1, {"accuracy": 0.5}))
        file.append(ResultRow(rule, path, 0, macs * 10**6, 1, {"accuracy": macs / 100}, training={"max_steps": 9}))
    page = results_page(tmp_path)
    assert page.count("<figcaption>") == 1 and "anchors, not healed</li>" in page and "higher is better" in page


def test_more_rules_than_colours_have_other_shapes() -> None:
    drawn = svg_lines([Series(str(number), [1.0, 2.0], [number, 2.0]) for number in range(18)], "x", "y")
    legend = re.findall(r"<li><svg[^>]*>(.*?)</svg>", drawn)
    colours = re.findall(r'<li><svg viewBox="[^"]*" class="(c\d)"', drawn)
    assert len(set(zip(colours, legend, strict=True))) == 18


def test_headlines_are_the_published_metrics() -> None:
    names = ["gsm8k: exact_match (strict-match)", "gsm8k: exact_match (flexible-extract)", "speed: bytes", "accuracy"]
    assert headline_metrics(names) == ["gsm8k: exact_match (flexible-extract)", "accuracy"]


def test_the_command_writes_the_page_once(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(folder), "--page", str(page)]) == 0
    assert page.read_text() == results_page(folder)
    assert main(["report", str(folder), "--page", str(page)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["report", str(folder.parent)]) == 2
    assert f"there are some in {folder}" in capsys.readouterr().err


def shown(page: Path, width: int, script: str, *flags: str) -> str:
    """What a script finds on the page in a real browser; it is put into a copy, the page itself has none."""
    copy = page.with_name(f"{page.stem}-{width}{len(flags)}.html")
    written = f"<script>document.body.setAttribute('data-found', JSON.stringify({script}))</script></body>"
    copy.write_text(page.read_text().replace("</body>", written))
    common = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--hide-scrollbars"]
    done = subprocess.run(
        [str(CHROMIUM), *common, f"--user-data-dir={page.parent / 'profile'}", *flags, "--dump-dom", copy.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found is not None, done.stderr[-2000:]
    return found[1].replace("&quot;", '"')


@BROWSER
def test_chromium_shows_it_light_and_dark_and_on_a_phone(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(results_page(folder))
    script = """{
        overflow: document.documentElement.scrollWidth - window.innerWidth,
        back: getComputedStyle(document.body).backgroundColor, fore: getComputedStyle(document.body).color,
        figures: [...document.querySelectorAll('figure > svg')].map(one => one.getBoundingClientRect().width),
        ticks: Math.min(...[...document.querySelectorAll('figure .tick')].map(o => o.getBoundingClientRect().height)),
        requests: performance.getEntriesByType('resource').filter(one => !one.name.startsWith('data:')).length,
    }"""
    light = json.loads(shown(page, 500, script))
    dark = json.loads(shown(page, 500, script, "--blink-settings=preferredColorScheme=0"))
    for found in (light, dark):
        assert found["overflow"] <= 0 and found["requests"] == 0
        assert len(found["figures"]) == 3 and min(found["figures"]) > 400
        assert found["ticks"] >= 12  # pixels: readable
    assert brightness(light["back"]) > 200 > 60 > brightness(light["fore"])
    assert brightness(dark["back"]) < 60 < 200 < brightness(dark["fore"])


def brightness(colour: str) -> float:
    return float(np.mean([int(part) for part in re.findall(r"\d+", colour)[:3]]))
