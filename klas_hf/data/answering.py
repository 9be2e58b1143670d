"""Asking a causal language model the questions of TruthfulQA: prompts, training examples, answers.

Training is on the best answer, as the next tokens after the prompt.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from klas_hf.data.truthfulqa import Question
from klas_hf.evaluation import Measurement, generate_greedily
from klas_hf.evaluation.answers import score_answers
from klas_hf.training.data import IGNORED

# Some templates (Llama 3.2, SmolLM3, Mistral) print the day of the run into the prompt, and a run resumed
# after midnight would see other data. A macro of the name that they call takes precedence over the clock.
_FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}{{- '' }}"


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
        What `score_answers` gives, and the questions' indices in the details.
    """
    prompts = [prompt_ids(question, tokenizer) for question in questions]
    generated = generate_greedily(model, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    eos = model.generation_config.eos_token_id
    eos_ids = set(eos) if isinstance(eos, list) else {eos}
    answers = [decode_answer(ids, tokenizer, eos_ids) for ids in generated]
    scored = score_answers(answers, [question.references for question in questions])
    return replace(scored, details={"questions": [question.index for question in questions], **scored.details})


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
