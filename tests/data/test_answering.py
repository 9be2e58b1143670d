"""Asking a model the questions of TruthfulQA: prompts, training examples and decoding, with tokenizers made here."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from klas_hf.data.answering import decode_answer, encode_completion, measure_answers, prompt_ids
from klas_hf.data.text import train_tokenizer
from klas_hf.data.truthfulqa import Question
from klas_hf.evaluation.answers import score_answers

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TWO_LINES = CHAT.replace("{{ m.role }}\n", "{{ m.role }}\n\n").replace("assistant\n", "assistant\n\n")
DATED = "{{ bos_token }}{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') + '\n' }}{% endif %}" + CHAT
THINKING = (  # of the shape of Qwen3's: an answered turn carries an empty thought
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
OPENS_A_THOUGHT = CHAT.replace("assistant\n", "assistant\n<think>\n")


def make_tokenizer(
    template: str | None = None, wrap: str | None = None, eos: str | None = "<|im_end|>"
) -> PreTrainedTokenizerFast:
    """Bytes as tokens, and one merge: two new lines are one token, as in GPT-2's vocabulary."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate([*letters, "ĊĊ", "<s>", "<|im_end|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if wrap is not None:
        specials = [(token, vocabulary[token]) for token in ("<s>", "<|im_end|>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=wrap, special_tokens=specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=eos,
        extra_special_tokens=["<|im_start|>"],
        chat_template=template,
    )


def make_spaced_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Characters as tokens, and a space in front of every text, as in Llama 2's vocabulary."""
    letters = [*map(chr, range(32, 127)), "\n", "▁", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=template)


def ask(question: str = "Why?", answer: str = "Because.") -> Question:
    return Question(question, answer, (answer,), ("Never",), "", 7)


def text_of(ids: Any, tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.decode(ids))


QUESTIONS = [
    Question(f"What is {word}?", f"It is a {word}", (f"It is a {word}",), (f"No {word}",), "Words", index)
    for index, word in enumerate(["cat", "dog", "tree", "stone", "river"])
]


def test_answers_are_the_models_own() -> None:
    tokenizer = train_tokenizer([q.question + " " + q.best_answer for q in QUESTIONS], 300)
    model = tiny_model(seed=4, vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id]
    measured = measure_answers(model, QUESTIONS, tokenizer, max_new_tokens=5, batch_size=2)
    answers = []
    for question in QUESTIONS:
        ids = prompt_ids(question, tokenizer)
        out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=5, pad_token_id=0)[0, len(ids) :]
        answers.append(decode_answer(out.tolist(), tokenizer, {tokenizer.eos_token_id}))
    assert measured.details["answers"] == answers
    assert measured.metrics == score_answers(answers, [question.references for question in QUESTIONS]).metrics
    assert measured.details["questions"] == [0, 1, 2, 3, 4]
    assert np.mean(measured.details["per_question"]["rouge1"]) == pytest.approx(
        measured.metrics["best_rouge1"], abs=1e-5
    )


