"""The converter of llama2.c checkpoints, against llama2.c's forward and encoder written out again here."""

from __future__ import annotations

import importlib.util
import math
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "stories260k.py"
WORDS = ["he", "the", " the", "th", "er", "aa", "aaaa", "aaa", "aba", "ab", "ba", "\n\n", "éé", "nk", "unk"]
LETTERS = [*" abehknrtuxX.\né“<>/s0"]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("stories260k", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


script = load_script()


# ---- llama2.c's files and encoder, written and read the plain way


def pieces_of(words: list[str]) -> list[tuple[str, float]]:
    """A vocabulary as in llama2.c's files: specials, bytes, then words by falling score."""
    fixed = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    return [(text, 0.0) for text in fixed] + [(text, -float(rank)) for rank, text in enumerate(words, start=1)]


def write_tokenizer(path: Path, pieces: list[tuple[str, float]]) -> Path:
    encoded = [(text.encode(), score) for text, score in pieces]
    longest = max(len(text) for text, _ in encoded)
    parts = [struct.pack("<fi", score, len(text)) + text for text, score in encoded]
    path.write_bytes(struct.pack("<i", longest) + b"".join(parts))
    return path


def naive_encode(pieces: list[tuple[str, float]], text: str) -> list[int]:
    """run.c's encode(): BOS, a space, characters or their bytes; then merge the best pair, over and over."""
    index = {piece: number for number, (piece, _) in enumerate(pieces)}
    tokens = [index[" "]] if text else []
    for character in text:
        tokens += [index[character]] if character in index else [byte + 3 for byte in character.encode()]
    while True:
        best_score, best_id, best_at = -1e10, -1, -1
        for at in range(len(tokens) - 1):
            union = index.get(pieces[tokens[at]][0] + pieces[tokens[at + 1]][0], -1)
            if union != -1 and pieces[union][1] > best_score:
                best_score, best_id, best_at = pieces[union][1], union, at
        if best_id == -1:
            return [1, *tokens]
        tokens[best_at : best_at + 2] = [best_id]


PIECES = pieces_of(WORDS + LETTERS)
VOCAB = len(PIECES)
SHAPES = {  # dim 24, hidden 20, 3 layers, 6 heads of 4, 2 kv heads, context 16
    "tok_emb": (VOCAB, 24),
    "rms_att": (3, 24),
    "wq": (3, 24, 24),
    "wk": (3, 8, 24),
    "wv": (3, 8, 24),
    "wo": (3, 24, 24),
    "rms_ffn": (3, 24),
    "w1": (3, 20, 24),
    "w2": (3, 24, 20),
    "w3": (3, 20, 24),
    "rms_final": (24,),
    "freq_cis_real": (16, 2),
    "freq_cis_imag": (16, 2),
    "wcls": (VOCAB, 24),
}


def random_weights(tied: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {name: shape for name, shape in SHAPES.items() if not (tied and name == "wcls")}
    return {name: rng.normal(0.0, 0.5, shape).astype("<f4") for name, shape in shapes.items()}


def write_checkpoint(path: Path, weights: dict[str, np.ndarray]) -> Path:
    vocab = -VOCAB if "wcls" in weights else VOCAB
    header = struct.pack("<7i", 24, 20, 3, 6, 2, vocab, 16)
    path.write_bytes(header + b"".join(weight.tobytes() for weight in weights.values()))
    return path


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5)


def rotate(x: np.ndarray) -> np.ndarray:
    """x: (tokens, heads, head_dim); neighbours (2k, 2k + 1) turn by position * 10000 ** (-2k / head_dim)."""
    tokens, _, head_dim = x.shape
    out = np.empty_like(x)
    for position in range(tokens):
        for k in range(0, head_dim, 2):
            angle = position * 10000.0 ** (-k / head_dim)
            a, b = x[position, :, k], x[position, :, k + 1]
            out[position, :, k] = a * math.cos(angle) - b * math.sin(angle)
            out[position, :, k + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


def attention(x: np.ndarray, w: dict[str, np.ndarray], layer: int) -> np.ndarray:
    """x: (tokens, 24); head h reads key/value head h // 3, every token those before it and itself."""
    q = rotate((x @ w["wq"][layer].T).reshape(len(x), 6, 4))
    k = rotate((x @ w["wk"][layer].T).reshape(len(x), 2, 4))
    v = (x @ w["wv"][layer].T).reshape(len(x), 2, 4)
    out = np.empty_like(q)
    for head in range(6):
        for t in range(len(x)):
            scores = k[: t + 1, head // 3] @ q[t, head] / 2.0
            weights = np.exp(scores - scores.max())
            out[t, head] = (weights / weights.sum()) @ v[: t + 1, head // 3]
    return out.reshape(len(x), 24) @ w["wo"][layer].T


def naive_logits(weights: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """run.c's forward() over all positions, in float64: (tokens, vocabulary)."""
    w = {name: weight.astype(np.float64) for name, weight in weights.items()}
    x = w["tok_emb"][tokens]
    for layer in range(3):
        x = x + attention(rms_norm(x, w["rms_att"][layer]), w, layer)
        y = rms_norm(x, w["rms_ffn"][layer])
        gate = y @ w["w1"][layer].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["w3"][layer].T)) @ w["w2"][layer].T
    return rms_norm(x, w["rms_final"]) @ w.get("wcls", w["tok_emb"]).T


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "tok.bin", PIECES)


# ---- the model


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_llama2c(tmp_path: Path, tied: bool) -> None:
    weights = random_weights(tied)
    model = script.to_model(script.read_checkpoint(write_checkpoint(tmp_path / "model.bin", weights)))
    model.save_pretrained(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = [1, 260, 40, 7, 259, 265, 8, 100, 3, 270, 12]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens])).logits[0]
    np.testing.assert_allclose(logits, naive_logits(weights, tokens), atol=1e-4, rtol=1e-4)
    assert model.config.tie_word_embeddings is tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)


