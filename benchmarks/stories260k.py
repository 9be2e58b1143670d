"""Bring a checkpoint of llama2.c (github.com/karpathy/llama2.c, legacy layout) into Hugging Face form.

    python benchmarks/stories260k.py --checkpoint stories260K.bin --tokenizer tok512.bin --output stories260k

With `--text tinystories.txt` it also measures the loss, in nats per token.
stories260K is a trained Llama that fits anywhere (264 thousand numbers): a real anchor, offline.
Its weights are those of LlamaForCausalLM but for the rotary embedding: llama2.c rotates the neighbours
(2k, 2k + 1) of a head, transformers the pairs (k, k + head_dim / 2), so the rows of wq and wk are permuted.
Its tokenizer always merges the neighbours whose union scores highest: BPE with merges in order of score.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

HEADER = struct.Struct("<7i")
SPECIAL_PIECES = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2: fixed in llama2.c's code, not stored in its files
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))  # ids 3 to 258
SPACE = " "  # llama2.c's export writes sentencepiece's "▁" as a plain space


@dataclass(frozen=True)
class Options:
    """What to convert, and where to."""

    checkpoint: str = field(metadata={"help": "model in llama2.c's legacy format, e.g. stories260K.bin"})
    tokenizer: str = field(metadata={"help": "its tokenizer in llama2.c's format, e.g. tok512.bin"})
    output: str = field(metadata={"help": "folder to write the Hugging Face model and tokenizer to"})
    text: str | None = field(default=None, metadata={"help": "UTF-8 stories to measure the mean loss on"})
    separator: str = field(
        default=r"(?<!\n)\n(?!\n)",
        metadata={"help": "regular expression that matches between two stories of --text"},
    )


@dataclass(frozen=True)
class Header:
    """The seven integers a checkpoint starts with; `tied`: the embedding is the classifier too."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    max_seq_len: int
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


@dataclass(frozen=True)
class Checkpoint:
    """A header and its tensors by llama2.c's names; a per-layer tensor has the layers as first dimension."""

    header: Header
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Loss:
    """Mean next-token cross-entropy, in nats per token, over this many predicted tokens."""

    nats_per_token: float
    tokens: int


# ---- the checkpoint


def parse_header(raw: bytes) -> Header:
    """Read and check the seven integers; a negative vocabulary size marks a classifier of its own."""
    if len(raw) < HEADER.size:
        raise ValueError(f"a checkpoint starts with {HEADER.size} bytes of header; this file has {len(raw)}.")
    values = HEADER.unpack(raw[: HEADER.size])
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab, max_seq_len = values
    whole = min(dim, hidden_dim, n_layers, n_heads, n_kv_heads, abs(vocab), max_seq_len) > 0
    if not whole or n_heads % n_kv_heads or dim % (2 * n_heads):
        raise ValueError(
            f"header (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len) is {values}; "
            "expected positive sizes (vocab_size may be negative), n_heads a multiple of n_kv_heads and "
            "dim of 2 * n_heads. Pass a file of llama2.c's legacy layout (its export.py with --version 0)."
        )
    return Header(dim, hidden_dim, n_layers, n_heads, n_kv_heads, abs(vocab), max_seq_len, tied=vocab > 0)


def tensor_shapes(header: Header) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors, in the order of the file."""
    layers, dim, hidden = header.n_layers, header.dim, header.hidden_dim
    kv_dim, angles = header.n_kv_heads * header.head_dim, (header.max_seq_len, header.head_dim // 2)
    shapes: dict[str, tuple[int, ...]] = {
        "tok_emb": (header.vocab_size, dim),
        "rms_att": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, kv_dim, dim),
        "wv": (layers, kv_dim, dim),
        "wo": (layers, dim, dim),
        "rms_ffn": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "rms_final": (dim,),
        "freq_cis_real": angles,
        "freq_cis_imag": angles,
    }
    if not header.tied:
        shapes["wcls"] = (header.vocab_size, dim)
    return shapes


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint; raises ValueError on a bad header or size before any tensor is allocated."""
    path = Path(path)
    with path.open("rb") as file:
        header = parse_header(file.read(HEADER.size))
    shapes = tensor_shapes(header)
    expected = HEADER.size + 4 * sum(math.prod(shape) for shape in shapes.values())
    if (got := path.stat().st_size) != expected:
        raise ValueError(
            f"{path} has {got:,} bytes; its header {header} asks for {expected:,}. "
            "Download it again, or export it in llama2.c's legacy layout (--version 0)."
        )
    numbers = torch.from_numpy(np.fromfile(path, dtype="<f4", offset=HEADER.size))
    parts = numbers.split([math.prod(shape) for shape in shapes.values()])
    return Checkpoint(header, {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)})


