"""What identifies an anchor's weights, and how a model is run without being changed."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

SAMPLED = 64  # values of a tensor, by which changes are noticed that torch does not count
_KNOWN: "WeakKeyDictionary[nn.Module, tuple[str, str]]" = WeakKeyDictionary()  # model → what it was, its fingerprint


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of all weights at bfloat16 precision, so that the dtype a model is loaded in does not matter.

    Once per model: it is taken anew where a tensor is another one, has been written to (torch counts that), or differs
    in one of `SAMPLED` values.
    """
    state = sorted(model.state_dict().items())
    seen = _seen(state)
    if seen is not None and _KNOWN.get(model, ("", ""))[0] == seen:
        return _KNOWN[model][1]
    digest = hashlib.sha256()
    for name, tensor in state:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        _update(digest, tensor.detach().to(dtype=torch.bfloat16))
    if seen is not None:
        _KNOWN[model] = seen, digest.hexdigest()
    return digest.hexdigest()


def _seen(state: list[tuple[str, Tensor]]) -> str | None:
    """What tells tensors from others without reading all of them; None where torch does not count writes, and of
    quantised ones."""
    if any(type(tensor) is not Tensor or tensor.is_inference() for _, tensor in state):
        return None
    digest = hashlib.sha256()
    for name, tensor in state:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{tensor.data_ptr()}{tensor._version}".encode())
        values = tensor.detach().reshape(-1)
        _update(digest, values[:: max(1, len(values) // SAMPLED)])
    return digest.hexdigest()


def _update(digest: "hashlib._Hash", tensor: Tensor) -> None:
    digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and every module back as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.train(training)  # LeViT forgets here the attention biases that it keeps while evaluating
        for module, training in modes:
            module.training = training
