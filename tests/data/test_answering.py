"""Answers of a model to TruthfulQA, and the paired comparison of two rules."""

import numpy as np
import pytest
from tiny_models import tiny_model

from klas_hf import ResultRow
from klas_hf.data.answering import compare_rules, measure_answers
from klas_hf.data.rouge import score_answers
from klas_hf.data.text import train_tokenizer
from klas_hf.data.truthfulqa import Question, decode_answer, prompt_ids
from klas_hf.maths.bootstrap import paired_bootstrap

QUESTIONS = [
    Question(f"What is {word}?", f"It is a {word}", (f"It is a {word}",), (f"No {word}",), "Words", index)
    for index, word in enumerate(["cat", "dog", "tree", "stone", "river"])
]


def test_answers_are_the_models_own() -> None:
    tokenizer = train_tokenizer([q.question + " " + q.best_answer for q in QUESTIONS], 300)
    model = tiny_model(seed=4, vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id]
    measured = measure_answers(model, QUESTIONS, tokenizer, max_new_tokens=5, batch_size=2)
    import torch

    answers = []
    for question in QUESTIONS:
        ids = prompt_ids(question, tokenizer)
        out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=5, pad_token_id=0)[0, len(ids) :]
        answers.append(decode_answer(out.tolist(), tokenizer, {tokenizer.eos_token_id}))
    assert measured.details["answers"] == answers
    assert measured.metrics == score_answers(answers, QUESTIONS).metrics()
    assert measured.details["questions"] == [0, 1, 2, 3, 4]
    assert np.mean(measured.details["per_question"]["rouge1"]) == pytest.approx(
        measured.metrics["best_rouge1"], abs=1e-5
    )


def row(scores: list[float], questions: list[int]) -> ResultRow:
    return ResultRow("rule", (1, 1), 0, 1, 1, {}, {"questions": questions, "per_question": {"rouge1": scores}})


def test_rules_are_compared_question_by_question() -> None:
    ours = {0: [row([0.5, 0.7, 0.1], [3, 4, 5]), row([0.3, 0.9, 0.5], [3, 4, 5])], 1: [row([0.2, 0.2], [4, 9])]}
    theirs = {0: [row([0.1, 0.2, 0.3], [3, 4, 5])], 1: [row([0.4, 0.1], [4, 9])], 2: [row([1.0], [1])]}
    found = compare_rules(ours, theirs)
    a, b = [0.4, 0.8, 0.3, 0.2, 0.2], [0.1, 0.2, 0.3, 0.4, 0.1]
    assert found == paired_bootstrap(a, b, clusters=[3, 4, 5, 4, 9])
    assert found.difference == pytest.approx(np.mean(np.subtract(a, b)))