def test_plain_prompt_and_completion() -> None:
    tokenizer = make_tokenizer()
    prompt = tokenizer.encode("Q: Why?\nA:")
    answer = [*tokenizer.encode(" Because."), tokenizer.eos_token_id]
    assert prompt_ids(ask(), tokenizer) == prompt
    example = encode_completion(ask(), tokenizer)
    assert example == {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


@pytest.mark.parametrize("wrap", ["<s> $A", "<s> $A <|im_end|>"])
def test_plain_prompt_keeps_bos_and_is_never_closed_by_eos(wrap: str) -> None:
    bare, wrapping = make_tokenizer(), make_tokenizer(wrap=wrap)
    bos = wrapping.bos_token_id
    assert prompt_ids(ask(), wrapping) == [bos, *prompt_ids(ask(), bare)]
    assert encode_completion(ask(), wrapping)["input_ids"] == [
        bos,
        *encode_completion(ask(), bare)["input_ids"],
    ]


@pytest.mark.parametrize("wrap", [None, "<s> $A"])
@pytest.mark.parametrize("template", [CHAT, "\n" + CHAT])
def test_chat_prompt_and_completion_are_the_templates(template: str, wrap: str | None) -> None:
    tokenizer = make_tokenizer(template, wrap)
    user, assistant = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template([user, assistant], return_dict=False)
    assert prompt_ids(ask(), tokenizer) == prompt
    example = encode_completion(ask(), tokenizer)
    assert example["input_ids"] == whole
    assert example["labels"] == [-100] * len(prompt) + whole[len(prompt) :]
    assert text_of(whole[len(prompt) :], tokenizer) == "Because.<|im_end|>\n"


def test_answer_is_tokenised_in_its_place_where_that_changes_nothing_before_it() -> None:
    tokenizer = make_spaced_tokenizer(CHAT.replace("<|im_start|>", "# "))
    example = encode_completion(ask(), tokenizer)
    learned = tokenizer.convert_ids_to_tokens([label for label in example["labels"] if label != -100])
    assert learned == [*"Because.", "<|im_end|>", "\n"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("Because."))[0] == "▁"


def test_answer_is_tokenised_by_itself_where_it_would_change_the_prompts_last_token() -> None:
    tokenizer = make_tokenizer(TWO_LINES)
    user, assistant = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template([user, assistant], return_dict=False)
    assert whole[: len(prompt)] != prompt  # the two new lines are one token only at the end of a text
    example = encode_completion(ask(), tokenizer)
    assert example["input_ids"] == prompt + tokenizer.encode("Because.<|im_end|>\n")
    assert example["labels"][: len(prompt)] == [-100] * len(prompt)
    assert -100 not in example["labels"][len(prompt) :]


def test_thinking_is_switched_off_on_both_sides() -> None:
    tokenizer = make_tokenizer(THINKING)
    assert text_of(prompt_ids(ask(), tokenizer), tokenizer).endswith("assistant\n<think>\n\n</think>\n\n")
    example = encode_completion(ask(), tokenizer)
    learned = [label for label in example["labels"] if label != -100]
    assert tokenizer.decode(learned) == "Because.<|im_end|>\n"


def test_prompts_do_not_depend_on_the_day() -> None:
    tokenizer = make_tokenizer(DATED)
    expected = "<s>26 Jul 2024\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(prompt_ids(ask(), tokenizer)) == expected
    assert tokenizer.decode(encode_completion(ask(), tokenizer)["input_ids"]) == (expected + "Because.<|im_end|>\n")


def test_a_template_whose_prompt_is_not_the_beginning_is_refused() -> None:
    tokenizer = make_tokenizer(OPENS_A_THOUGHT)
    assert text_of(prompt_ids(ask(), tokenizer), tokenizer).endswith("<think>\n")
    with pytest.raises(ValueError, match=r"expected the second to begin with the first.*chat_template"):
        encode_completion(ask(), tokenizer)


def test_plain_completion_needs_eos() -> None:
    tokenizer = make_tokenizer(eos=None)
    assert prompt_ids(ask(), tokenizer) == tokenizer.encode("Q: Why?\nA:")
    with pytest.raises(ValueError, match=r"tokenizer without EOS; expected .* Set tokenizer.eos_token"):
        encode_completion(ask(), tokenizer)


@pytest.mark.parametrize("template", [None, CHAT])
def test_labels_on_everything(template: str | None) -> None:
    tokenizer = make_tokenizer(template)
    masked, full = (encode_completion(ask(), tokenizer, completion_only=only) for only in (True, False))
    assert full["input_ids"] == masked["input_ids"] == full["labels"]
    assert full["labels"] is not full["input_ids"]


@pytest.mark.parametrize("template", [None, CHAT])
def test_long_examples_are_cut_at_the_end_but_never_to_the_prompt_alone(template: str | None) -> None:
    tokenizer = make_tokenizer(template)
    whole, size = encode_completion(ask(), tokenizer), len(prompt_ids(ask(), tokenizer))
    cut = encode_completion(ask(), tokenizer, size + 1)
    assert cut == {key: ids[: size + 1] for key, ids in whole.items()}
    assert [label for label in cut["labels"] if label != -100] == whole["input_ids"][size : size + 1]
    message = f"max_length={size} and a prompt of {size} tokens for question 7 .*Raise max_length"
    with pytest.raises(ValueError, match=message):
        encode_completion(ask(), tokenizer, size)


TOKENIZERS = {name: make_tokenizer(text) for name, text in (("plain", None), ("chat", CHAT), ("two", TWO_LINES))}
stripped = st.text(min_size=1, max_size=30).map(str.strip).filter(bool)


@given(st.sampled_from(sorted(TOKENIZERS)), stripped, stripped)
def test_any_text_is_learned_as_it_will_be_generated(kind: str, question: str, answer: str) -> None:
    tokenizer = TOKENIZERS[kind]
    asked = ask(question, answer)
    example, prompt = encode_completion(asked, tokenizer, 10_000), prompt_ids(asked, tokenizer)
    assert example["input_ids"][: len(prompt)] == prompt
    completion = example["input_ids"][len(prompt) :]
    assert example["labels"] == [-100] * len(prompt) + completion
    assert decode_answer(completion, tokenizer, [tokenizer.eos_token_id]) == answer


def test_decode_stops_at_the_first_of_several_eos() -> None:
    tokenizer = make_tokenizer()
    start, end = (tokenizer.get_vocab()[token] for token in ("<|im_start|>", "<|im_end|>"))
    ids = [*tokenizer.encode(" yes "), start, *tokenizer.encode("no"), end, *tokenizer.encode("more")]
    assert decode_answer(ids, tokenizer, [end]) == "yes no"
    assert decode_answer(ids, tokenizer, [start, end]) == "yes"
    assert decode_answer(torch.tensor(ids), tokenizer, {start, end}) == "yes"
    assert decode_answer(ids, tokenizer, []) == "yes nomore"
    assert decode_answer([end, *ids], tokenizer, [end]) == decode_answer([], tokenizer, [end]) == ""


@pytest.mark.parametrize("gap", ["\n", "\n\n", "\n  "])
def test_decode_cuts_a_question_of_the_models_own(gap: str) -> None:
    text = f"It is so. Q: is a letter.\nYes.{gap}Q: Why?\nA: No"
    plain, chat = make_tokenizer(), make_tokenizer(CHAT)
    assert decode_answer(plain.encode(text), plain, []) == "It is so. Q: is a letter.\nYes."
    assert decode_answer(plain.encode(f"{gap}Q: Why?"), plain, []) == ""
    assert decode_answer(chat.encode(text), chat, []) == text