def test_files_of_the_wrong_size_raise_with_both_numbers(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.bin", random_weights(tied=True))
    whole = path.read_bytes()
    for raw in (whole[:-4], whole + b"\0"):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=f"has {len(raw):,} bytes.* asks for {len(whole):,}"):
            script.read_checkpoint(path)


@pytest.mark.parametrize(
    "header",
    [
        (0, 20, 3, 6, 2, 9, 16),  # no width
        (24, 20, -3, 6, 2, 9, 16),  # negative depth
        (24, 20, 3, 6, 4, 9, 16),  # heads not a multiple of kv heads
        (18, 20, 3, 6, 2, 9, 16),  # an odd head_dim has no pairs to rotate
        (24, 20, 3, 6, 2, 0, 16),  # no vocabulary
        (0x616B3432, 1, 64, 172, 5, 8, 4),  # llama2.c's version 1
    ],
)
def test_bad_headers_raise_with_their_values(tmp_path: Path, header: tuple[int, ...]) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(struct.pack("<7i", *header))
    with pytest.raises(ValueError, match=rf"is \({', '.join(map(str, header))}\).*--version 0"):
        script.read_checkpoint(path)


def test_a_header_of_huge_sizes_raises_before_allocating(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(struct.pack("<7i", 2**30, 2**30, 2**30, 2, 1, 2**30, 2**30))
    with pytest.raises(ValueError, match="has 28 bytes"):
        script.read_checkpoint(path)


def test_a_file_shorter_than_a_header_raises(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\0" * 27)
    with pytest.raises(ValueError, match="28 bytes of header; this file has 27"):
        script.read_checkpoint(tmp_path / "model.bin")


# ---- the tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Written by llama2.c's layout, read, converted, saved and loaded again."""
    folder = tmp_path_factory.mktemp("tokenizer")
    pieces = script.read_pieces(write_tokenizer(folder / "tok.bin", PIECES), VOCAB)
    script.to_tokenizer(pieces, 16).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "text",
    ["", " ", "the other", "  aaaaaaa", "ababab", "<s> </s>\n\n<unk>", "<0x41>A", "é éé ê 😀", "\n<s>\n"],
)
def test_encodes_as_llama2c_and_decodes_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    tokens = tokenizer(text)["input_ids"]
    assert tokens == naive_encode(PIECES, text)
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text


@given(text=st.text(alphabet=st.one_of(st.sampled_from(" \nabehrt<unk>é“"), st.characters(codec="utf-8")), max_size=40))
def test_encodes_any_text_as_llama2c(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    tokens = tokenizer(text)["input_ids"]
    assert tokens == naive_encode(PIECES, text)
    assert tokenizer.decode(tokens[1:]) == text


@given(
    words=st.lists(st.text("ab", min_size=2, max_size=5), min_size=1, max_size=12, unique=True),
    text=st.text("ab ", min_size=1, max_size=16),
)
def test_overlapping_pieces_merge_as_in_llama2c(words: list[str], text: str) -> None:
    pieces = pieces_of([*words, " ", "a", "b"])
    tokenizer = script.to_tokenizer([script.Piece(*piece) for piece in pieces], 16)
    assert tokenizer(text)["input_ids"] == naive_encode(pieces, text)


def test_names_of_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.model_max_length == 16
    assert tokenizer("a", "b")["input_ids"] == naive_encode(PIECES, "a") + naive_encode(PIECES, "b")


def test_bad_tokenizer_files_raise(tmp_path: Path, tokenizer_file: Path) -> None:
    with pytest.raises(ValueError, match=f"has {VOCAB} pieces, the checkpoint's vocabulary {VOCAB + 1}"):
        script.read_pieces(tokenizer_file, VOCAB + 1)
    whole = tokenizer_file.read_bytes()
    for end in (len(whole) - 1, len(whole) - 6):  # inside the last piece, inside its score and length
        tokenizer_file.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=f"breaks off inside piece {VOCAB - 1}"):
            script.read_pieces(tokenizer_file, VOCAB)
    tokenizer_file.write_bytes(whole[:4] + struct.pack("<fi", 0.0, -5) + whole[12:])
    with pytest.raises(ValueError, match="breaks off inside piece 0"):
        script.read_pieces(tokenizer_file, VOCAB)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (PIECES[:3] + PIECES[4:], "not <0x00> to <0xFF>"),
        ([piece for piece in PIECES if piece[0] != " "], "single space"),
        ([*PIECES, ("a", -99.0)], r"\['a'\] occur more than once"),
        ([*PIECES, ("ax", -1.0)], "16 pieces can be merged, but have only 15 scores"),
    ],
)
def test_bad_vocabularies_raise(pieces: list[tuple[str, float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        script.to_tokenizer([script.Piece(*piece) for piece in pieces], 16)


# ---- the loss and the command


def test_stories_are_split_at_the_separator() -> None:
    text = "One.\n\nTwo.\nThree.\n\n\nFour.\n\n"
    assert script.split_stories(text, script.Options.separator) == ["One.\nTwo.", "Three.\nFour."]
    assert script.split_stories(text, r"\n\n") == ["One.", "Two.\nThree.", "Four."]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_loss_is_the_mean_over_all_tokens_each_predicted_once(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> None:
    weights = random_weights(tied=True)
    model = script.to_model(script.read_checkpoint(write_checkpoint(tmp_path / "model.bin", weights)))
    texts = [
        "the bee",
        "x",
        "the bear hears the rat. " * 3,
        "rat heart",
    ]  # the third needs several windows of 16
    nats = []
    for text in texts:
        tokens = naive_encode(PIECES, text)
        for start in range(0, len(tokens) - 1, 16):
            window, targets = tokens[start : start + 16], tokens[start + 1 : start + 17]
            logits = naive_logits(weights, window[: len(targets)])
            nats += [np.logaddexp.reduce(row) - row[target] for row, target in zip(logits, targets, strict=True)]
    loss = script.mean_loss(model, tokenizer, texts, batch_size=batch_size)
    assert loss.tokens == len(nats) == sum(len(naive_encode(PIECES, text)) - 1 for text in texts)
    assert loss.nats_per_token == pytest.approx(np.mean(nats), rel=1e-4)


def test_loss_of_nothing_raises(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_checkpoint(tmp_path / "model.bin", random_weights(tied=True))
    with pytest.raises(ValueError, match="every story is empty"):
        script.mean_loss(script.to_model(script.read_checkpoint(path)), tokenizer, [""])


def test_command_writes_a_folder_that_loads_and_prints_the_loss(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "model.bin", random_weights(tied=False))
    text, output = tmp_path / "text.txt", tmp_path / "hf"
    text.write_text("the bee\n\nhears\nthe rat\n", encoding="utf-8")
    options = ["--checkpoint", checkpoint, "--tokenizer", tokenizer_file, "--output", output, "--text", text]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, options)])
    script.main()
    tokens = len(naive_encode(PIECES, "the bee\nhears")) + len(naive_encode(PIECES, "the rat")) - 2
    assert f"nats/token on {tokens} tokens of 2 stories" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(output)
    model: Any = AutoModelForCausalLM.from_pretrained(output)
    made = model.generate(**tokenizer("the", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert made.shape[1] <= len(naive_encode(PIECES, "the")) + 3
