"""Answers to questions: ROUGE per question, and rules compared in pairs."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from klas_hf.evaluation.models import Measurement
from klas_hf.evaluation.truthfulqa_rouge import KINDS, Reference, TruthfulQARouge
from klas_hf.maths.bootstrap import BootstrapResult, paired_bootstrap
from klas_hf.rows import ResultRow


def score_answers(answers: Sequence[str], references: Sequence[Reference]) -> Measurement:
    """ROUGE of one answer to each question; every process scores all of them.

    Returns:
        The metrics of `TruthfulQARouge`; in the details the answers, and each one's ROUGE against the best answer, for
        paired comparisons.

    Raises:
        ValueError: as the metric.
    """
    metric = TruthfulQARouge(keep_in_memory=True)
    found = metric.compute(predictions=list(answers), references=list(references), per_question=True)
    values = found.pop("per_question")
    best = {kind: [round(value, 6) for value in values[f"best_{kind}"]] for kind in KINDS}
    return Measurement(found, {"answers": list(answers), "per_question": best})


def compare_rules(
    ours: Mapping[int, Sequence[ResultRow]], theirs: Mapping[int, Sequence[ResultRow]], metric: str = "rouge1"
) -> BootstrapResult:
    """Mean ROUGE of one rule's stitches less that of another's, on the same questions, over several split seeds.

    Each question's score is averaged over a rule's sizes; whole questions are resampled, because one question may be
    held out under several seeds.

    Args:
        ours, theirs: split seed → rows of the rule, at matched sizes.
        metric: "rouge1", "rouge2" or "rougeL", against the best answer.
    """
    a, b, clusters = [], [], []
    for seed in sorted(ours.keys() & theirs.keys()):
        a += _mean_per_question(ours[seed], metric)
        b += _mean_per_question(theirs[seed], metric)
        clusters += list(ours[seed][0].details["questions"])
    return paired_bootstrap(a, b, clusters=clusters)


def _mean_per_question(rows: Sequence[ResultRow], metric: str) -> list[float]:
    return [fmean(values) for values in zip(*(row.details["per_question"][metric] for row in rows), strict=True)]
