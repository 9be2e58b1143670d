"""Run by test_search_processes.py, in one process and in two: a search over paths of two Llamas."""

import sys
import warnings
from pathlib import Path

import torch
from tiny_models import tiny_model, token_ids

from klas_hf import FunctionalScoring, SearchConfig, Usage, search_paths
from klas_hf.processes import process_state


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    # The last batch has a single sequence, of which a second process has no share.
    data = [{"input_ids": token_ids(count, 16, seed=seed)} for seed, count in enumerate((4, 4, 4, 4, 1))]
    scoring = FunctionalScoring(calibration=data[:2], temperature=1.0)
    config = SearchConfig(joints=2, buckets=4, scoring=scoring)
    anchors = [tiny_model(seed=1), tiny_model(large=True, seed=2)]
    found = search_paths(anchors, data, config, tokens=16, output=folder / "rows.jsonl")
    state = process_state()
    of = f"{state.process_index}of{state.num_processes}.safetensors"
    found.save(folder / f"process{of}")
    timed = SearchConfig(joints=2, buckets=4, scoring=scoring, cost="latency")
    search_paths(anchors, data, timed, tokens=16, usage=Usage(prompt=4)).save(folder / f"timed{of}")


if __name__ == "__main__":
    main()
