"""A small suite of tasks in the harness's own form, of what ships with Python, and of TruthfulQA where its CSV is.

The sentences are of texts that the quickstart's anchors have not seen. They differ a little between versions of Python;
a digest of them stands in each task's metadata, and so in its rows.
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path as Folder
from typing import Any

from experiments.field_tasks import digest
from klas_hf.data.text import held_out, python_documentation
from klas_hf.data.truthfulqa import load_truthfulqa

WORDS = 10, 30  # of a sentence
CHOICES = 4
DOCUMENTATION = "Python's documentation"
GROUP = "documentation"
OFFLINE = (GROUP, "documentation_next_word", "documentation_text")
TRUTHFULQA = ("truthfulqa_mc1_local", "truthfulqa_mc2_local", "truthfulqa_gen_local")

_ACCURACY = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
_CHOICE = {
    "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [_ACCURACY, {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip
_TASKS: dict[str, dict[str, Any]] = {
    "documentation_endings": _CHOICE,
    "documentation_cloze": _CHOICE,
    "documentation_next_word": {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [
            {"name": "stripped", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
        ],
    },
    "documentation_text": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
        ],
    },
}  # fmt: skip


def write_offline_tasks(folder: Folder, *, count: int = 200, truthfulqa: str | None = None, seed: int = 0) -> None:
    """Write data and tasks into a folder for `--include_path`.

    `documentation` is a group of two: `documentation_endings`, which of four second halves goes on a sentence, and
    `documentation_cloze`, which of four words ends it. `documentation_next_word` has that word written,
    `documentation_text` measures whole texts. TruthfulQA's have the harness's own prompts, settings and scoring; mc1
    offers the best answer and all incorrect ones of the CSV, mc2 all correct and all incorrect ones.

    Args:
        count: sentences of each task, and a tenth of it texts.
        truthfulqa: TruthfulQA.csv.
        seed: of the choice of wrong answers and of the places of right ones.

    Raises:
        OSError, ValueError: of the CSV.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = held_out(python_documentation())[1]
    spread = _spread([sentence for text in texts for sentence in sentences(text)], count)
    rng = random.Random(seed)
    cloze = [{**one, "choices": [word.rstrip(".") for word in one["choices"]]} for one in _choices(spread, -1, rng)]
    data = {
        "documentation_endings": _choices(spread, None, rng),
        "documentation_cloze": cloze,
        "documentation_next_word": cloze,
        "documentation_text": [{"text": text} for text in _spread([t for t in texts if len(t) > 300], count // 10)],
    }
    for name, rows in data.items():
        _write(folder, name, rows, _TASKS[name], DOCUMENTATION)
    members = {"group": GROUP, "task": ["documentation_endings", "documentation_cloze"], "metadata": {"version": 1}}
    members["aggregate_metric_list"] = [{"metric": name, "weight_by_size": True} for name in ("acc", "acc_norm")]
    (folder / f"{GROUP}.yaml").write_text(json.dumps(members), encoding="utf-8")  # JSON is YAML
    if truthfulqa is not None:
        _write_truthfulqa(folder, truthfulqa)


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text that are plain prose of 10 to 30 words, each with its full stop."""
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in re.split(r"(?<=\.)\s+", " ".join(paragraph.split())):
            words = sentence.split()
            if WORDS[0] <= len(words) <= WORDS[1] and re.fullmatch(r"[A-Z][a-z].* [a-z]{3,}\.", sentence):
                yield sentence


def _spread(items: list[Any], count: int) -> list[Any]:
    return [items[number * len(items) // count] for number in range(count)] if len(items) > count else items


def _choices(found: Sequence[str], cut: int | None, rng: random.Random) -> list[dict[str, Any]]:
    """Each sentence up to a word (None: the middle one), what follows there, and what follows in three others."""
    halves = []
    for sentence in found:
        words = sentence.split()
        place = len(words) // 2 if cut is None else len(words) + cut
        halves.append((" ".join(words[:place]), " ".join(words[place:])))
    rows = []
    for question, right in halves:
        wrong = rng.sample(sorted({ending for _, ending in halves if ending != right}), CHOICES - 1)
        answer = rng.randrange(CHOICES)
        rows.append({"question": question, "choices": [*wrong[:answer], right, *wrong[answer:]], "answer": answer})
    return rows


def _write(folder: Folder, name: str, rows: Sequence[Any], settings: dict[str, Any], data: str) -> None:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    place = {"data_files": {"test": str(file.resolve())}, "cache_dir": str((folder / "cache").resolve())}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": place, "test_split": "test", **settings}
    task["metadata"] = {"version": 1, "data": data, "rows": digest(list(rows))}
    (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")


def _write_truthfulqa(folder: Folder, csv: str) -> None:
    import lm_eval.tasks

    questions = load_truthfulqa(csv)
    theirs = Folder(lm_eval.tasks.__file__).parent / "truthfulqa"
    mc1 = [_targets([one.best_answer], one.incorrect_answers) for one in questions]
    mc2 = [_targets(one.correct_answers, one.incorrect_answers) for one in questions]
    choices = [
        {"question": one.question, "mc1_targets": first, "mc2_targets": second}
        for one, first, second in zip(questions, mc1, mc2, strict=True)
    ]
    answers = [{"question": one.question, **one.references} for one in questions]
    for name, rows in zip(TRUTHFULQA, (choices, choices, answers), strict=True):
        own = {"include": str(theirs / f"{name.removesuffix('_local')}.yaml"), "dataset_name": None, "tag": None}
        _write(folder, name, rows, {**own, "validation_split": None}, "TruthfulQA.csv")


def _targets(right: Sequence[str], wrong: Sequence[str]) -> dict[str, Any]:
    return {"choices": [*right, *wrong], "labels": [1] * len(right) + [0] * len(wrong)}
