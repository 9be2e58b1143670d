"""Language models and paths of their supernets: loss on text, divergence of outputs, greedy generations."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel

from klas_hf.anchors.batches import TokenBatch, token_batches
from klas_hf.anchors.weights import evaluating
from klas_hf.evaluation.models import Measurement
from klas_hf.maths.divergences import kl_divergence
from klas_hf.paths import Stitch
from klas_hf.processes import progress, shared_out, sum_over_processes
from klas_hf.stitching.supernet import Path
from klas_hf.stitching.supernet_language import StitchedSupernetForCausalLM
from klas_hf.training.losses import cross_entropy_sum, label_count


@torch.no_grad()
def evaluate_loss(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Mean next-token cross-entropy in nats per label.

    Args:
        model: any causal language model; it is put back in the mode it was in.
        batches: `input_ids`, `attention_mask` and `labels`, each `(batch, tokens)`; -100 where no loss is taken.

    Returns:
        The mean over all labels of all batches and processes.

    Raises:
        ValueError: no labels.

    Example:
        >>> loss = evaluate_loss(target, batches)
        >>> bool(abs(loss - np.log(64)) < 0.1)  # a random model of 64 words knows nothing
        True
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
def measure_text_paths(
    supernet: StitchedSupernetForCausalLM, paths: Sequence[Path], batches: Iterable[Mapping[str, Tensor]]
) -> list[Measurement]:
    """Mean next-token cross-entropy of some paths in nats per label, in one pass; each anchor runs once per batch.

    Raises:
        ValueError: no labels.
    """
    sums = torch.zeros(len(paths), dtype=torch.float64)
    labels_seen = torch.zeros(1, dtype=torch.float64)
    device = supernet.get_input_embeddings().weight.device
    with evaluating(supernet):
        for batch in progress(shared_out(batches), f"measuring {len(paths)} paths"):
            labels = batch["labels"].to(device)
            losses = [cross_entropy_sum(logits, labels) for logits in _path_logits(supernet, paths, batch)]
            sums += torch.stack(losses).double().cpu()
            labels_seen += label_count(labels).cpu()
    count = int(sum_over_processes(labels_seen))
    if not count:
        raise ValueError("got no labels to measure a loss on; expected batches with at least one label")
    return [Measurement({"loss": loss / count}, {"labels": count}) for loss in sum_over_processes(sums).tolist()]


def _path_logits(
    supernet: StitchedSupernetForCausalLM, paths: Sequence[Path], batch: Mapping[str, Tensor]
) -> Iterator[Tensor]:
    anchors = {place: supernet.anchor(place) for place in range(len(supernet.anchors))}
    needed = {path.source if isinstance(path, Stitch) else path for path in paths}
    tokens = TokenBatch(batch["input_ids"], batch["attention_mask"])
    states = {place: anchors[place].hidden_states(tokens) for place in needed}
    mask = tokens.attention_mask.to(supernet.device)
    for path in paths:
        if isinstance(path, Stitch):
            hidden = states[path.source][path.source_stop - 1]
            yield supernet.rear_logits(path, hidden, attention_mask=mask, use_cache=False)
        else:
            yield anchors[path].logits(states[path][-1])


@torch.no_grad()
def evaluate_token_divergence(model: PreTrainedModel, target: PreTrainedModel, batches: Iterable[object]) -> float:
    """Mean KL(target ‖ model) of two language models' next-token distributions, in nats per token.

    Args:
        batches: token ids; padding and BOS are left out.

    Raises:
        ValueError: no tokens.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    with evaluating(model), evaluating(target):
        for batch in progress(shared_out(token_batches(batches)), "comparing outputs"):
            counted = batch.counted(target.config.bos_token_id)
            log_p, log_q = (_log_probs(one, batch)[counted] for one in (target, model))
            sums += torch.tensor([float(kl_divergence(log_p, log_q).sum()), len(log_p)], dtype=torch.float64)
    total, tokens = sum_over_processes(sums).tolist()
    if not tokens:
        raise ValueError("got no tokens to compare outputs on; expected batches of text")
    return total / tokens


def _log_probs(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    batch = batch.to(model.get_input_embeddings().weight.device)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return logits.float().log_softmax(-1).cpu()


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
        ValueError: what `generate` refuses.

    Example:
        >>> answers = generate_greedily(target, [[5, 6, 7], [8]], max_new_tokens=4)
        >>> [len(answer) for answer in answers]
        [4, 4]
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
