"""Evaluation of stitched models: loss on text, greedy generations, and rows of whatever is measured.

Work is shared out over the processes of an `accelerate launch`; every process gets the same result, and the main
process writes it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel

from klas_hf.anchors.language import evaluating
from klas_hf.costs import measure_costs
from klas_hf.processes import process_state, progress, shared_out, sum_over_processes
from klas_hf.rows import ResultRow, RowFile
from klas_hf.stitches import Stitch
from klas_hf.training.losses import cross_entropy_sum, label_count


@dataclass(frozen=True)
class Measurement:
    """What was measured of one model: named figures, and anything else worth keeping with the row (JSON values)."""

    metrics: Mapping[str, float]
    details: Mapping[str, Any] = field(default_factory=dict)


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


def evaluate_stitches(
    stitches: Iterable[Stitch],
    make: Callable[[Stitch], PreTrainedModel],
    measure: Callable[[PreTrainedModel], Measurement],
    *,
    rule: str,
    rows: RowFile,
    seed: int = 0,
    tokens: int = 128,
) -> list[ResultRow]:
    """Make and measure each stitch, one row each, leaving out what the file already has.

    A stitch that another rule chose with the same seed is not made again: the row is repeated under this rule.

    Args:
        stitches: the selection of one rule.
        make: builds (and trains) the model of a stitch; must depend on nothing but the stitch and the seed.
        measure: figures of a model.
        rule: name of the selection rule.
        rows: where rows go.
        seed: recorded with the rows.
        tokens: sequence length that costs are for.
    """
    done = []
    for stitch in stitches:
        row = rows.find(rule, stitch, seed)
        if row is None:
            pair = (stitch.source_stop, stitch.target_start)
            row = next((r for r in rows if r.stitch == pair and r.seed == seed), None)
            if row is None:
                model = make(stitch)
                row = _row(rule, pair, seed, model, measure(model), tokens)
            row = replace(row, rule=rule)
            rows.append(row, to_disk=process_state().is_main_process)
        done.append(row)
    return done


def evaluate_anchor(
    model: PreTrainedModel,
    measure: Callable[[PreTrainedModel], Measurement],
    *,
    rule: str,
    rows: RowFile,
    seed: int = 0,
    tokens: int = 128,
) -> ResultRow:
    """Measure an anchor itself: the ends of a curve. Arguments as for `evaluate_stitches`."""
    row = rows.find(rule, None, seed)
    if row is None:
        row = _row(rule, None, seed, model, measure(model), tokens)
        rows.append(row, to_disk=process_state().is_main_process)
    return row


def _row(
    rule: str, stitch: tuple[int, int] | None, seed: int, model: PreTrainedModel, measured: Measurement, tokens: int
) -> ResultRow:
    cost = measure_costs(model, tokens=tokens)
    fit = model.config.to_dict().get("stitch_fit")
    details = {"kv_bytes_per_token": cost.kv_bytes_per_token} | ({"stitch_fit": fit} if fit else {})
    return ResultRow(
        rule, stitch, seed, cost.macs, cost.parameters, dict(measured.metrics), details | dict(measured.details)
    )


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
