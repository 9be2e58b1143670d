"""Stitched language models in folders, as users keep them: with a trained tokenizer and a chat template."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_models import EOS, randomise_joints, reference_logits, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from klas_hf import StitchedForCausalLM, StitchedModel

TEXT = "the quick brown fox jumps over the lazy dog and sat down; a cat ran to its house, while one big bird sang."
CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PATH = "0[:2] 1[1:3] 1[4:]"


@dataclass(frozen=True)
class SavedModel:
    """A stitched model, in memory and in a folder, with its whole source anchor in another.

    What it should say is computed from `anchors`, without the stitched model and without a cache.
    """

    folder: Path
    source_folder: Path
    model: StitchedForCausalLM
    anchors: tuple[PreTrainedModel, PreTrainedModel]
    tokenizer: PreTrainedTokenizerFast

    def encode(self, text: str) -> Tensor:
        """`(1, tokens)`."""
        return self.tokenizer(text, return_tensors="pt")["input_ids"]

    def encode_chat(self, messages: list[dict[str, str]]) -> Tensor:
        """`(1, tokens)`, up to where the answer begins."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.encode(text)

    def logits(self, ids: Tensor) -> Tensor:
        """`(batch, tokens, vocabulary)`."""
        return reference_logits(self.anchors, PATH, self.model.stitching_layers(), input_ids=ids)

    def continuation(self, ids: Tensor, tokens: int) -> str:
        """What is said greedily after `ids`."""
        return self.tokenizer.decode(greedy(self.logits, ids, tokens), skip_special_tokens=True)


@torch.no_grad()
def greedy(logits: Callable[[Tensor], Tensor], ids: Tensor, tokens: int) -> list[int]:
    """New tokens up to EOS; the whole sequence `(1, tokens)` runs for each."""
    new: list[int] = []
    while len(new) < tokens and EOS not in new:
        new.append(int(logits(ids)[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([[new[-1]]])], dim=1)
    return new


def ascii_tokenizer() -> PreTrainedTokenizerFast:
    """BPE over `TEXT`; no token holds half a character, so that text is the same however it is cut into pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = trainers.BpeTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([TEXT, ":\n"], alphabet)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=CHAT
    )


def save_stitched(folder: Path, source_family: str = "llama", target_family: str = "llama") -> SavedModel:
    """Make a stitched model and save it, its source and their tokenizer under `folder`."""
    tokenizer = ascii_tokenizer()
    source = tiny_model(source_family, seed=1, vocab_size=len(tokenizer))
    target = tiny_model(target_family, large=True, seed=2, vocab_size=len(tokenizer))
    model = StitchedModel.from_path([source, target], PATH)
    randomise_joints(model)
    saved = SavedModel(folder / "stitched", folder / "source", model, (source, target), tokenizer)
    for one, place in ((model, saved.folder), (source, saved.source_folder)):
        one.save_pretrained(place)
        tokenizer.save_pretrained(place)
    return saved
