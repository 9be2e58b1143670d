"""Plain text as a task: sequences of one length for training, calibration and scoring."""

import ast
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from numbers import Integral
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from klas_hf.anchors.batches import check_ids
from klas_hf.training.data import collate


def text_sequences(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[list[int]]:
    """Cut texts into sequences of at most `length` tokens, each beginning with BOS where the tokenizer has one.

    A text never shares a sequence with another. Pieces shorter than two tokens are left out.

    Raises:
        TypeError: one string in place of several texts, or a text that is none.
    """
    if isinstance(texts, str):
        raise TypeError("got one string; expected several texts: put it in a list, [text]")
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    sequences = []
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"got a text of type {type(text).__name__}; expected strings")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        step = length - len(bos)
        pieces = (bos + ids[start : start + step] for start in range(0, len(ids), step))
        sequences += [piece for piece in pieces if len(piece) >= len(bos) + 2]
    return sequences


def text_windows(
    text: str, tokenizer: PreTrainedTokenizerBase, length: int, *, count: int | None = None
) -> list[list[int]]:
    """Windows of exactly `length` tokens that follow each other in one text, as perplexity is measured on.

    The protocol of GPTQ, SparseGPT, Wanda and those who compare with them: the text is tokenised as a whole, with what
    the tokenizer puts before a text; windows do not overlap, none begins with a BOS of its own, and what is left over
    at the end is not used.

    Args:
        count: at most so many, from the beginning; None: all.

    Raises:
        ValueError: a text shorter than one window, or numbers below 2 and 1.
    """
    if length < 2 or (count is not None and count < 1):
        raise ValueError(f"got length={length} and count={count}; expected at least 2 tokens and 1 window")
    ids = tokenizer(text, verbose=False)["input_ids"]
    windows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:count]
    if not windows:
        raise ValueError(f"got a text of {len(ids)} tokens; expected {length} at least. Shorten the window")
    return windows


def text_examples(sequences: Iterable[Sequence[int]]) -> list[dict[str, list[int]]]:
    """Training examples in which every token after the first is a label."""
    return [{"input_ids": list(sequence), "labels": list(sequence)} for sequence in sequences]


class TextBatches:
    """Padded batches of sequences; iterates as often as one likes.

    Args:
        sequences: token ids, as `text_sequences` makes them.
        batch_size: sequences per batch.
        count: at most so many, evenly spread over all; None: all.

    Raises:
        TypeError: sequences of anything but integers, such as texts.
        ValueError: no sequences, an empty one, or numbers below 1.
    """

    def __init__(self, sequences: Iterable[Sequence[int]], batch_size: int = 16, *, count: int | None = None):
        if batch_size < 1 or (count is not None and count < 1):
            raise ValueError(f"got batch_size={batch_size} and count={count}; expected at least 1")
        listed = list(sequences)
        if count is not None and count < len(listed):
            listed = [listed[n * len(listed) // count] for n in range(count)]
        _check_sequences(listed)
        self.examples = text_examples(listed)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Mappings with `input_ids`, `attention_mask` and `labels`, each `(batch, tokens)`."""
        for start in range(0, len(self.examples), self.batch_size):
            yield collate(self.examples[start : start + self.batch_size])


def _check_sequences(sequences: Sequence[Sequence[int]]) -> None:
    if not sequences:
        raise ValueError("got no sequences; expected at least one. text_sequences(texts, tokenizer, length) makes them")
    for number, sequence in enumerate(sequences):
        ids = sequence.tolist() if isinstance(sequence, Tensor) else sequence
        if not isinstance(ids, Sequence) or isinstance(ids, str) or not all(isinstance(one, Integral) for one in ids):
            raise TypeError(
                f"got the sequence {number} of type {type(sequence).__name__}; expected token ids, integers. "
                "text_sequences(texts, tokenizer, length) makes them of texts"
            )
        if not ids:
            raise ValueError(f"got the sequence {number} without a token; expected at least one")


def check_vocabulary(sequences: Iterable[Sequence[int]], vocabulary: int) -> None:
    """Raise ValueError for token ids that a model of so many does not have."""
    ids = {number for sequence in sequences for number in (min(sequence), max(sequence))}
    check_ids(min(ids, default=0), max(ids, default=0), vocabulary)


def python_documentation() -> list[str]:
    """English prose that every CPython carries: its language reference and the docstrings of its standard library.

    Some 2 MB in 650 texts, a little different from version to version. Tests and installed packages are left out.
    """
    return list(_python_documentation())


@cache
def _python_documentation() -> tuple[str, ...]:
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}
    files = (path for path in sorted(library.rglob("*.py")) if not skipped & set(path.relative_to(library).parts))
    docstrings = ("\n\n".join(_docstrings(path)) for path in files)
    return (*(topics[name] for name in sorted(topics)), *(text for text in docstrings if text))


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # the library carries a few files that are broken on purpose
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) > 60:
                yield text


def held_out(texts: Sequence[str], every: int = 10) -> tuple[list[str], list[str]]:
    """Split texts into those to train on and every `every`-th one, which is held out."""
    return [t for n, t in enumerate(texts) if n % every], [t for n, t in enumerate(texts) if not n % every]


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with BOS, EOS and padding, trained on texts in seconds."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    special = ["<pad>", "<s>", "</s>"]
    trainer = BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
