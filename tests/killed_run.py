"""Run by test_killed_steps.py in a process of its own: one long step, killed by SIGKILL at 20 random moments.

Each try is a fork of this process, for which everything is imported and made already. A try that comes to its end
begins anew in another folder; the last is left alone. All give what the step gives undisturbed.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tiny_models import tiny_model, token_ids
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from klas_hf import (
    PathScores,
    ProbeNet,
    RowFile,
    SearchConfig,
    StitchedModel,
    StitchScores,
    TrainingConfig,
    evaluate,
    evaluate_stitches,
    score_stitches,
    search_paths,
    train_probes,
    train_stitches,
)

KILLS = 20
DATA = [token_ids(8, 24, seed=seed) for seed in range(8)]
CALIBRATION = [{"input_ids": ids} for ids in DATA]
PATHS = ["0[:1] 1[2:]", "0[:2] 1[2:]", "0[:1] 1[3:]", "0[:2] 1[3:]", "0[:2] 1[4:]", "1[:2] 1[3:]"]


def anchors() -> list[PreTrainedModel]:
    return [tiny_model(seed=1), tiny_model(large=True, seed=2)]


def stitched(path: str = PATHS[0]) -> PreTrainedModel:
    return StitchedModel.from_path(anchors(), path, calibration=CALIBRATION)


def probes(folder: Path) -> None:
    for name, anchor in zip(("source", "target"), anchors(), strict=True):
        train_probes(anchor, DATA).save_pretrained(folder / name)


def scores(folder: Path) -> None:
    score_stitches(*anchors(), DATA, score="functional_theta").save(folder / "scores")


def search(folder: Path) -> None:
    found = search_paths(anchors(), DATA, SearchConfig(buckets=5, joints=2), output=folder / "measured.jsonl")
    found.save(folder / "paths")


def training(folder: Path) -> None:
    model, examples = stitched(), [{"input_ids": row, "labels": row} for row in torch.cat(DATA).tolist()]
    config = TrainingConfig(
        trainable="full", max_steps=12, per_device_batch_size=4, gradient_accumulation_steps=1, save_steps=2
    )
    train_stitches(model, examples, config, output_dir=folder / "run")
    model.save_pretrained(folder / "model")


def evaluation(folder: Path) -> None:
    batches = [{"input_ids": ids, "labels": ids} for ids in DATA]
    rows, names = RowFile(folder / "rows.jsonl", {"data": "tokens"}), ["one", "other"]
    evaluate_stitches(
        PATHS, stitched, lambda model: evaluate(model, batches), rule="all", rows=rows, anchors=names, training=None
    )


def saving(folder: Path) -> None:
    """Over what is there, in turns of two that differ; what stands there in between is one of the two, and whole."""
    for _ in range(6):
        for model in MODELS:
            model.save_pretrained(folder / "model")


STEPS: dict[str, Callable[[Path], None]] = {
    step.__name__: step for step in (probes, scores, search, training, evaluation, saving)
}
MODELS: list[PreTrainedModel] = []


def tensors(folder: Path) -> dict[str, Tensor]:
    """All numbers that a step has left in a folder."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.iterdir()):
        if path.name in ("source", "target"):
            state = ProbeNet.from_pretrained(path).state_dict()
        elif path.name == "model":
            state = AutoModelForCausalLM.from_pretrained(path).state_dict()
        elif path.name.startswith("scores"):
            loaded = StitchScores.load(path)
            state = {"cross": torch.tensor(loaded.cross), "values": torch.tensor(loaded.values)}
        elif path.name.startswith("paths"):
            searched = PathScores.load(path)
            state = {
                str(path): torch.tensor(value) for path, value in zip(searched.paths, searched.divergence, strict=True)
            }
        elif path.name == "rows.jsonl":
            rows = RowFile(path, {"data": "tokens"}).rows
            state = {f"{number} {row.path}": torch.tensor(row.metrics["loss"]) for number, row in enumerate(rows)}
        else:
            continue
        found |= {f"{path.name} {name}": value for name, value in state.items()}
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].nan_to_num(), other[name].nan_to_num()) for name in one
    )


def forked(run: Callable[[], None], until: float | None) -> bool:
    """Whether a fork came to its end in time; else it is killed."""
    child = os.fork()
    if not child:
        status = 1
        try:
            run()
            status = 0
        finally:
            os._exit(status)
    begun = time.monotonic()
    while until is None or time.monotonic() - begun < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0, f"ended with {status}"
            return True
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def main() -> None:
    name, place = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    step, draw = STEPS[name], random.Random(0)
    if name == "saving":
        MODELS.extend(stitched(path) for path in PATHS[:2])
    begun = time.monotonic()
    forked(lambda: step(place / "whole"), None)
    seconds, expected = time.monotonic() - begun, tensors(place / "whole")
    assert expected
    written: list[dict[str, Tensor]] = [{f"model {key}": x for key, x in one.state_dict().items()} for one in MODELS]
    kills = ends = 0
    while kills < KILLS or not ends:
        broken = place / f"broken-{ends}"
        if forked(lambda folder=broken: step(folder), draw.uniform(0, seconds) if kills < KILLS else None):
            assert same(tensors(broken), expected)
            ends += 1
        else:
            kills += 1
        if name == "saving" and (broken / "model").exists():
            assert any(same(tensors(broken), one) for one in written)
    print(f"{name}: {kills} kills, {ends} ends, {seconds:.1f} s undisturbed")


if __name__ == "__main__":
    main()
