"""The TruthfulQA recipe as it is launched, on two tiny anchors and a small CSV: rows, table, pictures, resume."""

import csv
import json
import re
from pathlib import Path

import pytest
from launching import launch
from tiny_models import tiny_model

from klas_hf.data.text import train_tokenizer

COLUMNS = ["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source"]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Options that name a CSV of thirty questions and two anchors with their tokenizer."""
    words = ["cat", "dog", "tree", "stone", "river", "cloud"] * 5
    rows = [
        ["", "Words", f"What is {word} {n}?", f"A {word} is {n}", f"A {word} is {n}; It is a {word}", f"No {word}", ""]
        for n, word in enumerate(words)
    ]
    with (tmp_path / "questions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    tokenizer = train_tokenizer([" ".join(row) for row in rows], 300)
    for name, large in (("small", False), ("large", True)):
        tiny_model(large=large, vocab_size=len(tokenizer)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    places = {"source": "small", "target": "large", "data": "questions.csv", "output_dir": "out"}
    return [part for option, name in places.items() for part in (f"--{option}", str(tmp_path / name))]


def run(arguments: list[str], *more: str) -> None:
    launch("truthfulqa.py", *arguments, *more)


SHORT = ["--max_new_tokens", "4", "--sizes", "1", "--max_steps", "2", "--gradient_accumulation_steps", "1"]


def test_two_seeds_compare_rules_and_resume(arguments: list[str], tmp_path: Path, capsys) -> None:
    rules = ["--rules", "klas", "esta_proportional", "esta_index", "random"]
    run(arguments, *SHORT, *rules, "--seeds", "0")
    first = (tmp_path / "out" / "rows.jsonl").read_text().splitlines()
    run(arguments, *SHORT, *rules, "--seeds", "0", "1")
    lines = (tmp_path / "out" / "rows.jsonl").read_text().splitlines()
    assert lines[: len(first)] == first  # nothing is measured twice
    header, *rows = map(json.loads, lines)
    assert header["run"]["training"]["max_steps"] == 2
    assert {"torch", "transformers"} <= header["versions"].keys()
    expected = {"source", "target", "source_zero_shot", "target_zero_shot", *rules[1:]}
    assert {(row["rule"], row["seed"]) for row in rows} == {(rule, seed) for rule in expected for seed in (0, 1)}
    assert all(len(row["details"]["answers"]) == len(row["details"]["questions"]) == 12 for row in rows)
    table = (tmp_path / "out" / "table.md").read_text()
    assert all(name in table for name in (*expected, "no_comment", "first_incorrect", "95 % interval"))
    for picture in ("curve.png", "curve.svg", "heatmap-0.png", "heatmap-1.svg"):
        assert (tmp_path / "out" / picture).stat().st_size > 1000
    assert table.strip() in capsys.readouterr().out


def test_bad_input_is_refused_before_any_training(arguments: list[str], tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(arguments, "--rules", "best")
    assert re.search(r"\['best'\].*klas", capsys.readouterr().err)
    run(arguments, *SHORT, "--seeds", "0", "--rules", "klas")
    capsys.readouterr()
    bad: list[tuple[str, list[str]]] = [
        ("another run.*training.*another output folder", [*SHORT, "--seeds", "0", "--learning_rate", "0.5"]),
        ("no-such-folder.*local folder", ["--source", f"{tmp_path}/no-such-folder", "--output_dir", f"{tmp_path}/o"]),
        ("no-such-file.csv", [*SHORT, "--data", f"{tmp_path}/no-such-file.csv"]),
    ]
    content = (tmp_path / "questions.csv").read_text().replace("Best Answer", "Worst Answer")
    (tmp_path / "others.csv").write_text(content)
    bad.append(("Best Answer", [*SHORT, "--data", f"{tmp_path}/others.csv"]))
    for message, options in bad:
        with pytest.raises(SystemExit, match="2"):
            run(arguments, *options)
        assert re.search(f"error: .*{message}", capsys.readouterr().err)