def half_split(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a projection, (heads * head_dim, width): from neighbouring to half-split rotary pairs."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def to_config(header: Header) -> LlamaConfig:
    """The LlamaConfig of a header; norm epsilon and rotary base are constants of llama2.c's code."""
    return LlamaConfig(
        vocab_size=header.vocab_size,
        hidden_size=header.dim,
        intermediate_size=header.hidden_dim,
        num_hidden_layers=header.n_layers,
        num_attention_heads=header.n_heads,
        num_key_value_heads=header.n_kv_heads,
        max_position_embeddings=header.max_seq_len,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=header.tied,
        bos_token_id=1,
        eos_token_id=2,
    )


def to_state_dict(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors under transformers' names; the stored rotary tables are dropped, they are computed."""
    header, tensors = checkpoint.header, checkpoint.tensors
    names = {
        "rms_att": "input_layernorm",
        "wq": "self_attn.q_proj",
        "wk": "self_attn.k_proj",
        "wv": "self_attn.v_proj",
        "wo": "self_attn.o_proj",
        "rms_ffn": "post_attention_layernorm",
        "w1": "mlp.gate_proj",
        "w2": "mlp.down_proj",
        "w3": "mlp.up_proj",
    }
    state = {"model.embed_tokens.weight": tensors["tok_emb"], "model.norm.weight": tensors["rms_final"]}
    state["lm_head.weight"] = tensors["tok_emb" if header.tied else "wcls"]
    for old, new in names.items():
        for layer, weight in enumerate(tensors[old]):
            rotated = old in ("wq", "wk")
            state[f"model.layers.{layer}.{new}.weight"] = half_split(weight, header.head_dim) if rotated else weight
    return state


def to_model(checkpoint: Checkpoint) -> LlamaForCausalLM:
    """The checkpoint as a LlamaForCausalLM in float32, in evaluation mode."""
    model = LlamaForCausalLM(to_config(checkpoint.header))
    model.load_state_dict(to_state_dict(checkpoint))
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return model.eval()


# ---- the tokenizer


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its place in the file."""

    text: str
    score: float


def read_pieces(path: str | Path, vocab_size: int) -> list[Piece]:
    """Read llama2.c's tokenizer: int32 longest piece, then per piece float32 score, int32 length, bytes."""
    raw, at = Path(path).read_bytes(), 4
    pieces: list[Piece] = []
    while at < len(raw):
        score, length = struct.unpack_from("<fi", raw, at) if at + 8 <= len(raw) else (0.0, -1)
        if length < 0 or at + 8 + length > len(raw):
            raise ValueError(f"{path} breaks off inside piece {len(pieces)}, at byte {at}. Download it again.")
        pieces.append(Piece(raw[at + 8 : at + 8 + length].decode("utf-8"), score))
        at += 8 + length
    if len(pieces) != vocab_size:
        raise ValueError(
            f"{path} has {len(pieces)} pieces, the checkpoint's vocabulary {vocab_size}. "
            "Pass the tokenizer that the checkpoint was trained with."
        )
    # llama2.c's export wraps the names of BOS and EOS in line breaks, for printing.
    return [Piece(name, 0.0) for name in SPECIAL_PIECES] + pieces[len(SPECIAL_PIECES) :]


def check_pieces(pieces: Sequence[Piece]) -> None:
    """Raise ValueError unless the pieces are a vocabulary that llama2.c can encode any text with."""
    texts = [piece.text for piece in pieces]
    if tuple(texts[3:259]) != BYTE_PIECES:
        raise ValueError("the pieces 3 to 258 are not <0x00> to <0xFF>: not a tokenizer of llama2.c's format.")
    if SPACE not in texts:
        raise ValueError("no piece is a single space, which llama2.c puts before every text.")
    if repeated := sorted({text for text in texts if texts.count(text) > 1}):
        raise ValueError(f"the pieces {repeated} occur more than once; a piece must have one id.")


def ranked_merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """All (left, right) whose union is a piece, best score first; a score must belong to one piece.

    llama2.c takes the leftmost of equal scores, BPE the first in this list. The two could differ only where
    two splits of one piece overlap (ab|aba and aba|ba in [ab, aba, ba]): 6.5 million random texts under
    random vocabularies of two letters never led there, whatever the order.
    """
    texts = {piece.text for piece in pieces}
    splits = ((piece, piece.text[:cut], piece.text[cut:]) for piece in pieces for cut in range(1, len(piece.text)))
    merges = [(piece, left, right) for piece, left, right in splits if left in texts and right in texts]
    merged = {piece for piece, _, _ in merges}
    scores = {piece.score for piece in merged}
    if len(scores) < len(merged):
        raise ValueError(
            f"{len(merged)} pieces can be merged, but have only {len(scores)} scores; each needs its own, "
            "or the order of merges is not defined. Pass a tokenizer trained by BPE."
        )
    merges.sort(key=lambda merge: -merge[0].score)
    return [(left, right) for _, left, right in merges]


def to_tokenizer(pieces: Sequence[Piece], max_seq_len: int) -> PreTrainedTokenizerFast:
    """A fast tokenizer that encodes as llama2.c does (BOS, then a space before the text) and decodes back."""
    check_pieces(pieces)
    vocab = {piece.text: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab, ranked_merges(pieces), unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Prepend(SPACE)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(SPACE, 1, 0)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        model_max_length=max_seq_len,
        split_special_tokens=True,  # llama2.c spells "<s>" in a text out, as any other text
    )


# ---- the loss


def split_stories(text: str, separator: str) -> list[str]:
    """The stories between matches of a regular expression, without empty ones.

    Paragraphs end in one line break, as in the stories that llama2.c's models were trained on
    (TinyStories_all_data); TinyStories' text files have two, which costs the model 0.06 nats per token.
    """
    stories = (re.sub(r"\n+", "\n", story.strip()) for story in re.split(separator, text))
    return [story for story in stories if story]


def windows(tokens: Sequence[int], length: int) -> Iterator[Tensor]:
    """Cut tokens into (at most length + 1,) pieces that share an end, so that each is predicted once."""
    for start in range(0, len(tokens) - 1, length):
        yield torch.tensor(tokens[start : start + length + 1])


@torch.no_grad()
def mean_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int = 16
) -> Loss:
    """Loss over texts, each after its own BOS; one longer than the context is cut, and starts anew there."""
    length = model.config.max_position_embeddings
    rows = [row for ids in tokenizer(list(texts), verbose=False)["input_ids"] for row in windows(ids, length)]
    rows.sort(key=len)
    total, count = 0.0, 0
    for start in tqdm(range(0, len(rows), batch_size), desc="loss", unit="batch"):
        batch = rows[start : start + batch_size]
        # Padding is on the right: causal attention keeps it from the tokens before it.
        inputs = torch.nn.utils.rnn.pad_sequence([row[:-1] for row in batch], batch_first=True)
        targets = torch.nn.utils.rnn.pad_sequence([row[1:] for row in batch], batch_first=True, padding_value=-100)
        logits = model(input_ids=inputs).logits  # (batch, tokens, vocabulary)
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += int((targets != -100).sum())
    if not count:
        raise ValueError("no text to measure the loss on: every story is empty.")
    return Loss(total / count, count)


def main() -> None:
    options: Options = HfArgumentParser(Options).parse_args_into_dataclasses()[0]
    checkpoint = read_checkpoint(options.checkpoint)
    pieces = read_pieces(options.tokenizer, checkpoint.header.vocab_size)
    to_tokenizer(pieces, checkpoint.header.max_seq_len).save_pretrained(options.output)
    to_model(checkpoint).save_pretrained(options.output)
    print(f"wrote {options.output} ({checkpoint.header})")
    if options.text is not None:
        stories = split_stories(Path(options.text).read_text(encoding="utf-8"), options.separator)
        model = AutoModelForCausalLM.from_pretrained(options.output)
        loss = mean_loss(model, AutoTokenizer.from_pretrained(options.output), stories)
        print(f"loss {loss.nats_per_token:.4f} nats/token on {loss.tokens:,} tokens of {len(stories):,} stories")


if __name__ == "__main__":
    main()
