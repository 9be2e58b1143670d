"""Run by test_sharding.py under two processes: the same steps as one process takes, with replicas and with shards."""

import json
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate_choice import choose
from safetensors.torch import save_file
from stitched_examples import coloured_images, counting_text
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import default_data_collator
from transformers.distributed import DistributedConfig

from klas_hf import StitchedModel, TrainingConfig, train_stitches
from klas_hf.processes import process_state

STEPS, BATCH = 3, 8


def batches(kind: str) -> list[dict[str, Tensor]]:
    """The batch of each step, of all processes together."""
    data = list(coloured_images(STEPS * BATCH) if kind == "classifier" else counting_text(STEPS * BATCH))
    return [default_data_collator(data[start : start + BATCH]) for start in range(0, len(data), BATCH)]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    # Weights after a few steps of plain descent are as far apart as gradients are; Adam would blow up a rounding error.
    return torch.optim.SGD(model.parameters(), lr=0.02)


def steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    mine: list[dict[str, Tensor]],
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> list[float]:
    """The loss of each step on this process's share."""
    model.train()
    losses = []
    for batch in mine:
        loss = model(**batch).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def share(batch: dict[str, Tensor], rank: int, processes: int) -> dict[str, Tensor]:
    return {name: tensor.chunk(processes)[rank].clone() for name, tensor in batch.items()}


def in_accelerate(folder: Path, kind: str) -> tuple[nn.Module, list[float]]:
    """Replicas or shards, as accelerate's state says."""
    accelerator = Accelerator()
    model = StitchedModel.from_pretrained(folder / kind)
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    mine = [share(batch, accelerator.process_index, accelerator.num_processes) for batch in batches(kind)]
    return model, steps(model, optimizer, mine, accelerator.backward)


def trained_by_klas_hf(folder: Path, trainable: str) -> tuple[nn.Module, list[float]]:
    """`train_stitches` on the same data."""
    model = StitchedModel.from_pretrained(folder / "unequal")
    return model, list(train_stitches(model, rows(), training(trainable, process_state().num_processes)).losses)


class Interrupted(list):
    """Rows that end in an error after the first two batches."""

    def __init__(self, rows: list[dict[str, Any]], count: int):
        super().__init__(rows)
        self.left = count

    def __getitem__(self, index: Any) -> Any:
        if not self.left:
            raise InterruptedError
        self.left -= 1
        return super().__getitem__(index)


def resumed_by_klas_hf(folder: Path, trainable: str) -> tuple[nn.Module, list[float]]:
    """`train_stitches`, interrupted and begun again."""
    config = replace(training(trainable, process_state().num_processes), save_steps=1)
    checkpoints = folder / f"checkpoints {trainable}"
    with suppress(InterruptedError):
        few = Interrupted(rows(), 2 * config.per_device_batch_size)
        train_stitches(StitchedModel.from_pretrained(folder / "unequal"), few, config, output_dir=checkpoints)
    assert [path.name for path in checkpoints.glob("checkpoint-*")] in (["checkpoint-1"], ["checkpoint-2"])
    process_state().wait_for_everyone()
    choose(shards=True)
    model = StitchedModel.from_pretrained(folder / "unequal")
    return model, list(train_stitches(model, rows(), config, output_dir=checkpoints).losses)


def rows() -> list[dict[str, Any]]:
    return list(counting_text(STEPS * BATCH))


def training(trainable: str, processes: int) -> TrainingConfig:
    return TrainingConfig(
        trainable=trainable, max_steps=STEPS, per_device_batch_size=BATCH // processes, gradient_accumulation_steps=1,
        learning_rate=1e-3,
    )  # fmt: skip


def in_transformers(folder: Path, kind: str) -> tuple[nn.Module, list[float]]:
    """Shards by transformers' own FSDP2, over the model's plan."""
    model = StitchedModel.from_pretrained(folder / kind, distributed_config=DistributedConfig(fsdp_size=2))
    state = process_state()
    mine = [share(batch, state.process_index, state.num_processes) for batch in batches(kind)]
    return model, steps(model, optimizer_of(model), mine)


def write(folder: Path, name: str, model: nn.Module, losses: list[float]) -> None:
    """What came out, with the names of what was sharded together."""
    state = process_state()
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    units = {type(module).__name__ for module in model.modules() if isinstance(module, FSDPModule)}
    parameters = list(model.parameters())
    mean = torch.tensor(losses, dtype=torch.float64) / state.num_processes
    torch.distributed.all_reduce(mean)
    if state.is_main_process:
        found = {
            "processes": state.num_processes,
            "losses": mean.tolist(),
            "sharded": sum(isinstance(parameter.data, DTensor) for parameter in parameters) / len(parameters),
            "here": sum(local(parameter).numel() for parameter in parameters),
            "units": sorted(unit.removeprefix("FSDP") for unit in units),
        }
        (folder / f"{name}.json").write_text(json.dumps(found))
        save_file({n.removeprefix("module."): t.clone() for n, t in whole.items()}, folder / f"{name}.safetensors")


def local(parameter: nn.Parameter) -> Tensor:
    return parameter.data.to_local() if isinstance(parameter.data, DTensor) else parameter.data


WAYS = {
    "ddp": in_accelerate,
    "fsdp2": in_accelerate,
    "native": in_transformers,
    "train": trained_by_klas_hf,
    "resume": resumed_by_klas_hf,
}


def main() -> None:
    folder, ways = Path(sys.argv[1]), sys.argv[2].split(",")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    process_state()
    for name in ways:
        way, what = name.split(" ")
        choose(shards=way in ("fsdp2", "train", "resume"))
        model, losses = WAYS[way](folder, what)
        write(folder, name, model, losses)
        if way == "native":
            model.save_pretrained(folder / f"{name} saved")  # every process takes part
        elif way == "train":
            whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            if process_state().is_main_process:
                model.save_pretrained(folder / f"{name} saved", state_dict=whole)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
