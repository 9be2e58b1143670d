"""Examples into batches: an order that any number of processes shares, and padding that carries no loss."""

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from klas_hf.anchors.batches import check_ids

IGNORED = -100
FILLER = -1


def batches_of(
    examples: Sequence[Mapping[str, Any]],
    batch_size: int,
    multiple: int,
    seed: int,
    workers: int = 0,
    vocabulary: int | None = None,
) -> tuple[DataLoader, "EpochOrder"]:
    """A loader of padded batches, shuffled anew in each epoch, whose number is a multiple of `multiple`.

    The last batches are filled with examples that carry no loss, never with repeated ones: so two processes see in
    one step what one process sees in a batch of twice the size.

    Args:
        examples: each with `input_ids` and `labels` (same length; -100 where no loss is taken).
        batch_size: examples per batch.
        multiple: batches of one optimiser step, over all processes.
        seed: of the order.
        workers: processes that load examples; 0: this one.
        vocabulary: how many ids the model knows; None: not known here.

    Raises:
        TypeError: ids or labels that are no whole numbers.
        ValueError: no examples, an example without a label, or with ids that the model does not know.
    """
    _check(examples, vocabulary)
    order = EpochOrder(len(examples), batch_size * multiple, seed)
    sampler = BatchSampler(order, batch_size, drop_last=False)
    return DataLoader(_Filled(examples), batch_sampler=sampler, collate_fn=collate, num_workers=workers), order


def collate(examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Pad examples on the right: `input_ids`, `attention_mask` and `labels`, each `(batch, longest)`."""
    longest = max(len(example["input_ids"]) for example in examples)

    def padded(name: str, filler: int) -> Tensor:
        rows = [list(example[name]) + [filler] * (longest - len(example[name])) for example in examples]
        return torch.tensor(rows, dtype=torch.long)

    mask = [[1] * len(e["input_ids"]) + [0] * (longest - len(e["input_ids"])) for e in examples]
    return {
        "input_ids": padded("input_ids", 0),
        "attention_mask": torch.tensor(mask, dtype=torch.long),
        "labels": padded("labels", IGNORED),
    }


class EpochOrder(Sampler[int]):
    """A permutation of the examples per epoch, filled up to a multiple of `multiple`, the examples of one step.

    Attributes:
        epoch: which permutation the next iteration takes.
        step: steps of the epoch that it leaves out, because a resumed run has done them.
    """

    def __init__(self, length: int, multiple: int, seed: int):
        self.length, self.multiple, self.seed = length, multiple, seed
        self.epoch = self.step = 0
        self.filled = -(-length // multiple) * multiple

    def __len__(self) -> int:
        return self.filled

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        shuffled = torch.randperm(self.length, generator=generator).tolist()
        yield from (shuffled + [FILLER] * (self.filled - self.length))[self.step * self.multiple :]


class _Filled(Dataset):
    def __init__(self, examples: Sequence[Mapping[str, Any]]):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if index == FILLER:
            return {"input_ids": [0], "labels": [IGNORED]}
        return self.examples[index]


def _check(examples: Sequence[Mapping[str, Any]], vocabulary: int | None) -> None:
    if not len(examples):
        raise ValueError("got no examples to train on; expected at least one with input_ids and labels")
    for number, example in enumerate(examples):
        missing = {"input_ids", "labels"} - example.keys()
        if missing:
            raise ValueError(f"got example {number} without {sorted(missing)}; expected input_ids and labels")
        if len(example["input_ids"]) != len(example["labels"]):
            raise ValueError(
                f"got example {number} with {len(example['input_ids'])} input_ids and {len(example['labels'])} labels; "
                "expected as many labels as tokens, -100 where no loss is taken"
            )
        if all(label == IGNORED for label in example["labels"][1:]):
            raise ValueError(f"got example {number} without a label to predict; leave it out or do not mask all of it")
        ids, labels = _listed(example["input_ids"]), _listed(example["labels"])
        kinds = {*map(type, ids), *map(type, labels)}  # asked once per kind: every id would take seconds
        if kinds != {int} and not all(issubclass(kind, Integral) for kind in kinds):
            wrong = next(one for one in [*ids, *labels] if not isinstance(one, Integral))
            raise TypeError(
                f"got example {number} with {wrong!r} among its input_ids or labels; expected whole numbers: token "
                "ids, -100 where no loss is taken"
            )
        if vocabulary is not None:
            if labels != ids:
                ids += [label for label in labels if label != IGNORED]
            check_ids(min(ids), max(ids), vocabulary)


def _listed(ids: Any) -> list[Any]:
    return ids.tolist() if isinstance(ids, Tensor) else list(ids)
