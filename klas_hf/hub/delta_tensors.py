"""The tensors of a stitched model compared with its anchors', bit for bit."""

import hashlib
import re

import torch
from torch import Tensor
from transformers import PreTrainedModel


def is_stitch(name: str) -> bool:
    """Whether a tensor is a stitching layer's."""
    return name.startswith(("joints.", "model.joints."))


def plain_tensors(state: dict[str, Tensor], expected: set[str], *, adapted: bool) -> dict[str, Tensor]:
    """The tensors of a stitched model, inside a PeftModel by the names that they have without it.

    Args:
        state: of the model.
        expected: names of a stitched model's tensors.
        adapted: whether a PEFT adapter adds tensors of its own, which are left out.

    Raises:
        ValueError: tensors are missing, not in memory, or there are others.
    """
    names = {
        name: name.replace(".base_layer.", ".").replace(".original_module.", ".") if adapted else name for name in state
    }
    plain = {names[name]: tensor for name, tensor in state.items() if names[name] in expected}
    strange = set() if adapted else set(state) - expected
    offloaded = {name for name, tensor in plain.items() if tensor.is_meta}
    for problem, found in (
        ("lacks", expected - set(plain)),
        ("has offloaded", offloaded),
        ("has in addition", strange),
    ):
        if found:
            raise ValueError(
                f"got a model that {problem} the tensors {sorted(found)[:3]}; expected a stitched model in memory. "
                "Pass the PeftModel itself where there is an adapter"
            )
    return plain


def replaced_by_adapter(state: dict[str, Tensor]) -> set[str]:
    """Names of the tensors in whose place an adapter has its own (PEFT's `modules_to_save`)."""
    return {re.sub(r"\.modules_to_save\.[^.]+\.", ".", name) for name in state if ".modules_to_save." in name}


def tied_heads(model: PreTrainedModel, state: dict[str, Tensor]) -> set[str]:
    """Names of the tensors, of a model's `state`, that its embedding is."""
    return {name for name, other in model.all_tied_weights_keys.items() if same_bits(state[name], state[other])}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether shape, dtype and every bit agree; -0 is not 0, and NaN is NaN."""
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(_bytes(one), _bytes(other))


def fingerprints(state: dict[str, Tensor], slices: int) -> list[str]:
    """SHA-256 of the tensors of each slice: names, shapes, dtypes and bits. What is of no slice, such as a head, counts
    with the last.
    """
    digests = [hashlib.sha256() for _ in range(slices)]
    for name, tensor in sorted(state.items()):
        if not is_stitch(name):
            place = re.match(r"(?:model\.)?slices\.(\d+)\.", name)
            digest = digests[int(place[1]) if place else -1]
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(_bytes(tensor).numpy().data)
    return [digest.hexdigest() for digest in digests]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
