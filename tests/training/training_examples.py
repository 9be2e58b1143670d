"""Anchors, examples and batches that the training tests share, the same in every process."""

import torch
from tiny_models import VOCABULARY, tiny_model, token_ids
from transformers import PreTrainedModel

from klas_hf import StitchedModel, TrainingConfig

QUICK = TrainingConfig(
    trainable="full", max_steps=12, per_device_batch_size=8, gradient_accumulation_steps=1, learning_rate=5e-3
)


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


def counting(count: int, seed: int) -> list[dict[str, list[int]]]:
    """Sequences that count upwards, so that there is something to learn."""
    ids = (token_ids(count, 1, seed=seed) + torch.arange(10)) % 32
    return [{"input_ids": row, "labels": row} for row in ids.tolist()]


def one_batch(of: list[dict[str, list[int]]]) -> list[dict[str, torch.Tensor]]:
    """Examples of one length, in one batch."""
    return [{name: torch.tensor([one[name] for one in of]) for name in of[0]}]


def pruned() -> tuple[StitchedModel, PreTrainedModel]:
    """A tiny Llama without its third block, and the whole one."""
    model = tiny_model(large=True, seed=2)
    return StitchedModel.from_path([model], "0[:2] 0[3:]", calibration=[token_ids(32, 12)]), model
