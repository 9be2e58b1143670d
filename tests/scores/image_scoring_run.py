"""Run by test_image_scoring_processes.py under two processes: probes, scores and rows, saved as they came out."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from labelled_images import labelled, split
from tiny_vision import tiny_pair

from klas_hf import (
    ImageProbeConfig,
    ImageScoring,
    RowFile,
    StitchedSupernet,
    StitchScores,
    evaluate_supernet,
    score_stitches,
    select_anchors,
    train_probes,
)
from klas_hf.processes import process_state


def found(rows: RowFile) -> tuple[StitchScores, dict[str, Any]]:
    """Scores with all statistics, and what the probes, the choice of anchors and a supernet's rows report."""
    pair = tiny_pair("swin")
    # The last batch holds a single image, of which a second process has no share.
    train, held, test = split(labelled("swin", 4, 11), 10)[:-1], labelled("swin", 2, 9, seed=1), labelled("swin", 3, 8)
    train.append({name: field[:1] for name, field in train[0].items()})
    config = ImageProbeConfig(epochs=3, patience=3)
    probes = [train_probes(model, train, config, validation=held) for model in pair]
    is_shuffled = ImageProbeConfig(epochs=2, shuffled_labels=True)
    shuffled = [train_probes(model, train, is_shuffled, validation=held) for model in pair]
    settings = ImageScoring(shuffled=(shuffled[0], shuffled[1]))
    scores = score_stitches(*pair, test, probes=(probes[0], probes[1]), images=settings, score="klas")
    one_batch = select_anchors(pair, test[:1])  # a second process has none
    chosen = select_anchors(pair, test)
    supernet = StitchedSupernet.from_anchors(pair, [(1, 1), (2, 3)], calibration=train)
    measured = evaluate_supernet(supernet, test, rule="all", rows=rows, classes=[0, 1])
    reports = [[probe.config.accuracy, probe.config.validation_loss, probe.config.best_epoch] for probe in probes]
    return scores, {
        "reports": reports,
        "divergences": [chosen.divergence.tolist(), one_batch.divergence.tolist()],
        "macs": [chosen.macs, one_batch.macs],
        "r2": [fit["r2"] for fit in supernet.config.joint_fits],
        "metrics": [[row.metrics[name] for name in sorted(row.metrics)] for row in measured],
        "images": [row.details["images"] for row in measured],
    }


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    state = process_state()
    scores, reports = found(RowFile(folder / "rows.jsonl", {}))
    scores.save(folder / f"scores-{state.process_index}.safetensors")
    (folder / f"reports-{state.process_index}.json").write_text(json.dumps(reports))
    (folder / "processes.json").write_text(json.dumps(state.num_processes))
    state.wait_for_everyone()


if __name__ == "__main__":
    main()
