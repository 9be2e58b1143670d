"""ROUGE under the three readings: against values worked out by hand, and naive loops over the library."""

from statistics import mean
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.scoring import BootstrapAggregator

from klas_hf.evaluation.truthfulqa_rouge import KINDS, TruthfulQARouge, lm_eval_correct, rouge_readings

WORDS = ["cats", "cat", "see", "the", "No", "comment", "I", "have", ".", " . ", "\n", "1952", "don't"]
texts = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
references = st.lists(st.sampled_from(WORDS[:8]), min_size=1, max_size=7).map(" ".join)


Reference = dict[str, Any]


@st.composite
def questions(draw: st.DrawFn) -> Reference:
    correct = draw(st.lists(references, min_size=1, max_size=3))
    return question(correct[0], correct, draw(st.lists(references, min_size=1, max_size=3)))


def question(best: str, correct: list[str] | None = None, incorrect: list[str] | None = None) -> Reference:
    return {"best_answer": best, "correct_answers": correct or [best], "incorrect_answers": incorrect or ["zzz"]}


def rows(readings: dict[str, list[float]], reading: str) -> list[tuple[float, ...]]:
    """ROUGE-1, -2 and -L of each answer under one reading, such as "lm_eval_{}_max"."""
    return list(zip(*(readings[reading.format(kind)] for kind in KINDS), strict=True))


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("the cat sat on the mat", "the cat lay on a mat", (4 / 6, 1 / 5, 4 / 6)),
        ("police killed the gunman", "the gunman killed police", (1, 1 / 3, 2 / 4)),
        ("a b c d", "a b", (2 / 3, 1 / 2, 2 / 3)),  # precision 1, recall 2/4 and 1/3
        ("a b c d", "c d\na b", (1, 2 / 3, 1 / 2)),  # a new line is a space
        ("Cats!", "cats", (1, 0, 1)),  # one word has no bigram
        ("cats", "cat", (0, 0, 0)),  # not stemmed
        ("cats", "", (0, 0, 0)),
    ],
)
def test_best_by_hand(reference: str, answer: str, expected: tuple[float, float, float]) -> None:
    got = rouge_readings([answer], [question(reference, correct=["other"])])
    assert rows(got, "best_{}") == [pytest.approx(expected)]


def test_max_correct_takes_each_maximum_by_itself() -> None:
    asked = question("none of it", correct=["d c b a e f g h", "a b", "x"])
    got = rouge_readings(["a b c d"], [asked])
    # ROUGE-1 is best at the first (precision 1, recall 1/2 → 2/3; as the second's), ROUGE-2 at the second.
    assert rows(got, "max_correct_{}") == [pytest.approx((2 / 3, 1 / 2, 2 / 3))]
    assert rows(got, "best_{}") == [(0, 0, 0)]


def test_lm_eval_by_hand() -> None:
    asked = question("unused", correct=["a b c d", "x y"], incorrect=["a b", "q."])
    got = rouge_readings(["c d\na b"], [asked])
    # Each line of the answer is in order in "a b c d.", so rougeLsum is whole where ROUGE-L is 1/2.
    assert rows(got, "lm_eval_{}_max") == [pytest.approx((100, 200 / 3, 100))]
    # "a b": precision 1/2 and recall 1; bigrams 1 of 3 and 1 of 1; rougeLsum as ROUGE-1.
    assert rows(got, "lm_eval_{}_diff") == [pytest.approx((100 - 200 / 3, 200 / 3 - 50, 100 - 200 / 3))]
    assert rows(got, "lm_eval_{}_acc") == [(1, 1, 1)]


def test_lm_eval_splits_sentences_at_spaced_periods() -> None:
    asked = question("unused", correct=["a b c d"])
    assert rouge_readings(["c d . a b"], [asked])["lm_eval_rougeL_max"] == pytest.approx([100])
    assert rouge_readings(["c d. a b"], [asked])["lm_eval_rougeL_max"] == pytest.approx([50])
    assert rouge_readings(["a b c d"], [question("c d . a b")])["lm_eval_rougeL_max"] == pytest.approx([100])
    assert rouge_readings(["a b c d"], [question("c d. a b")])["lm_eval_rougeL_max"] == pytest.approx([50])


def test_lm_eval_ties_are_not_accurate() -> None:
    asked = question("a b", incorrect=["a b"])
    got = rouge_readings(["a b", "nothing", ""], [asked] * 3)
    assert rows(got, "lm_eval_{}_acc") == [(0, 0, 0)] * 3
    assert rows(got, "lm_eval_{}_diff") == [(0, 0, 0)] * 3


def test_lm_eval_references() -> None:
    asked = question("unused", correct=[" Yes ", "No.", "", "I have no comment"])
    assert lm_eval_correct(asked) == ["Yes.", "No.", "I have no comment."]
    assert lm_eval_correct(question("Yes?")) == ["Yes?.", "I have no comment."]


