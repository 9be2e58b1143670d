"""Run by test_distributed.py under one or two processes: fit, score, train and measure, then save what came out."""

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from training_examples import anchors, examples, token_batch_list

from klas_hf import StitchedModel, TrainingConfig, evaluate, generate_greedily, score_stitches, train_stitches
from klas_hf.data.text import TextBatches
from klas_hf.probes import ProbeConfig
from klas_hf.probes.training import train_probes
from klas_hf.processes import process_state


def main() -> None:
    folder, trainable, batch_size, accumulation = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    state = process_state()
    source, target = anchors()
    batches = token_batch_list()
    probes = train_probes(source, batches), train_probes(target, batches, ProbeConfig(kind="tuned", epochs=1))
    scores = score_stitches(source, target, batches, probes=probes, score="klas")
    # In float64: Adam's steps make much of how a sum is rounded where a gradient is next to nothing.
    model = StitchedModel.from_anchors(source, target, (2, 2), calibration=batches).double()
    target.double()
    config = TrainingConfig(
        trainable=trainable, max_steps=6, per_device_batch_size=batch_size, learning_rate=1e-2,
        gradient_accumulation_steps=accumulation, distillation_weight=0.3,
    )  # fmt: skip
    options = {"validation": examples()[:9], "output_dir": folder / "checkpoints"}
    result = train_stitches(model, examples(), replace(config, eval_steps=2), teacher=target, **options)
    measured = TextBatches([example["input_ids"] for example in examples()], 4)
    found = {
        "processes": state.num_processes,
        "losses": result.losses,
        "validation": result.validation,
        "kept": result.kept,
        "examples": sorted(result.examples),
        "loss": evaluate(model, measured).metrics["loss"],
        "answers": generate_greedily(model, [[1, 5, 9], [1, 7], [1, 8, 8, 8, 3]], max_new_tokens=5, batch_size=1),
        "r2": model.config.joint_fits[0]["r2"],
        "cross": scores.cross.tolist(),
        "gamma_error": scores.gamma_error.tolist(),
        "tokens": scores.tokens,
    }
    if state.is_main_process:
        (folder / "found.json").write_text(json.dumps(found))
        save_file(model.state_dict(), folder / "state.safetensors")
    state.wait_for_everyone()


if __name__ == "__main__":
    main()
