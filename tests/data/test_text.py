"""Text as sequences: nothing is lost, nothing is shared between texts, every sequence begins with BOS."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klas_hf.data.text import (
    TextBatches,
    check_vocabulary,
    held_out,
    python_documentation,
    text_examples,
    text_sequences,
    text_windows,
    train_tokenizer,
)

TEXTS = ["The quick brown fox jumps over the lazy dog. " * 8, "Stitched models interpolate between anchors. " * 5, "x"]
TOKENIZER = train_tokenizer(TEXTS, 300)


@given(length=st.integers(4, 40))
def test_sequences_hold_the_texts(length: int) -> None:
    sequences = text_sequences(TEXTS, TOKENIZER, length)
    bos = TOKENIZER.bos_token_id
    assert all(sequence[0] == bos and 3 <= len(sequence) <= length for sequence in sequences)
    whole = TOKENIZER.decode([token for sequence in sequences for token in sequence[1:]])
    lost = sum(map(len, TEXTS)) - len(whole)
    assert 0 <= lost <= 2 * max(map(len, TOKENIZER.get_vocab()))  # at most a last single token of each text


def test_tokenizer_gives_any_text_back() -> None:
    for text in ("naïve café — 東京 🙂\n\ttabs", TEXTS[0]):
        assert TOKENIZER.decode(TOKENIZER(text, add_special_tokens=False)["input_ids"]) == text


@given(length=st.integers(2, 40), count=st.one_of(st.none(), st.integers(1, 5)))
def test_windows_are_the_text_without_its_end(length: int, count: int | None) -> None:
    text = " ".join(TEXTS)
    ids = TOKENIZER(text)["input_ids"]
    windows = text_windows(text, TOKENIZER, length, count=count)
    assert {len(window) for window in windows} == {length}
    assert sum(windows, []) == ids[: length * len(windows)]
    assert len(windows) == min(len(ids) // length, count or len(ids))


def test_windows_need_text_enough() -> None:
    with pytest.raises(ValueError, match=r"got a text of \d+ tokens; expected 90 at least"):
        text_windows("The fox", TOKENIZER, 90)
    with pytest.raises(ValueError, match="at least 2 tokens and 1 window"):
        text_windows("The fox", TOKENIZER, 1)


def test_batches_are_padded_and_repeatable() -> None:
    batches = TextBatches([[1, 5, 6], [1, 7], [1, 8, 9, 10]], batch_size=2)
    first, second = list(batches)
    assert len(batches) == 2
    assert first["input_ids"].tolist() == [[1, 5, 6], [1, 7, 0]]
    assert first["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert first["labels"].tolist() == [[1, 5, 6], [1, 7, -100]]
    assert second["input_ids"].tolist() == [[1, 8, 9, 10]]
    assert [batch["input_ids"].tolist() for batch in batches] == [
        first["input_ids"].tolist(),
        second["input_ids"].tolist(),
    ]
    assert text_examples([[1, 2]]) == [{"input_ids": [1, 2], "labels": [1, 2]}]


def test_python_carries_its_documentation() -> None:
    texts = python_documentation()
    assert sum(map(len, texts)) > 500_000
    assert any(
        "The “for” statement is used to iterate" in text or 'The "for" statement is used to iterate' in text
        for text in texts
    )
    train, test = held_out(texts)
    assert len(test) == -(-len(texts) // 10)
    assert sorted(train + test) == sorted(texts)


def test_what_is_no_text_or_no_sequences_is_refused() -> None:
    tokenizer = train_tokenizer(["some text", "and more of it"], 300)
    with pytest.raises(TypeError, match=r"got one string; expected several texts"):
        text_sequences("one text", tokenizer, 8)
    with pytest.raises(TypeError, match="type int; expected strings"):
        text_sequences([3], tokenizer, 8)  # type: ignore[list-item]
    for wrong in (["a text"], [[0.5, 1.0]], [3, 4]):
        with pytest.raises(TypeError, match=r"sequence 0 of type .*text_sequences"):
            TextBatches(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no sequences"):
        TextBatches([])
    with pytest.raises(ValueError, match="sequence 1 without a token"):
        TextBatches([[1, 2], []])
    with pytest.raises(ValueError, match="batch_size=0"):
        TextBatches([[1, 2]], 0)


def test_at_most_so_many_sequences_evenly_spread() -> None:
    batches = TextBatches([[n, n] for n in range(10)], batch_size=2, count=4)
    assert [example["input_ids"][0] for example in batches.examples] == [0, 2, 5, 7] and len(batches) == 2
    assert len(TextBatches([[1, 2]], count=4).examples) == 1


def test_ids_beyond_the_vocabulary() -> None:
    check_vocabulary([[0, 9]], 10)
    with pytest.raises(ValueError, match="token id 10 for a model with a vocabulary of 10; expected ids from 0 to 9"):
        check_vocabulary([[0], [10]], 10)
