"""Training of probes (KLAS Alg. 1); of language models: features once per batch, one block's backward at a time."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW

from klas_hf.anchors.batches import TokenBatch
from klas_hf.anchors.language import LanguageAnchor, hub_options, load_anchor
from klas_hf.anchors.vision import is_vision, load_vision_anchor
from klas_hf.errors import TrainingDiverged
from klas_hf.probes import ImageProbeConfig, ImageProbeNet, ProbeConfig, ProbeNet, fit_probes
from klas_hf.probes.image_training import train_image_probes
from klas_hf.processes import process_state, progress, sum_over_processes


def train_probes(
    anchor: Any,
    data: Iterable[Any],
    config: ProbeConfig | ImageProbeConfig | None = None,
    *,
    validation: Iterable[Any] | None = None,
    **loading: Any,
) -> ProbeNet | ImageProbeNet:
    """Probes of every block of an anchor (Alg. 1): of images by gradient descent, of text in closed form or tuned.

    Args:
        anchor: Hub id, folder or model; it is frozen.
        data: batches of the train split: of token ids, or of images with labels, in random order. A list where it is
            read more than once (images, `epochs`, a ridge start).
        config: a `ProbeConfig` for language models, an `ImageProbeConfig` for image classifiers; None takes the
            defaults.
        validation: batches of images for early stopping; None holds out every fifth batch of the data. Language
            models have no use for it.
        loading: of an anchor named by Hub id or folder, as for `from_pretrained`: revision, dtype, device_map, …; by
            itself it lies on accelerate's device, in its checkpoint's dtype.

    Returns:
        The probes, marked as this anchor's.

    Raises:
        ValueError: unknown family, nothing to learn from, or activations that are not finite.
        TrainingDiverged: the loss of a tuned or an image probe is not finite.

    Example:
        >>> probes = train_probes(source, batches, ProbeConfig(kind="ridge"))  # "meta-llama/Llama-3.2-1B", say
        >>> probes.save_pretrained(folder)
        >>> ProbeNet.from_pretrained(folder).config.num_blocks
        3
        >>> train_probes(small, images, ImageProbeConfig(epochs=1)).config.num_labels
        3
    """
    if is_vision(anchor, **hub_options(loading)):
        _check_config(config, ImageProbeConfig)
        return train_image_probes(load_vision_anchor(anchor, **loading), data, config, validation=validation)
    _check_config(config, ProbeConfig)
    if validation is not None:
        raise ValueError("got validation data for a language model, whose probes need none; leave it out")
    config, anchor = config or ProbeConfig(), load_anchor(anchor, **loading)
    if config.kind != "tuned":
        return fit_probes(anchor, data, config)
    batches = list(anchor.read(data))
    probes = fit_probes(anchor, batches, config).float()
    _tune(probes, anchor, batches)
    return probes


def _check_config(config: Any, expected: type) -> None:
    if config is not None and not isinstance(config, expected):
        raise TypeError(f"got {type(config).__name__} for this anchor; expected {expected.__name__}")


def _tune(probes: ProbeNet, anchor: LanguageAnchor, batches: list[TokenBatch]) -> None:
    config = probes.config
    optimizer = AdamW(probes.parameters(), lr=config.learning_rate, weight_decay=0.0)
    total = max(1, config.epochs * len(batches))
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total)
    for epoch in range(config.epochs):
        for batch in progress(batches, f"tuning probes of {anchor.name}, epoch {epoch + 1}"):
            _tuning_step(probes, anchor, batch)
            optimizer.step()
            optimizer.zero_grad()
            decay.step()


def _tuning_step(probes: ProbeNet, anchor: LanguageAnchor, batch: TokenBatch) -> None:
    """Put the gradients of all probes on one batch in place; each process takes its share of the sequences."""
    state = process_state()
    rows = slice(state.process_index, None, state.num_processes)
    counted = batch.counted.clone()
    counted[:, :-1] &= batch.attention_mask[:, 1:].bool().cpu()  # a token whose next one is known, for either loss
    counted[:, -1] = False
    total = int(counted.sum())
    gradients = [torch.zeros_like(parameter) for parameter in probes.parameters()]
    if total and counted[rows].any():
        share = TokenBatch(batch.input_ids[rows], batch.attention_mask[rows])
        *earlier, last = (state[counted[rows].to(state.device)] for state in anchor.states(share)[1:])
        following = share.input_ids[:, 1:].cpu()[counted[rows][:, :-1]].to(last.device)
        with torch.no_grad():
            own = None if probes.config.tuned_loss == "ce" else anchor.logits(last).float().softmax(-1)
        for block, hidden in enumerate(earlier):
            loss = _block_loss(probes, anchor, block, hidden, own, following) / total
            if not loss.isfinite():
                raise TrainingDiverged(
                    f"got a loss of {float(loss)} for the probe of block {block + 1}; lower learning_rate"
                )
            found = torch.autograd.grad(loss, list(probes.parameters()), allow_unused=True)
            for gradient, part in zip(gradients, found, strict=True):
                if part is not None:
                    gradient += part
    for parameter, gradient in zip(probes.parameters(), gradients, strict=True):
        parameter.grad = sum_over_processes(gradient)


def _block_loss(
    probes: ProbeNet, anchor: LanguageAnchor, block: int, hidden: Tensor, own: Tensor | None, following: Tensor
) -> Tensor:
    """Loss of one probe summed over tokens, in nats: `hidden` is `(tokens, width)`, `own` the anchor's distributions.

    For KL(own ‖ probe) their cross-entropy, of the same gradient: the entropy of `own` does not depend on the probe.
    """
    log_q = anchor.logits(probes.translate(block, hidden)).float().log_softmax(-1)
    return F.nll_loss(log_q, following, reduction="sum") if own is None else -(own * log_q).sum()
