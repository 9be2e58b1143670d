"""ROUGE under the three modes: against values worked out by hand, and naive loops over the library."""

from collections.abc import Callable
from statistics import mean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.scoring import BootstrapAggregator

from klas_hf.data.rouge import (
    RougeMeans,
    RougeScores,
    lm_eval_correct,
    rouge_best,
    rouge_lm_eval,
    rouge_max_correct,
    score_answers,
)
from klas_hf.data.truthfulqa import Question

WORDS = ["cats", "cat", "see", "the", "No", "comment", "I", "have", ".", " . ", "\n", "1952", "don't"]
texts = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
references = st.lists(st.sampled_from(WORDS[:8]), min_size=1, max_size=7).map(" ".join)


@st.composite
def questions(draw: st.DrawFn) -> Question:
    correct = draw(st.lists(references, min_size=1, max_size=3))
    incorrect = draw(st.lists(references, min_size=1, max_size=3))
    return Question("Why?", correct[0], tuple(correct), tuple(incorrect), "", 0)


def question(best: str, correct: tuple[str, ...] | None = None, incorrect: tuple[str, ...] = ("zzz",)) -> Question:
    return Question("Why?", best, (best,) if correct is None else correct, incorrect, "", 0)


def rows(scores: RougeScores) -> list[tuple[float, float, float]]:
    return list(zip(scores.rouge1, scores.rouge2, scores.rouge_l, strict=True))


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
    assert rows(rouge_best([answer], [question(reference, correct=("other",))])) == [pytest.approx(expected)]


def test_max_correct_takes_each_maximum_by_itself() -> None:
    asked = question("none of it", correct=("d c b a e f g h", "a b", "x"))
    got = rouge_max_correct(["a b c d"], [asked])
    # ROUGE-1 is best at the first (precision 1, recall 1/2 → 2/3; as the second's), ROUGE-2 at the second.
    assert rows(got) == [pytest.approx((2 / 3, 1 / 2, 2 / 3))]
    assert rouge_best(["a b c d"], [asked]).means == RougeMeans(0, 0, 0)


def test_lm_eval_by_hand() -> None:
    asked = question("unused", correct=("a b c d", "x y"), incorrect=("a b", "q."))
    got = rouge_lm_eval(["c d\na b"], [asked])
    # Each line of the answer is in order in "a b c d.", so rougeLsum is whole where ROUGE-L is 1/2.
    assert rows(got.max) == [pytest.approx((100, 200 / 3, 100))]
    # "a b": precision 1/2 and recall 1; bigrams 1 of 3 and 1 of 1; rougeLsum as ROUGE-1.
    assert rows(got.diff) == [pytest.approx((100 - 200 / 3, 200 / 3 - 50, 100 - 200 / 3))]
    assert rows(got.acc) == [(1, 1, 1)]


def test_lm_eval_splits_sentences_at_spaced_periods() -> None:
    asked = question("unused", correct=("a b c d",))
    assert rouge_lm_eval(["c d . a b"], [asked]).max.rouge_l == pytest.approx((100,))
    assert rouge_lm_eval(["c d. a b"], [asked]).max.rouge_l == pytest.approx((50,))
    assert rouge_lm_eval(["a b c d"], [question("c d . a b")]).max.rouge_l == pytest.approx((100,))
    assert rouge_lm_eval(["a b c d"], [question("c d. a b")]).max.rouge_l == pytest.approx((50,))


def test_lm_eval_ties_are_not_accurate() -> None:
    asked = question("a b", incorrect=("a b",))
    got = rouge_lm_eval(["a b", "nothing", ""], [asked] * 3)
    assert rows(got.acc) == [(0, 0, 0)] * 3
    assert rows(got.diff) == [(0, 0, 0)] * 3


def test_lm_eval_references() -> None:
    asked = question("unused", correct=(" Yes ", "No.", "", "I have no comment"))
    assert lm_eval_correct(asked) == ("Yes.", "No.", "I have no comment.")
    assert lm_eval_correct(question("Yes?")) == ("Yes?.", "I have no comment.")


