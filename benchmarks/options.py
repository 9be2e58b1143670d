"""What a run of the benchmarks is told."""

import warnings
from dataclasses import dataclass, field, replace

import torch
from transformers.utils import logging


@dataclass(frozen=True)
class Options:
    """Sizes and places; the defaults take some 15 minutes of one core and at most 6 GiB."""

    only: list[str] | None = field(default=None, metadata={"help": "names of the groups to run; none: all"})
    quick: bool = field(default=False, metadata={"help": "tiny sizes and one turn, to see that all runs: no result"})
    growth: bool = field(default=False, metadata={"help": "in place of the table, plot how costs grow"})
    output: str = field(default="outputs/benchmarks", metadata={"help": "folder for rows.jsonl, table.md and plots"})
    scale: int | None = field(
        default=None, metadata={"help": "divides the widths of Llama 3.2 1B and 3B; none: as each group needs it"}
    )
    blocks: int = field(default=6, metadata={"help": "of the smaller Llama (the larger has 7 for 4); 16: as they are"})
    vocabulary: int = field(default=16_032, metadata={"help": "of the Llamas; 128256: as it is"})
    tokens: int = field(default=128, metadata={"help": "of a sequence"})
    sequences: int = field(default=8, metadata={"help": "to score on, and as many to fit to"})
    dtype: str = field(default="float32", metadata={"help": "of the Llamas"})
    device: str = field(default="cpu", metadata={"help": "that models which are run lie on"})
    repeats: int = field(default=5, metadata={"help": "the least of so many times counts"})
    threads: int = field(default=1, metadata={"help": "torch threads"})
    mergekit: str | None = field(
        default=None,
        metadata={"help": "a Python that has mergekit, which then is a peer; best of an environment apart"},
    )

    def settled(self) -> "Options":
        """With the sizes of --quick where that is asked for."""
        if not self.quick:
            return self
        small = {"scale": 16, "blocks": 4, "vocabulary": 512, "tokens": 16, "sequences": 4, "repeats": 1}
        return replace(self, **small)

    def prepare(self) -> None:
        """Threads, seed and quiet, for this process."""
        torch.set_num_threads(self.threads)
        torch.manual_seed(0)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        warnings.simplefilter("ignore")  # of random stitching layers, and of few rows
