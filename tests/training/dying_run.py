"""Run by test_worker_death.py under two processes, of which one ends in the middle of the work."""

import os
import signal
import sys
from collections.abc import Iterator

from tiny_models import tiny_model, token_ids
from torch import Tensor

from klas_hf import SearchConfig, TrainingConfig, evaluate, score_stitches, search_paths, train_stitches
from klas_hf.processes import process_state


def dying(batches: list[Tensor], rank: int, how: str) -> Iterator[Tensor]:
    """Batches, until this process is to end."""
    for number, batch in enumerate(batches):
        if number == 3 and process_state().process_index == rank:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("got a file that cannot be read")
        yield batch


class Examples(list):
    """Examples that end in the middle, too."""

    def __getitem__(self, place):
        next(self.until)
        return super().__getitem__(place)


def main() -> None:
    work, rank, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    ids = [token_ids(4, 10, seed=seed) for seed in range(8)]
    small, large = tiny_model(seed=1), tiny_model(large=True, seed=2)
    if work == "scoring":
        score_stitches(small, large, dying(ids, rank, how), score="klas")
    elif work == "search":
        search_paths([small, large], dying(ids, rank, how), SearchConfig(buckets=3, joints=1))
    elif work == "evaluation":
        evaluate(small, ({"input_ids": one, "labels": one} for one in dying(ids, rank, how)))
    else:
        examples = Examples({"input_ids": row, "labels": row} for row in token_ids(64, 10).tolist())
        examples.until = dying(ids, rank, how)
        config = TrainingConfig(max_steps=20, per_device_batch_size=2, gradient_accumulation_steps=1, trainable="full")
        train_stitches(small, examples, config)


if __name__ == "__main__":
    main()