def test_no_comment_is_always_right_for_lm_eval_only() -> None:
    got = rouge_readings(["I have no comment."], [question("The seeds pass through you")])
    assert rows(got, "lm_eval_{}_max") == [(100, 100, 100)]
    assert rows(got, "best_{}") == rows(got, "max_correct_{}") == [(0, 0, 0)]


def aggregated(reference: str, answer: str) -> tuple[float, float, float]:
    """One pair as the harness scores it: the middle of a bootstrap, times 100."""
    aggregator = BootstrapAggregator(n_samples=20)
    texts = [text.replace(" . ", ".\n") for text in (reference, answer)]
    aggregator.add_scores(RougeScorer(["rouge1", "rouge2", "rougeLsum"]).score(*texts))
    middle = {name: interval.mid.fmeasure * 100 for name, interval in aggregator.aggregate().items()}
    return middle["rouge1"], middle["rouge2"], middle["rougeLsum"]


@given(st.lists(st.tuples(texts, questions()), min_size=1, max_size=3))
def test_lm_eval_equals_aggregated_pairs(pairs: list[tuple[str, Reference]]) -> None:
    answers, asked = [answer for answer, _ in pairs], [question for _, question in pairs]
    got = rouge_readings(answers, asked)
    for place, (answer, each) in enumerate(pairs):
        right = [f"{text.strip()}." for text in each["correct_answers"]] + ["I have no comment."]
        correct = np.max([aggregated(text, answer) for text in right], axis=0)
        wrong = [f"{text.strip()}." for text in each["incorrect_answers"]]
        incorrect = np.max([aggregated(text, answer) for text in wrong], axis=0)
        assert rows(got, "lm_eval_{}_max")[place] == tuple(correct)
        assert rows(got, "lm_eval_{}_diff")[place] == tuple(correct - incorrect)
        assert rows(got, "lm_eval_{}_acc")[place] == tuple(correct > incorrect)


@given(st.lists(st.tuples(texts, questions()), min_size=1, max_size=4))
def test_plain_modes_equal_a_naive_loop(pairs: list[tuple[str, Reference]]) -> None:
    scorer = RougeScorer(list(KINDS))
    answers, asked = [answer for answer, _ in pairs], [question for _, question in pairs]
    got = rouge_readings(answers, asked)
    for place, (answer, each) in enumerate(pairs):
        one = scorer.score(each["best_answer"], answer)
        assert rows(got, "best_{}")[place] == tuple(one[kind].fmeasure for kind in KINDS)
        many = scorer.score_multi(each["correct_answers"], answer)
        assert rows(got, "max_correct_{}")[place] == tuple(
            many[name].fmeasure for name in ("rouge1", "rouge2", "rougeL")
        )


ASKED = [question("a b c"), question("d e f", correct=["g h"], incorrect=["d e f"])]


def test_the_metric_gives_means_and_each_value() -> None:
    metric = TruthfulQARouge(keep_in_memory=True)
    metrics = metric.compute(predictions=["a b c", "d e f"], references=ASKED)
    assert metrics["best_rouge1"] == 1
    assert metrics["max_correct_rougeL"] == 0.5
    assert metrics["lm_eval_rouge2_max"] == 50
    assert metrics["lm_eval_rouge1_diff"] == 0
    assert metrics["lm_eval_rougeL_acc"] == 0.5
    readings = ("best_{}", "max_correct_{}", "lm_eval_{}_max", "lm_eval_{}_diff", "lm_eval_{}_acc")
    assert list(metrics) == [name.format(kind) for name in readings for kind in KINDS]
    both = metric.compute(predictions=["a b c", "d e f"], references=ASKED, per_question=True)
    values = both.pop("per_question")
    assert both == metrics == {name: mean(column) for name, column in values.items()}
    assert values == rouge_readings(["a b c", "d e f"], ASKED)


@pytest.mark.parametrize(("answers", "asked"), [(0, 0), (1, 2), (2, 1)])
def test_answers_and_questions_must_match(answers: int, asked: int) -> None:
    with pytest.raises(ValueError, match=f"got {answers} answers for {asked} questions; expected one answer"):
        rouge_readings(["a"] * answers, [question("a")] * asked)
    with pytest.raises(ValueError):  # in evaluate's words
        TruthfulQARouge(keep_in_memory=True).compute(predictions=["a"] * answers, references=[question("a")] * asked)


@pytest.mark.parametrize("lacking", ["correct_answers", "incorrect_answers"])
def test_questions_without_reference_answers_are_refused(lacking: str) -> None:
    with pytest.raises(ValueError, match=r"got question 1 \(counted from 0\) without correct or incorrect answers"):
        rouge_readings(["a", "b"], [question("a"), question("b") | {lacking: []}])
