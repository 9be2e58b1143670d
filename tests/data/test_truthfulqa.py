"""TruthfulQA: loading, splitting, prompts, training examples and decoding, with tokenizers made here."""

import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from klas_hf.data import truthfulqa
from klas_hf.data.truthfulqa import (
    Question,
    decode_answer,
    degenerate_answers,
    encode_completion,
    load_truthfulqa,
    prompt_ids,
    split_questions,
)

COLUMNS = ["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source"]
ROWS = [
    [
        "Adversarial",
        "Food",
        "What if you eat seeds? ",
        " Nothing",
        "Nothing; They pass ;",
        "You grow;You die",
        "url",
    ],
    ["Adversarial", "Law", 'Is "it", here, legal?', "No, it is not", "No; No, it is not", "Yes; ", "url"],
]
LOADED = [
    Question("What if you eat seeds?", "Nothing", ("Nothing", "They pass"), ("You grow", "You die"), "Food", 0),
    Question('Is "it", here, legal?', "No, it is not", ("No", "No, it is not"), ("Yes",), "Law", 1),
]

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


def write(path: Path, rows: list[list[str]], columns: list[str] = COLUMNS, encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def test_load_csv(tmp_path: Path) -> None:
    assert load_truthfulqa(write(tmp_path / "data.csv", ROWS)) == LOADED


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_load_csv_finds_columns_by_name(tmp_path: Path, encoding: str) -> None:
    needed = [column for column in reversed(COLUMNS) if column not in ("Type", "Source")]
    rows = [[row[COLUMNS.index(column)] for column in needed] for row in ROWS]
    path = write(tmp_path / "data.csv", rows, needed, encoding)
    assert load_truthfulqa(path) == load_truthfulqa(str(path)) == LOADED


def test_missing_columns_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv", [["a", "b", "c"]], ["question", "Best Answer", "Category"])
    missing = "without the columns 'Question', 'Correct Answers', 'Incorrect Answers'"
    with pytest.raises(ValueError, match=f"data.csv {missing}; found 'question', 'Best Answer', 'Category'"):
        load_truthfulqa(path)


def test_empty_files(tmp_path: Path) -> None:
    empty = tmp_path / "empty.csv"
    empty.touch()
    with pytest.raises(ValueError, match=r"without the columns 'Question', .*found none"):
        load_truthfulqa(empty)
    with pytest.raises(ValueError, match=r"header\.csv, which holds no question; expected at least one row"):
        load_truthfulqa(write(tmp_path / "header.csv", []))


@pytest.mark.parametrize("column", ["Question", "Best Answer", "Correct Answers", "Incorrect Answers"])
@pytest.mark.parametrize("blank", ["", " ", None])
def test_rows_without_an_answer_are_named(tmp_path: Path, column: str, blank: str | None) -> None:
    row = list(ROWS[1])
    if blank is None and column == "Incorrect Answers":
        row = row[: COLUMNS.index(column)]  # a short row
    else:
        row[COLUMNS.index(column)] = blank or " ; " * (column.endswith("Answers"))
    path = write(tmp_path / "data.csv", [ROWS[0], row])
    with pytest.raises(ValueError, match=f"data.csv with nothing under '{column}' in row 2 "):
        load_truthfulqa(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent.csv', which is not a file; expected a CSV"):
        load_truthfulqa(tmp_path / "absent.csv")
    with pytest.raises(FileNotFoundError, match="not a file"):
        load_truthfulqa(tmp_path)
    latin = write(tmp_path / "latin.csv", [["É"] * len(COLUMNS)], encoding="latin-1")
    with pytest.raises(ValueError, match=r"latin\.csv, which is not UTF-8 .* expected a CSV file saved as UTF-8"):
        load_truthfulqa(latin)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that `datasets` reads as it reads the Hub's repository, instead of that."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub"
    monkeypatch.setattr(truthfulqa, "HUB_DATASET", str(folder))
    (folder / "generation").mkdir(parents=True)
    files = [{"split": "validation", "path": "generation/validation.jsonl"}]
    card = {"configs": [{"config_name": "generation", "data_files": files}]}
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    return folder


def write_hub(folder: Path, **changes: str) -> None:
    keys = [changes.get(column, column.lower().replace(" ", "_")) for column in COLUMNS]
    rows = [
        {key: value.split(";") if key.endswith("answers") else value for key, value in zip(keys, row, strict=True)}
        for row in ROWS
    ]
    (folder / "generation" / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_load_from_the_hub(hub: Path) -> None:
    write_hub(hub)
    assert load_truthfulqa() == LOADED


def test_hub_columns_are_checked(hub: Path) -> None:
    write_hub(hub, Question="prompt")
    with pytest.raises(ValueError, match=r"the Hub dataset .* without the columns 'question'; found .*'prompt'"):
        load_truthfulqa()


def test_hub_without_the_config_is_refused(hub: Path) -> None:
    write_hub(hub)
    (hub / "README.md").unlink()
    with pytest.raises(OSError, match=r"config generation, split validation.* pass a local copy with --data"):
        load_truthfulqa()


def test_offline_says_what_was_wanted_and_how_to_go_on(tmp_path: Path) -> None:
    code = "from klas_hf.data.truthfulqa import load_truthfulqa; load_truthfulqa()"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("OSError: could not load the dataset truthfulqa/truthful_qa (config generation")
    assert "unset HF_HUB_OFFLINE, or pass a local copy with --data file.csv" in last


def numbered(count: int) -> list[Question]:
    return [Question(f"{index}?", "a", ("a",), ("b",), "", index) for index in range(count)]


def test_split_has_the_papers_sizes_and_comes_from_the_seed_alone() -> None:
    questions = numbered(817)
    train, test = split_questions(questions, seed=0)
    assert (len(train), len(test)) == (490, 327)
    global_state = random.getstate()
    assert split_questions(questions, seed=0) == (train, test)
    assert random.getstate() == global_state
    assert split_questions(questions, seed=1) != (train, test)


def test_split_is_the_same_everywhere() -> None:
    # random.Random(0).random() begins .844, .758, .421, .259, .511: Python documents the sequence as stable.
    train, test = split_questions(numbered(5), seed=0)
    assert [question.index for question in train] == [2, 3, 4]
    assert [question.index for question in test] == [0, 1]


@given(st.integers(2, 60), st.integers(), st.floats(0.01, 0.99))
def test_split_is_a_partition_in_order(count: int, seed: int, fraction: float) -> None:
    questions = numbered(count)
    if not 0 < round(fraction * count) < count:
        with pytest.raises(ValueError, match=f"got {count} questions and train_fraction="):
            split_questions(questions, seed=seed, train_fraction=fraction)
        return
    train, test = split_questions(questions, seed=seed, train_fraction=fraction)
    assert len(train) == round(fraction * count)
    for part in (train, test):
        assert part == sorted(part, key=lambda question: question.index)
    assert sorted(train + test, key=lambda question: question.index) == questions


def test_every_question_is_held_out_for_some_seed_about_two_times_in_five() -> None:
    held_out = [0] * 10
    for seed in range(500):
        for question in split_questions(numbered(10), seed=seed)[1]:
            held_out[question.index] += 1
    assert all(150 < count < 250 for count in held_out)  # binomial, 200 ± 11


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


def test_degenerate_answers() -> None:
    assert degenerate_answers(LOADED) == {
        "first_correct": ["Nothing", "No"],
        "first_incorrect": ["You grow", "Yes"],
        "echo_question": ["What if you eat seeds?", 'Is "it", here, legal?'],
        "no_comment": ["I have no comment.", "I have no comment."],
        "empty": ["", ""],
    }
