"""Anchors, examples and batches that the training tests share, the same in every process."""

import torch
from tiny_models import VOCABULARY, tiny_model, token_ids
from transformers import PreTrainedModel


def anchors() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A small and a large tiny Llama."""
    return tiny_model(seed=1), tiny_model(large=True, seed=2)


def examples(count: int = 19) -> list[dict[str, list[int]]]:
    """Sequences of several lengths, the first tokens of each without a label."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for _ in range(count):
        length = int(torch.randint(6, 14, (1,), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        made.append({"input_ids": [1, *ids], "labels": [-100, -100, *ids[1:]]})
    return made


def token_batch_list() -> list[dict[str, torch.Tensor]]:
    """Five batches of token ids, an odd number so that processes get unequal shares."""
    return [{"input_ids": token_ids(4, 15, seed=seed)} for seed in range(5)]
