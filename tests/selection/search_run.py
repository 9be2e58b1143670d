"""Run by test_search_processes.py, in one process and in two: paths of two Llamas searched, scored and measured."""

import json
import sys
import warnings
from pathlib import Path

import torch
from accelerate_choice import choose
from tiny_models import tiny_model, token_ids
from torch.distributed.fsdp import fully_shard

from klas_hf import (
    FunctionalScoring,
    SearchConfig,
    StitchedModel,
    Usage,
    evaluate,
    remember_answers,
    score_stitches,
    search_paths,
)
from klas_hf.processes import process_state
from klas_hf.training.teachers import ask


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder, configured = Path(sys.argv[1]), sys.argv[2]
    state = process_state()
    if configured == "fsdp2":
        choose(shards=True)
    # The last batch has a single sequence, of which a second process has no share.
    data = [{"input_ids": token_ids(count, 16, seed=seed)} for seed, count in enumerate((4, 4, 4, 4, 1))]
    scoring = FunctionalScoring(calibration=data[:2], temperature=1.0)
    config = SearchConfig(joints=2, buckets=4, scoring=scoring)
    anchors = [tiny_model(seed=1), tiny_model(large=True, seed=2)]
    found = search_paths(anchors, data, config, tokens=16, output=folder / "rows.jsonl")
    of = f"{state.process_index}of{state.num_processes}.safetensors"
    found.save(folder / f"process{of}")
    timed = SearchConfig(joints=2, buckets=4, scoring=scoring, cost="latency")
    search_paths(anchors, data, timed, tokens=16, usage=Usage(prompt=4)).save(folder / f"timed{of}")
    scores = score_stitches(*anchors, data, tokens=16, functional=scoring)
    model = StitchedModel.from_anchors(*anchors, (2, 2), calibration=data)
    labelled = [batch | {"labels": batch["input_ids"]} for batch in data]
    others = {"scores": scores.values.tolist(), "loss": evaluate(model, labelled).metrics["loss"], "refused": []}
    if configured == "fsdp2":
        expected = anchors[1](**data[state.process_index]).logits
        for part in (*anchors[1].model.layers, anchors[1]):
            fully_shard(part)
        with remember_answers(anchors[1]), torch.no_grad():
            for number in (0, state.process_index):  # one process asks again what the other has not asked yet
                answer = ask(anchors[1], data[number]).logits
        torch.testing.assert_close(answer, expected)
        for use in (lambda: score_stitches(*anchors, data, functional=scoring), lambda: evaluate(anchors[1], labelled)):
            try:
                use()
            except ValueError as error:
                others["refused"].append(str(error))
    (folder / f"process{state.process_index}.json").write_text(json.dumps(others))


if __name__ == "__main__":
    main()
