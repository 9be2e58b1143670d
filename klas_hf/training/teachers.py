"""A teacher that remembers: short runs of a sweep, and paths healed alike, ask it of the same batches again."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel

from klas_hf.anchors.weights import is_shared_out

LIMIT = 2**30  # bytes of main memory


@contextmanager
def remember_answers(teacher: PreTrainedModel | None, limit: int = LIMIT) -> Iterator[None]:
    """Meanwhile a teacher that training asks of a batch again does not run again.

    Its features are kept in main memory and its head runs on them anew, so the numbers are the same to the last bit.
    `heal` and `heal_best` do this by themselves; around several of them nothing is forgotten in between. Not remembered
    are pixels on another device than the CPU, which would have to be copied off it to tell whether they are new, and
    what a model answers whose weights several processes share out.

    Args:
        teacher: the model, whose weights stay as they are; None does nothing.
        limit: bytes of features that are kept; those of further batches are not.

    Returns:
        A context, after which all is forgotten.

    Example:
        >>> config = healing_config(4, per_device_batch_size=2)
        >>> with remember_answers(target):
        ...     for path in ("1[:2] 1[3:]", "0[:2] 1[3:]"):
        ...         model = StitchedModel.from_path([source, target], path, calibration=batches)
        ...         result = heal(model, examples, teacher=target, validation=examples, config=config)
    """
    # Of a model that processes share out all must run at once, and not each what it does not remember.
    if teacher is None or teacher in _MEMORIES or is_shared_out(teacher):
        yield
        return
    _MEMORIES[teacher] = _Memory(limit)
    try:
        yield
    finally:
        del _MEMORIES[teacher]


def ask(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """What a model gives; of a teacher without a run of its blocks, where it remembers these inputs."""
    memory = None if torch.is_grad_enabled() or model.training else _MEMORIES.get(model)
    if memory is None:
        return model(**inputs)
    body = model.base_model
    own = vars(body).get("forward")  # accelerate's, of a model on several devices
    body.forward = partial(memory.answer, body.forward)
    try:
        return model(**inputs)
    finally:
        del body.forward
        if own is not None:
            body.forward = own


class _Memory:
    """What the blocks of a teacher have given for what."""

    def __init__(self, limit: int):
        self.left = limit
        self.answers: dict[bytes, tuple[list[Any], Any]] = {}

    def answer(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        asked, form = tree_flatten((args, kwargs))
        if any(isinstance(one, Tensor) and one.is_floating_point() and one.device.type != "cpu" for one in asked):
            return forward(*args, **kwargs)
        key = _key(asked, form)
        if key in self.answers:
            leaves, form = self.answers[key]
            return tree_unflatten([of if one is None else one.to(of, copy=True) for of, one in leaves], form)
        answer = forward(*args, **kwargs)
        leaves, form = tree_flatten(answer)
        size = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        if size <= self.left:
            self.left -= size
            self.answers[key] = [_kept(leaf) for leaf in leaves], form
        return answer


_MEMORIES: "WeakKeyDictionary[nn.Module, _Memory]" = WeakKeyDictionary()


def _kept(leaf: Any) -> tuple[Any, Tensor | None]:
    """The device of a tensor, and a copy in main memory; anything else as it is."""
    return (leaf.device, leaf.to("cpu", copy=True)) if isinstance(leaf, Tensor) else (leaf, None)


def _key(leaves: list[Any], form: Any) -> bytes:
    """What tells inputs from others: all their values, and the precision that they are computed in."""
    digest = hashlib.sha256(str(form).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            device = leaf.device.type
            fast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            digest.update(f"{tuple(leaf.shape)}{leaf.dtype}{leaf.device}{fast}".encode())
            digest.update(leaf.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(repr(leaf).encode())
    return digest.digest()
