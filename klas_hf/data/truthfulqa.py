"""TruthfulQA, generative: the questions, their split, degenerate answers.

Lin, Hilton and Evans, "TruthfulQA: measuring how models mimic human falsehoods", 2022: 817 questions, each
with a best, several correct and several incorrect answers. KLAS (Tab. 6) fine-tunes on 60 % of them and
generates on the rest; the split of 490 and 327 is drawn anew for every seed, since the paper's is not known.
"""

import csv
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUB_DATASET, HUB_CONFIG, HUB_SPLIT = "truthfulqa/truthful_qa", "generation", "validation"

_CSV_COLUMNS = {
    "question": "Question",
    "best_answer": "Best Answer",
    "correct_answers": "Correct Answers",
    "incorrect_answers": "Incorrect Answers",
    "category": "Category",
}


@dataclass(frozen=True)
class Question:
    """One question with its reference answers.

    Attributes:
        question: text of the question.
        best_answer: the reference that models are trained on.
        correct_answers, incorrect_answers: never empty as loaded; the best answer is among the correct ones.
        category: topic, such as "Misconceptions".
        index: position in the data, counted from 0; names the question across splits.
    """

    question: str
    best_answer: str
    correct_answers: tuple[str, ...]
    incorrect_answers: tuple[str, ...]
    category: str
    index: int

    @property
    def references(self) -> dict[str, Any]:
        """What an answer is scored against."""
        return {
            "best_answer": self.best_answer,
            "correct_answers": list(self.correct_answers),
            "incorrect_answers": list(self.incorrect_answers),
        }


def load_truthfulqa(data: str | Path | None = None) -> list[Question]:
    """Load the questions, in the order of the data.

    Args:
        data: a CSV file with the columns Question, Best Answer, Correct Answers, Incorrect Answers (answers
            separated by ";") and Category, as the authors publish it. None: the Hub's `HUB_DATASET`.

    Raises:
        FileNotFoundError: `data` is no file.
        OSError: the Hub could not be reached, or is switched off by HF_HUB_OFFLINE=1 and nothing is cached.
        ValueError: columns are missing, there is no row, or a row lacks a question or an answer.
    """
    source = f"the Hub dataset {HUB_DATASET}" if data is None else str(data)
    rows = _hub_rows() if data is None else _csv_rows(Path(data))
    if not rows:
        raise ValueError(f"got {source}, which holds no question; expected at least one row below the header")
    return [_question(row, index, source) for index, row in enumerate(rows)]


def split_questions(
    questions: Sequence[Question], *, seed: int, train_fraction: float = 0.6
) -> tuple[list[Question], list[Question]]:
    """Split at random into train and test, each in the order of `questions`: 817 give 490 and 327.

    The split depends on `seed` and the number of questions alone.

    Raises:
        ValueError: a part would be empty.
    """
    train_size = round(train_fraction * len(questions))
    if not 0 < train_size < len(questions):
        raise ValueError(
            f"got {len(questions)} questions and train_fraction={train_fraction}, which puts {train_size} in "
            "the train split; expected at least one question in each. Give more questions or another fraction"
        )
    generator = random.Random(seed)
    # random() is the one method whose sequence Python promises to keep across versions; shuffle is not.
    ranks = [generator.random() for _ in questions]
    chosen = set(sorted(range(len(questions)), key=ranks.__getitem__)[:train_size])
    train = [question for place, question in enumerate(questions) if place in chosen]
    return train, [question for place, question in enumerate(questions) if place not in chosen]


def degenerate_answers(questions: Sequence[Question]) -> dict[str, list[str]]:
    """Answers that need no model, to be printed beside results: name → one answer for each question.

    They show how little ROUGE measures truth. `first_correct` is a ceiling, the others should score low.
    """
    return {
        "first_correct": [question.correct_answers[0] for question in questions],
        "first_incorrect": [question.incorrect_answers[0] for question in questions],
        "echo_question": [question.question for question in questions],
        "no_comment": ["I have no comment." for _ in questions],
        "empty": ["" for _ in questions],
    }


def _hub_rows() -> list[Mapping[str, Any]]:
    from datasets import load_dataset  # slow to import, and a CSV does not need it

    try:
        dataset = load_dataset(HUB_DATASET, HUB_CONFIG, split=HUB_SPLIT)
    except (OSError, ValueError) as error:  # ValueError: offline, and another config is cached
        raise OSError(
            f"could not load the dataset {HUB_DATASET} (config {HUB_CONFIG}, split {HUB_SPLIT}) from the "
            f"Hub: {error}. Connect and unset HF_HUB_OFFLINE, or pass a local copy with --data file.csv"
        ) from error
    _check_columns(_CSV_COLUMNS, dataset.column_names, f"the Hub dataset {HUB_DATASET}")
    return list(dataset)


def _csv_rows(path: Path) -> list[Mapping[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"got data={str(path)!r}, which is not a file; expected a CSV file of TruthfulQA")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            columns, rows = reader.fieldnames or [], list(reader)
    except UnicodeDecodeError as error:
        raise ValueError(f"got {path}, which is not UTF-8 ({error}); expected a CSV file saved as UTF-8") from error
    _check_columns(_CSV_COLUMNS.values(), columns, str(path))
    named = [{field: row[column] for field, column in _CSV_COLUMNS.items()} for row in rows]
    lists = ("correct_answers", "incorrect_answers")
    return [{**row, **{field: row[field].split(";") for field in lists}} for row in named]


def _check_columns(wanted: Collection[str], found: Collection[str], source: str) -> None:
    if missing := [column for column in wanted if column not in found]:
        raise ValueError(
            f"got {source} without the columns {_listed(missing)}; found {_listed(found)}. Expected the "
            f"columns {_listed(wanted)}, as the published TruthfulQA has them"
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _question(row: Mapping[str, Any], index: int, source: str) -> Question:
    question = Question(
        question=row["question"].strip(),
        best_answer=row["best_answer"].strip(),
        correct_answers=_not_blank(row["correct_answers"]),
        incorrect_answers=_not_blank(row["incorrect_answers"]),
        category=row["category"].strip(),
        index=index,
    )
    needed = {
        "Question": question.question,
        "Best Answer": question.best_answer,
        "Correct Answers": question.correct_answers,
        "Incorrect Answers": question.incorrect_answers,
    }
    if empty := [column for column, value in needed.items() if not value]:
        raise ValueError(
            f"got {source} with nothing under {_listed(empty)} in row {index + 1} (counted from 1 below the "
            f"header; question {question.question!r}); expected text. Fill it in or remove the row"
        )
    return question


def _not_blank(answers: Iterable[str]) -> tuple[str, ...]:
    """The published lists end in a separator here and there."""
    return tuple(answer.strip() for answer in answers if answer.strip())
