"""Language models: loss on text and greedy generations."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel

from klas_hf.anchors.weights import evaluating
from klas_hf.processes import progress, shared_out, sum_over_processes
from klas_hf.training.losses import cross_entropy_sum, label_count


@torch.no_grad()
def evaluate_loss(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Mean next-token cross-entropy in nats per label.

    Args:
        model: any causal language model; it is put back in the mode it was in.
        batches: `input_ids`, `attention_mask` and `labels`, each `(batch, tokens)`; -100 where no loss is taken.

    Raises:
        ValueError: no labels.
    """
    device = model.get_input_embeddings().weight.device
    sums = torch.zeros(2, dtype=torch.float64)
    with evaluating(model):
        for batch in progress(shared_out(batches), "measuring the loss"):
            inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
            logits = model(**inputs, use_cache=False).logits
            labels = batch["labels"].to(logits.device)
            sums += torch.stack([cross_entropy_sum(logits, labels).double(), label_count(labels)]).cpu()
    loss, labels = sum_over_processes(sums).tolist()
    if not labels:
        raise ValueError("got no labels to measure a loss on; expected batches with at least one label")
    return loss / labels


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
        prompts: token ids, with BOS and chat template as the model wants them.
        pad_token_id: fills up; None takes the model's, else its first EOS.

    Returns:
        The new tokens of each prompt, in the order of the prompts, the EOS included where it came.
    """
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
