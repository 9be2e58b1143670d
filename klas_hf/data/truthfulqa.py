"""TruthfulQA, generative: the questions, their split, prompts for causal language models, degenerate answers.

Lin, Hilton and Evans, "TruthfulQA: measuring how models mimic human falsehoods", 2022: 817 questions, each
with a best, several correct and several incorrect answers. KLAS (Tab. 6) fine-tunes on 60 % of them and
generates on the rest; the split of 490 and 327 is drawn anew for every seed, since the paper's is not known.
Training is on the best answer, as the next tokens after the prompt.
"""

import csv
import random
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

HUB_DATASET, HUB_CONFIG, HUB_SPLIT = "truthfulqa/truthful_qa", "generation", "validation"
IGNORED = -100  # label of a token that the loss leaves out

_CSV_COLUMNS = {
    "question": "Question",
    "best_answer": "Best Answer",
    "correct_answers": "Correct Answers",
    "incorrect_answers": "Incorrect Answers",
    "category": "Category",
}
# Some templates (Llama 3.2, SmolLM3, Mistral) print the day of the run into the prompt, and a run resumed
# after midnight would see other data. A macro of the name that they call takes precedence over the clock.
_FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}{{- '' }}"


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


def prompt_ids(question: Question, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that a model continues with its answer.

    With a chat template: one user turn and the opening of the assistant's turn, without thinking (Qwen3,
    SmolLM3) and with a fixed date. Without one: "Q: …", a new line and "A:", after the tokenizer's own BOS.
    """
    return _tokenize(_prompt_text(question, tokenizer), tokenizer)


def encode_completion(
    question: Question,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 128,
    *,
    completion_only: bool = True,
) -> dict[str, list[int]]:
    """One training example: the prompt of `prompt_ids`, the best answer and the end of the turn.

    With a chat template the end is what the template writes after the answer, else EOS. What does not fit
    into `max_length` tokens is cut off at the end. An example with nothing left to learn is an error and not
    dropped: a train split that shrinks with the tokenizer could not be compared.

    Args:
        max_length: tokens, prompt included; the paper's is 128.
        completion_only: label the prompt -100, so that only the answer is learned; False learns both.

    Returns:
        `input_ids` and `labels` of one length.

    Raises:
        ValueError: the prompt alone fills `max_length`; the tokenizer has neither chat template nor EOS; or
            the template's answered conversation does not begin with its prompt.
    """
    prompt = prompt_ids(question, tokenizer)
    if len(prompt) >= max_length:
        raise ValueError(
            f"got max_length={max_length} and a prompt of {len(prompt)} tokens for question {question.index} "
            f"({question.question!r}), which leaves no answer to learn; expected room for both. "
            "Raise max_length"
        )
    ids = (prompt + _completion_ids(question, tokenizer, prompt))[:max_length]
    labels = [IGNORED] * len(prompt) + ids[len(prompt) :] if completion_only else list(ids)
    return {"input_ids": ids, "labels": labels}


def decode_answer(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, eos_ids: Collection[int]) -> str:
    """Text of a generated answer.

    Args:
        ids: generated ids, without the prompt; a list or a vector.
        eos_ids: the ids that end a generation (`generation_config.eos_token_id` as a list); the answer stops
            before the first of them. Special tokens are dropped.

    A model with the plain prompt may go on with a question of its own: the text is cut at a line with "Q:".
    """
    kept: list[int] = []
    for token in map(int, ids):  # elements of a tensor would never be found in a set
        if token in eos_ids:
            break
        kept.append(token)
    text = str(tokenizer.decode(kept, skip_special_tokens=True))
    if tokenizer.chat_template is None:
        text = re.split(r"\n\s*Q:", text, maxsplit=1)[0]
    return text.strip()


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


def _prompt_text(question: Question, tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        return f"Q: {question.question}\nA:"
    return _chat([{"role": "user", "content": question.question}], tokenizer, open_answer=True)


def _answered_text(question: Question, tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        return f"{_prompt_text(question, tokenizer)} {question.best_answer}"
    turns = [
        {"role": "user", "content": question.question},
        {"role": "assistant", "content": question.best_answer},
    ]
    return _chat(turns, tokenizer, open_answer=False)


def _chat(turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, open_answer: bool) -> str:
    template = _FIXED_DATE + tokenizer.get_chat_template()
    text = tokenizer.apply_chat_template(
        turns,
        chat_template=template,
        add_generation_prompt=open_answer,
        tokenize=False,
        enable_thinking=False,
    )
    return str(text)


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids with the tokenizer's own BOS, which a chat template has written already; never with an EOS."""
    if tokenizer.chat_template is not None:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def _completion_ids(question: Question, tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> list[int]:
    """What follows the prompt, so that prompt and completion are the ids seen when generating.

    Where the last token of the prompt would merge with the answer's first, the answer is tokenised by itself.
    """
    opening, whole = _prompt_text(question, tokenizer), _answered_text(question, tokenizer)
    ids = _tokenize(whole, tokenizer)
    if not whole.startswith(opening):
        raise ValueError(
            f"got a chat template that renders the prompt as {opening!r} and the answered conversation as "
            f"{whole!r}; expected the second to begin with the first. Set tokenizer.chat_template to one "
            "whose generation prompt opens the assistant's turn as it is written in full"
        )
    if ids[: len(prompt)] == prompt:
        completion = ids[len(prompt) :]
    else:
        completion = list(tokenizer(whole[len(opening) :], add_special_tokens=False)["input_ids"])
    return completion if tokenizer.chat_template is not None else [*completion, _eos_id(tokenizer)]


def _eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError("got a tokenizer without EOS; expected one to end answers with. Set tokenizer.eos_token")
    return int(tokenizer.eos_token_id)
