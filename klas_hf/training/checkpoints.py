"""Training checkpoints: the trained tensors, the optimiser's state and the place in the run, in safetensors.

A checkpoint is complete or absent, the last one stays until the next is whole. Only what trains is stored; the frozen
weights come from the anchors again.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from klas_hf.files import remove_folder, understood, write_folder_atomically
from klas_hf.processes import process_state
from klas_hf.training.held_out import HeldOut

_OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)
# Without the offload every process gets the state, not the first one alone.
_EVERYWHERE = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)

_WHOLE = "a whole checkpoint of this training; remove its folder to begin anew"


@dataclass(frozen=True)
class Progress:
    """How far a run is: optimiser steps done, and the loss of each in nats per label."""

    step: int = 0
    losses: tuple[float, ...] = ()


class Checkpoints:
    """The checkpoints of one run in one folder.

    Args:
        folder: where `checkpoint-<step>` folders go; None keeps none.
        run: what the run is (settings, model, data size); a checkpoint of another run is refused.
    """

    def __init__(self, folder: str | Path | None, run: Mapping[str, Any]):
        self.folder = None if folder is None else Path(folder)
        self.run = json.loads(json.dumps(dict(run)))

    def newest(self) -> Path | None:
        """The newest checkpoint, of whatever run.

        Raises:
            ValueError: a folder of such a name is none of ours.
        """
        numbered = self._numbered()
        for path in numbered.values():
            if not (path / "state.json").exists():
                raise ValueError(
                    f"got {path} without a state.json; expected a checkpoint of this training. It was written by "
                    "something else: name another output folder, or move it away"
                )
        return numbered[max(numbered)] if numbered else None

    def latest(self) -> Path | None:
        """The newest checkpoint.

        Raises:
            ValueError: it belongs to another run, or a folder of such a name is none of ours.
        """
        path = self.newest()
        if path is None:
            return None
        with understood(path / "state.json", _WHOLE):
            there = dict(json.loads((path / "state.json").read_text(encoding="utf-8"))["run"])
        if there != self.run:
            changed = sorted(k for k in there.keys() | self.run.keys() if there.get(k) != self.run.get(k))
            raise ValueError(
                f"{path} is a checkpoint of another run, which differs in {', '.join(changed)}; name another output "
                "folder, or repeat the settings of that run to resume it"
            )
        return path

    def save(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        progress: Progress,
        held: HeldOut | None = None,
    ) -> None:
        """Write a checkpoint, then remove older ones. Every process must call this."""
        if self.folder is None:
            return
        weights = get_model_state_dict(model, options=_OPTIONS)
        state = get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
        if accelerator.is_main_process:
            self._write(weights, state, progress, held)
        accelerator.wait_for_everyone()

    def load(self, path: Path, model: nn.Module, optimizer: Optimizer, held: HeldOut | None = None) -> Progress:
        """Put a checkpoint's tensors and optimiser state in place. Every process must call this.

        Raises:
            ValueError: it is damaged.
        """
        with understood(path, _WHOLE):
            return self._load(path, model, optimizer, held)

    def _load(self, path: Path, model: nn.Module, optimizer: Optimizer, held: HeldOut | None) -> Progress:
        set_model_state_dict(model, load_file(path / "weights.safetensors"), options=_OPTIONS)
        content = json.loads((path / "state.json").read_text(encoding="utf-8"))
        moments: dict[str, dict[str, Any]] = {}
        for key, tensor in load_file(path / "optimizer.safetensors").items():
            parameter, moment = key.rsplit(".", 1)
            moments.setdefault(parameter, {})[moment] = tensor
        if moments:  # SGD without momentum has none
            groups = get_optimizer_state_dict(model, optimizer, options=_EVERYWHERE)["param_groups"]
            set_optimizer_state_dict(model, optimizer, {"state": moments, "param_groups": groups}, options=_OPTIONS)
            _forget_others(optimizer, groups, moments)
        if held is not None and "held_out" in content:
            held.load(content["held_out"], load_file(path / "best.safetensors"))
        return Progress(content["step"], tuple(content["losses"]))

    def _write(
        self, weights: Mapping[str, Any], state: Mapping[str, Any], progress: Progress, held: HeldOut | None
    ) -> None:
        assert self.folder is not None
        moments = {f"{name}.{k}": v.contiguous() for name, named in state["state"].items() for k, v in named.items()}
        content: dict[str, Any] = {"run": self.run, "step": progress.step, "losses": list(progress.losses)}
        if held is not None:
            content["held_out"] = held.state()

        def fill(part: Path) -> None:
            save_file(_once(weights), part / "weights.safetensors")
            save_file(moments, part / "optimizer.safetensors")
            if held is not None:
                save_file(_once(held.weights), part / "best.safetensors")
            (part / "state.json").write_text(json.dumps(content), encoding="utf-8")

        write_folder_atomically(self.folder / f"checkpoint-{progress.step}", fill)
        for step, older in self._numbered().items():
            if step != progress.step:
                remove_folder(older)

    def remove(self) -> None:
        """Remove all checkpoints. Every process must call this."""
        if process_state().is_main_process:
            for folder in self._numbered().values():
                remove_folder(folder)
        process_state().wait_for_everyone()

    def _numbered(self) -> dict[int, Path]:
        """Folders of checkpoints by step."""
        if self.folder is None or not self.folder.exists():
            return {}
        return {
            int(match[1]): path
            for path in self.folder.iterdir()
            if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
        }


def _once(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by one name each; tied weights have two."""
    names = {tensor.data_ptr(): name for name, tensor in weights.items()}.values()
    return {name: weights[name].contiguous() for name in names}


def _forget_others(optimizer: Optimizer, groups: list[dict[str, Any]], moments: Mapping[str, Any]) -> None:
    """Leave without state the parameters that had none yet, as those of paths that a supernet has not drawn.

    torch fills them in from a step with zero gradients, which an optimiser would count.
    """
    if all(name in moments for group in groups for name in group["params"]):
        return
    for group, named in zip(optimizer.param_groups, groups, strict=True):
        for parameter, name in zip(group["params"], named["params"], strict=True):
            if name not in moments:
                optimizer.state.pop(parameter, None)
