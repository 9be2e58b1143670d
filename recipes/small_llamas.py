"""Small Llamas for the score study: three sizes trained on Python's documentation, and a sibling of a given Llama."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.language_study import TextTask
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from klas_hf import TrainingConfig, train_stitches
from klas_hf.data.text import held_out, python_documentation, text_examples, text_sequences, train_tokenizer
from klas_hf.files import write_folder_atomically
from klas_hf.processes import process_state

LENGTH, VOCABULARY = 64, 1024
LINE = r"(?<!\n)\n(?!\n)"  # what parts the stories of a TinyStories file with a story per line


@dataclass(frozen=True)
class Size:
    """A Llama's depth and width, and how it is trained."""

    depth: int
    width: int
    steps: int
    rate: float

    @property
    def name(self) -> str:
        return f"Llama-{self.depth}x{self.width}"

    def config(self, **changes: Any) -> LlamaConfig:
        shape = dict(num_hidden_layers=self.depth, hidden_size=self.width, intermediate_size=self.width * 11 // 4)
        heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=self.width // 4)
        return LlamaConfig(**changes | shape | heads | {"tie_word_embeddings": True})


SMALL, DEEP, WIDE = Size(5, 64, 600, 5e-3), Size(10, 64, 1500, 3e-3), Size(8, 128, 1500, 3e-3)
PAIRS = {"llama_within": (SMALL, DEEP), "llama_across": (SMALL, WIDE)}  # of one width, and of two
MIDDLE_PAIR = DEEP, WIDE
SIBLING = Size(4, 48, 1500, 5e-3)


def documentation_pair(
    family: str, cache: Path, steps: int | None, middle: bool = False
) -> tuple[list[PreTrainedModel], TextTask, PreTrainedTokenizerBase]:
    """Two Llamas trained on Python's documentation, from the cache or trained now, and texts that neither has seen.

    Args:
        steps: of the training; None takes each size's own.
        middle: the deep one as the source, of two widths.
    """
    train_texts, test_texts = held_out(python_documentation())
    tokenizer = _tokenizer(cache, train_texts)
    parts = (train_texts, test_texts[::2], test_texts[1::2])
    train, validation, test = (text_sequences(texts, tokenizer, LENGTH) for texts in parts)
    task = TextTask(spread(train), spread(validation, 128), spread(test, 256), LENGTH)
    sizes = MIDDLE_PAIR if middle else PAIRS[family]
    return [_trained(size, tokenizer, train, cache, steps) for size in sizes], task, tokenizer


def sibling_pair(
    anchor: str, train_file: str, test_file: str, cache: Path, steps: int | None
) -> tuple[list[PreTrainedModel], TextTask]:
    """A Llama and a smaller one that learns from its outputs, on two files of stories, one to a line."""
    tokenizer, target = AutoTokenizer.from_pretrained(anchor), AutoModelForCausalLM.from_pretrained(anchor)
    steps = SIBLING.steps if steps is None else steps
    folder = cache / f"{SIBLING.name}-of-{Path(anchor).name}-{steps}-steps"
    if not folder.exists():
        train = text_sequences(_stories(train_file), tokenizer, 2 * LENGTH)
        given = {**target.config.to_dict(), "initializer_range": 0.06}
        _train(SIBLING.config(**given), text_examples(train), folder, steps, SIBLING.rate, teacher=target)
    task = story_task(train_file, test_file, tokenizer, 2 * LENGTH)
    return [AutoModelForCausalLM.from_pretrained(folder), target], task


def story_task(train_file: str, test_file: str, tokenizer: PreTrainedTokenizerBase, length: int) -> TextTask:
    """Two files of stories, one to a line: one to learn from, and one to choose by and to measure on."""
    train, test = (text_sequences(_stories(path), tokenizer, length) for path in (train_file, test_file))
    return TextTask(spread(train), test[:256:2], test[1:512:2], length)


def _stories(path: str) -> list[str]:
    stories = (re.sub(r"\n+", "\n", story.strip()) for story in re.split(LINE, Path(path).read_text(encoding="utf-8")))
    return [story for story in stories if story]


def spread(sequences: list[list[int]], count: int = 4096) -> list[list[int]]:
    """So many of the sequences, from the beginning to the end, in an order in which any first few are as spread."""
    step = max(1, len(sequences) // count)
    chosen = sequences[::step][:count]
    return [chosen[place] for first in range(32) for place in range(first, len(chosen), 32)]


def _tokenizer(cache: Path, texts: list[str]) -> PreTrainedTokenizerBase:
    folder = cache / "tokenizer"
    if not folder.exists() and process_state().is_main_process:
        write_folder_atomically(folder, train_tokenizer(texts, VOCABULARY).save_pretrained)
    process_state().wait_for_everyone()
    return AutoTokenizer.from_pretrained(folder)


def _trained(
    size: Size, tokenizer: PreTrainedTokenizerBase, train: list[list[int]], cache: Path, steps: int | None
) -> PreTrainedModel:
    steps = size.steps if steps is None else steps
    folder = cache / f"{size.name}-{steps}-steps"
    if not folder.exists():
        config = size.config(
            vocab_size=VOCABULARY, max_position_embeddings=2048, initializer_range=0.05,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        _train(config, text_examples(train), folder, steps, size.rate)
    return AutoModelForCausalLM.from_pretrained(folder)


def _train(
    config: LlamaConfig,
    examples: list[dict[str, list[int]]],
    folder: Path,
    steps: int,
    rate: float,
    teacher: PreTrainedModel | None = None,
) -> None:
    set_seed(0)
    model = LlamaForCausalLM(config)
    training = TrainingConfig(
        trainable="full", max_steps=steps, per_device_batch_size=8, gradient_accumulation_steps=1, learning_rate=rate,
        weight_decay=0.1, distillation_weight=0.0 if teacher is None else 0.5,
    )  # fmt: skip
    result = train_stitches(model, examples, training, teacher=teacher)
    process_state().print(f"  trained {folder.name}: {result}")
    if process_state().is_main_process:
        write_folder_atomically(folder, model.save_pretrained)
    process_state().wait_for_everyone()
