"""Run by test_distributed_evaluation.py: each process adds its own answers, and measures its own batches."""

import json
import sys
from pathlib import Path
from typing import Any

import evaluate
from accelerate import PartialState

QUESTIONS = [
    {"best_answer": "a b c", "correct_answers": ["a b c"], "incorrect_answers": ["zzz"]},
    {"best_answer": "d e f", "correct_answers": ["g h"], "incorrect_answers": ["d e f"]},
    {"best_answer": "b a", "correct_answers": ["a b", "c b a"], "incorrect_answers": ["c a", "b"]},
]
ANSWERS = ["a b c", "d e", "I have no comment.", "", "a c b a"]
ASKED = [QUESTIONS[number % 3] for number in range(5)]


def measured() -> list[dict[str, Any]]:
    """Metrics and details of a language model and an image classifier, on three batches each."""
    from labelled_images import joined, labelled, split
    from tiny_models import tiny_model, token_ids
    from tiny_vision import tiny_classifier

    from klas_hf import evaluate as measure
    from klas_hf.data.text import TextBatches

    text = TextBatches([token_ids(length, seed=length).tolist() for length in (5, 9, 3, 12, 7)], 2)
    images = split(labelled("vit", 1, 11), 4)
    assert len(text) == len(images) == 3 and len(joined(images)[0]) == 11
    found = measure(tiny_model(), text), measure(tiny_classifier("vit"), images, classes=[3, 0])
    return [{**one.metrics, **one.details.pop("standard_errors"), **one.details} for one in found]


def main(metric_file: str, folder: Path) -> None:
    state = PartialState(cpu=True)
    metric = evaluate.load(
        metric_file, num_process=state.num_processes, process_id=state.process_index, cache_dir=str(folder / "cache")
    )
    share = slice(state.process_index, None, state.num_processes)
    metric.add(prediction=ANSWERS[share][0], reference=ASKED[share][0])
    metric.add_batch(predictions=ANSWERS[share][1:], references=ASKED[share][1:])
    rouge = metric.compute()
    assert (rouge is None) == (state.process_index > 0)
    assert "klas_hf" not in sys.modules  # the file stands alone
    (folder / f"found-{state.process_index}.json").write_text(json.dumps([rouge, measured()]))
    state.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