def test_no_comment_is_always_right_for_lm_eval_only() -> None:
    scores = score_answers(["I have no comment."], [question("The seeds pass through you")])
    assert scores.lm_eval.max.means == RougeMeans(100, 100, 100)
    assert scores.best.means == scores.max_correct.means == RougeMeans(0, 0, 0)


def aggregated(reference: str, answer: str) -> tuple[float, float, float]:
    """One pair as the harness scores it: the middle of a bootstrap, times 100."""
    aggregator = BootstrapAggregator(n_samples=20)
    texts = [text.replace(" . ", ".\n") for text in (reference, answer)]
    aggregator.add_scores(RougeScorer(["rouge1", "rouge2", "rougeLsum"]).score(*texts))
    middle = {name: interval.mid.fmeasure * 100 for name, interval in aggregator.aggregate().items()}
    return middle["rouge1"], middle["rouge2"], middle["rougeLsum"]


@given(st.lists(st.tuples(texts, questions()), min_size=1, max_size=3))
def test_lm_eval_equals_aggregated_pairs(pairs: list[tuple[str, Question]]) -> None:
    answers, asked = [answer for answer, _ in pairs], [question for _, question in pairs]
    got = rouge_lm_eval(answers, asked)
    for place, (answer, each) in enumerate(pairs):
        right = [f"{text.strip()}." for text in each.correct_answers] + ["I have no comment."]
        correct = np.max([aggregated(text, answer) for text in right], axis=0)
        wrong = [f"{text.strip()}." for text in each.incorrect_answers]
        incorrect = np.max([aggregated(text, answer) for text in wrong], axis=0)
        assert rows(got.max)[place] == tuple(correct)
        assert rows(got.diff)[place] == tuple(correct - incorrect)
        assert rows(got.acc)[place] == tuple(correct > incorrect)


@given(st.lists(st.tuples(texts, questions()), min_size=1, max_size=4))
def test_plain_modes_equal_a_naive_loop(pairs: list[tuple[str, Question]]) -> None:
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    answers, asked = [answer for answer, _ in pairs], [question for _, question in pairs]
    best, highest = rouge_best(answers, asked), rouge_max_correct(answers, asked)
    for place, (answer, each) in enumerate(pairs):
        one = scorer.score(each.best_answer, answer)
        assert rows(best)[place] == tuple(one[name].fmeasure for name in ("rouge1", "rouge2", "rougeL"))
        many = scorer.score_multi(each.correct_answers, answer)
        assert rows(highest)[place] == tuple(many[name].fmeasure for name in ("rouge1", "rouge2", "rougeL"))


def test_means_and_metrics() -> None:
    asked = [question("a b c"), question("d e f", correct=("g h",), incorrect=("d e f",))]
    scores = score_answers(["a b c", "d e f"], asked)
    assert scores.best.rouge2 == (1, 1)
    metrics = scores.metrics()
    assert metrics["best_rouge1"] == mean(scores.best.rouge1) == 1
    assert metrics["max_correct_rougeL"] == mean(scores.max_correct.rouge_l) == 0.5
    assert metrics["lm_eval_rouge2_max"] == 50
    assert metrics["lm_eval_rouge1_diff"] == 0
    assert metrics["lm_eval_rougeL_acc"] == 0.5
    modes = ("best_{}", "max_correct_{}", "lm_eval_{}_max", "lm_eval_{}_diff", "lm_eval_{}_acc")
    assert list(metrics) == [mode.format(name) for mode in modes for name in ("rouge1", "rouge2", "rougeL")]


@pytest.mark.parametrize("score", [rouge_best, rouge_max_correct, rouge_lm_eval, score_answers])
@pytest.mark.parametrize(("answers", "asked"), [(0, 0), (1, 2), (2, 1)])
def test_answers_and_questions_must_match(score: Callable[..., object], answers: int, asked: int) -> None:
    with pytest.raises(ValueError, match=f"got {answers} answers for {asked} questions; expected one answer"):
        score(["a"] * answers, [question("a")] * asked)
