"""What identifies an anchor's weights, and how a model is run without being changed."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of all weights at bfloat16 precision, so that the dtype a model is loaded in does not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        rounded = tensor.detach().to(device="cpu", dtype=torch.bfloat16).contiguous()
        digest.update(rounded.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
