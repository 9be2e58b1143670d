"""Measuring a model on TruthfulQA: answers by greedy decoding, ROUGE per question, rules compared in pairs."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from klas_hf.data.rouge import score_answers
from klas_hf.data.truthfulqa import Question, decode_answer, prompt_ids
from klas_hf.evaluation import Measurement, generate_greedily
from klas_hf.maths.bootstrap import BootstrapResult, paired_bootstrap
from klas_hf.rows import ResultRow

PER_QUESTION = ("rouge1", "rouge2", "rougeL")


def measure_answers(
    model: PreTrainedModel,
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
) -> Measurement:
    """Answer questions greedily and score the answers.

    Args:
        model: a causal language model; its generation config gives the EOS tokens.
        questions: the held-out part.
        max_new_tokens: longest answer in tokens.
        batch_size: questions per batch and process.

    Returns:
        Means under all reference modes; in the details the answers, the questions' indices and the ROUGE of each
        answer against the best one, for paired comparisons.
    """
    prompts = [prompt_ids(question, tokenizer) for question in questions]
    generated = generate_greedily(model, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    eos = model.generation_config.eos_token_id
    eos_ids = set(eos) if isinstance(eos, list) else {eos}
    answers = [decode_answer(ids, tokenizer, eos_ids) for ids in generated]
    return measured(answers, questions)


def measured(answers: Sequence[str], questions: Sequence[Question]) -> Measurement:
    """Scores of given answers, laid out as `measure_answers` does."""
    scores = score_answers(answers, questions)
    best = {"rouge1": scores.best.rouge1, "rouge2": scores.best.rouge2, "rougeL": scores.best.rouge_l}
    details = {
        "questions": [question.index for question in questions],
        "answers": list(answers),
        "per_question": {name: [round(value, 6) for value in best[name]] for name in PER_QUESTION},
    }
    return Measurement(scores.metrics(), details)


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
