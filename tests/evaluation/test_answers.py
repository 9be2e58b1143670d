"""Scores of answers, and the paired comparison of two rules."""

import numpy as np
import pytest

from klas_hf import ResultRow
from klas_hf.evaluation.answers import compare_rules
from klas_hf.maths.bootstrap import paired_bootstrap


def row(scores: list[float], questions: list[int]) -> ResultRow:
    return ResultRow("rule", (1, 1), 0, 1, 1, {}, {"questions": questions, "per_question": {"rouge1": scores}})


def test_rules_are_compared_question_by_question() -> None:
    ours = {0: [row([0.5, 0.7, 0.1], [3, 4, 5]), row([0.3, 0.9, 0.5], [3, 4, 5])], 1: [row([0.2, 0.2], [4, 9])]}
    theirs = {0: [row([0.1, 0.2, 0.3], [3, 4, 5])], 1: [row([0.4, 0.1], [4, 9])], 2: [row([1.0], [1])]}
    found = compare_rules(ours, theirs)
    a, b = [0.4, 0.8, 0.3, 0.2, 0.2], [0.1, 0.2, 0.3, 0.4, 0.1]
    assert found == paired_bootstrap(a, b, clusters=[3, 4, 5, 4, 9])
    assert found.difference == pytest.approx(np.mean(np.subtract(a, b)))
