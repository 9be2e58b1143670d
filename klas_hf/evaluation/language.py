"""Language models' greedy generations, and how sure they are of whole sequences."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from klas_hf.anchors.weights import check_whole_here, evaluating
from klas_hf.evaluation.measuring import TextTask
from klas_hf.processes import progress, shared_out
from klas_hf.training.data import IGNORED


@torch.no_grad()
def generate_greedily(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    pad_token_id: int | None = None,
) -> list[list[int]]:
    """Continue prompts by greedy decoding, in left-padded batches of similar length.

    Args:
        model: any causal language model; it is put back in the mode it was in.
        prompts: token ids, with BOS and chat template as the model wants them.
        max_new_tokens: after which an answer ends without EOS.
        batch_size: prompts that run together.
        pad_token_id: fills up; None takes the model's, else its first EOS.

    Returns:
        The new tokens of each prompt, in the order of the prompts, the EOS included where it came.

    Raises:
        ValueError: what `generate` refuses, or a model that several processes share out.

    Example:
        >>> answers = generate_greedily(target, [[5, 6, 7], [8]], max_new_tokens=4)
        >>> [len(answer) for answer in answers]
        [4, 4]
    """
    check_whole_here(model)
    pad = _pad_token(model) if pad_token_id is None else pad_token_id
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    answers = []
    with evaluating(model):
        for part in progress(shared_out(parts), "generating"):
            inputs = _left_padded([prompts[number] for number in part], pad)
            device = model.get_input_embeddings().weight.device
            inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
            out = model.generate(
                **inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, pad_token_id=pad
            )
            answers += list(zip(part, out[:, inputs["input_ids"].shape[1] :].tolist(), strict=True))
    return [answer for _, answer in sorted(gather_object(answers))]


@torch.no_grad()
def predict_sequences(
    model: PreTrainedModel, batches: Iterable[object]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Loss, confidence and number of labels of every sequence, for cascades; every process runs all.

    Args:
        batches: of text with labels, as for `evaluate`.

    Returns:
        Each `(sequences,)`: nats per label, the mean over labels of the highest probability there, and their number.

    Raises:
        ValueError: no sequences, one without a label, or labels that the model does not have.

    Example:
        >>> losses, confidence, labels = predict_sequences(target, batches)
        >>> bool(abs(np.average(losses, weights=labels) - evaluate(target, batches).metrics["loss"]) < 1e-5)
        True
        >>> bool((confidence > 0).all() and (confidence <= 1).all())
        True
    """
    task, found = TextTask(model.config.get_text_config().vocab_size), []
    with evaluating(model):
        for batch, labels in progress(task.labelled(batches), "predicting"):
            logits = task.logits(model, batch)
            terms, counts = task.terms(logits, labels.to(logits.device))
            kept = (labels[:, 1:] != IGNORED).cpu()
            highest = (logits[:, :-1].float().log_softmax(-1).amax(-1).exp().cpu() * kept).sum(1)
            found.append(torch.stack([terms["loss"], highest.double(), counts.cpu().double()]))
    if not found or not (every := torch.cat(found, 1))[2].all():
        raise ValueError("got no sequences to predict, or one without a label; expected batches with labels")
    losses, highest, counts = every.numpy()
    return losses / counts, highest / counts, counts.astype(np.int64)


def _left_padded(prompts: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    longest = max(map(len, prompts))
    ids = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def _pad_token(model: PreTrainedModel) -> int:
    settings = model.generation_config
    if settings.pad_token_id is not None:
        return settings.pad_token_id
    eos = settings.eos_token_id
    return 0 if eos is None else (eos[0] if isinstance(eos, list) else eos)
