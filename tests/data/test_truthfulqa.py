"""TruthfulQA: loading and splitting."""

import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klas_hf.data import truthfulqa
from klas_hf.data.truthfulqa import Question, degenerate_answers, load_truthfulqa, split_questions

COLUMNS = ["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source"]
ROWS = [
    [
        "Adversarial",
        "Food",
        "What if you eat seeds? ",
        " Nothing",
        "Nothing; They pass ;",
        "You grow;You die",
        "url",
    ],
    ["Adversarial", "Law", 'Is "it", here, legal?', "No, it is not", "No; No, it is not", "Yes; ", "url"],
]
LOADED = [
    Question("What if you eat seeds?", "Nothing", ("Nothing", "They pass"), ("You grow", "You die"), "Food", 0),
    Question('Is "it", here, legal?', "No, it is not", ("No", "No, it is not"), ("Yes",), "Law", 1),
]


def write(path: Path, rows: list[list[str]], columns: list[str] = COLUMNS, encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def test_load_csv(tmp_path: Path) -> None:
    assert load_truthfulqa(write(tmp_path / "data.csv", ROWS)) == LOADED


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_load_csv_finds_columns_by_name(tmp_path: Path, encoding: str) -> None:
    needed = [column for column in reversed(COLUMNS) if column not in ("Type", "Source")]
    rows = [[row[COLUMNS.index(column)] for column in needed] for row in ROWS]
    path = write(tmp_path / "data.csv", rows, needed, encoding)
    assert load_truthfulqa(path) == load_truthfulqa(str(path)) == LOADED


def test_missing_columns_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv", [["a", "b", "c"]], ["question", "Best Answer", "Category"])
    missing = "without the columns 'Question', 'Correct Answers', 'Incorrect Answers'"
    with pytest.raises(ValueError, match=f"data.csv {missing}; found 'question', 'Best Answer', 'Category'"):
        load_truthfulqa(path)


def test_empty_files(tmp_path: Path) -> None:
    empty = tmp_path / "empty.csv"
    empty.touch()
    with pytest.raises(ValueError, match=r"without the columns 'Question', .*found none"):
        load_truthfulqa(empty)
    with pytest.raises(ValueError, match=r"header\.csv, which holds no question; expected at least one row"):
        load_truthfulqa(write(tmp_path / "header.csv", []))


@pytest.mark.parametrize("column", ["Question", "Best Answer", "Correct Answers", "Incorrect Answers"])
@pytest.mark.parametrize("blank", ["", " ", None])
def test_rows_without_an_answer_are_named(tmp_path: Path, column: str, blank: str | None) -> None:
    row = list(ROWS[1])
    if blank is None and column == "Incorrect Answers":
        row = row[: COLUMNS.index(column)]  # a short row
    else:
        row[COLUMNS.index(column)] = blank or " ; " * (column.endswith("Answers"))
    path = write(tmp_path / "data.csv", [ROWS[0], row])
    with pytest.raises(ValueError, match=f"data.csv with nothing under '{column}' in row 2 "):
        load_truthfulqa(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent.csv', which is not a file; expected a CSV"):
        load_truthfulqa(tmp_path / "absent.csv")
    with pytest.raises(FileNotFoundError, match="not a file"):
        load_truthfulqa(tmp_path)
    latin = write(tmp_path / "latin.csv", [["É"] * len(COLUMNS)], encoding="latin-1")
    with pytest.raises(ValueError, match=r"latin\.csv, which is not UTF-8 .* expected a CSV file saved as UTF-8"):
        load_truthfulqa(latin)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that `datasets` reads as it reads the Hub's repository, instead of that."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub"
    monkeypatch.setattr(truthfulqa, "HUB_DATASET", str(folder))
    (folder / "generation").mkdir(parents=True)
    files = [{"split": "validation", "path": "generation/validation.jsonl"}]
    card = {"configs": [{"config_name": "generation", "data_files": files}]}
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    return folder


def write_hub(folder: Path, **changes: str) -> None:
    keys = [changes.get(column, column.lower().replace(" ", "_")) for column in COLUMNS]
    rows = [
        {key: value.split(";") if key.endswith("answers") else value for key, value in zip(keys, row, strict=True)}
        for row in ROWS
    ]
    (folder / "generation" / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_load_from_the_hub(hub: Path) -> None:
    write_hub(hub)
    assert load_truthfulqa() == LOADED


def test_hub_columns_are_checked(hub: Path) -> None:
    write_hub(hub, Question="prompt")
    with pytest.raises(ValueError, match=r"the Hub dataset .* without the columns 'question'; found .*'prompt'"):
        load_truthfulqa()


def test_hub_without_the_config_is_refused(hub: Path) -> None:
    write_hub(hub)
    (hub / "README.md").unlink()
    with pytest.raises(OSError, match=r"config generation, split validation.* pass a local copy with --data"):
        load_truthfulqa()


def test_offline_says_what_was_wanted_and_how_to_go_on(tmp_path: Path) -> None:
    code = "from klas_hf.data.truthfulqa import load_truthfulqa; load_truthfulqa()"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("OSError: could not load the dataset truthfulqa/truthful_qa (config generation")
    assert "unset HF_HUB_OFFLINE, or pass a local copy with --data file.csv" in last


def numbered(count: int) -> list[Question]:
    return [Question(f"{index}?", "a", ("a",), ("b",), "", index) for index in range(count)]


def test_split_has_the_papers_sizes_and_comes_from_the_seed_alone() -> None:
    questions = numbered(817)
    train, test = split_questions(questions, seed=0)
    assert (len(train), len(test)) == (490, 327)
    global_state = random.getstate()
    assert split_questions(questions, seed=0) == (train, test)
    assert random.getstate() == global_state
    assert split_questions(questions, seed=1) != (train, test)


def test_split_is_the_same_everywhere() -> None:
    # random.Random(0).random() begins .844, .758, .421, .259, .511: Python documents the sequence as stable.
    train, test = split_questions(numbered(5), seed=0)
    assert [question.index for question in train] == [2, 3, 4]
    assert [question.index for question in test] == [0, 1]


@given(st.integers(2, 60), st.integers(), st.floats(0.01, 0.99))
def test_split_is_a_partition_in_order(count: int, seed: int, fraction: float) -> None:
    questions = numbered(count)
    if not 0 < round(fraction * count) < count:
        with pytest.raises(ValueError, match=f"got {count} questions and train_fraction="):
            split_questions(questions, seed=seed, train_fraction=fraction)
        return
    train, test = split_questions(questions, seed=seed, train_fraction=fraction)
    assert len(train) == round(fraction * count)
    for part in (train, test):
        assert part == sorted(part, key=lambda question: question.index)
    assert sorted(train + test, key=lambda question: question.index) == questions


def test_every_question_is_held_out_for_some_seed_about_two_times_in_five() -> None:
    held_out = [0] * 10
    for seed in range(500):
        for question in split_questions(numbered(10), seed=seed)[1]:
            held_out[question.index] += 1
    assert all(150 < count < 250 for count in held_out)  # binomial, 200 ± 11


def test_degenerate_answers() -> None:
    assert degenerate_answers(LOADED) == {
        "first_correct": ["Nothing", "No"],
        "first_incorrect": ["You grow", "Yes"],
        "echo_question": ["What if you eat seeds?", 'Is "it", here, legal?'],
        "no_comment": ["I have no comment.", "I have no comment."],
        "empty": ["", ""],
    }
