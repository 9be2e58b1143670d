"""Run by test_supernet_processes.py under two processes: train a supernet and a ResNet, then save what came out."""

import sys
import warnings
from pathlib import Path

import torch
from image_examples import ToyImages, tiny_resnet, toy_supernet
from safetensors.torch import save_file

from klas_hf import TrainingConfig, train_stitches
from klas_hf.processes import process_state

CONFIG = TrainingConfig(
    trainable="full", max_steps=6, per_device_batch_size=2, gradient_accumulation_steps=2,
    learning_rate=1e-2, stitch_learning_rate=3e-2,
    weight_decay=0.1, warmup_ratio=0.0, max_grad_norm=1e9, mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25], save_steps=3,
)  # fmt: skip
IMAGES = 13  # two steps an epoch; in the second, one process has fillers alone in its last forward


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    process = process_state().process_index
    model = toy_supernet()
    result = train_stitches(model, ToyImages(IMAGES), CONFIG, output_dir=folder / "supernet")
    drawn = {f"path.{n}": torch.tensor(model.paths.index(path)) for n, (path, _, _) in enumerate(model.seen)}
    pixels = {f"pixels.{n}": pixels for n, (_, pixels, _) in enumerate(model.seen)}
    losses = {"losses": torch.tensor(result.losses, dtype=torch.float64)}
    save_file({**drawn, **pixels, **losses, **model.state_dict()}, folder / f"supernet-{process}.safetensors")
    resnet = tiny_resnet()
    config = TrainingConfig(
        trainable="full", gradient_accumulation_steps=1, max_steps=3, per_device_batch_size=4, batch_norm="train"
    )
    train_stitches(resnet, ToyImages(14), config)
    save_file(resnet.state_dict(), folder / f"resnet-{process}.safetensors")


if __name__ == "__main__":
    main()
