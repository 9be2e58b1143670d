"""Paths of a supernet as drafts for one of them: acceptance foretold, acceptance measured, and whether it pays.

What is foretold is 1 − TV between the distributions of target and draft (Leviathan et al. 2023, Cor. 3.6), on the same
tokens and from the same logits as functional KL; of greedy decoding, how often their most likely tokens agree. Text
that the target writes itself is easier or harder to draft than text that it reads: hence the measurement beside it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from klas_hf.anchors.weights import evaluating
from klas_hf.costs import Cost, Usage
from klas_hf.costs.timing import time_checking
from klas_hf.maths.divergences import acceptance
from klas_hf.maths.drafting import best_drafted, pays_above, speed_up
from klas_hf.maths.estimates import RatioSums
from klas_hf.models import StitchedForCausalLM
from klas_hf.paths import Path
from klas_hf.processes import progress, shared_out, sum_array_over_processes
from klas_hf.rows import AnyPath
from klas_hf.stitching import StitchedSupernetForCausalLM
from klas_hf.stitching.supernet_budgets import path_costs
from klas_hf.tables import markdown_table

MOST = 8  # tokens drafted at a time, where reading them is timed


@dataclass(frozen=True)
class Draft:
    """A path as a draft for another.

    Attributes:
        path: that drafts.
        sampled, error: share of its tokens that the target accepts when both sample, foretold, and its standard error.
        greedy: the same where both take the most likely token.
        cost_ratio: time of one token of the draft over one of the target; without a usage, MACs.
        checking: how many times longer the target takes to read 1 + n tokens than one, for n from 0; where it was not
            timed, 1, as in the paper.
        measured: the share that was accepted in assisted generation, or None.
    """

    path: Path
    sampled: float
    error: float
    greedy: float
    cost_ratio: float
    checking: tuple[float, ...] = (1.0,) * 17
    measured: float | None = None

    def acceptance(self, sampling: bool = False) -> float:
        """The share that is accepted: as measured, or else as foretold."""
        foretold = self.sampled if sampling else self.greedy
        return foretold if self.measured is None else self.measured

    def drafted(self, sampling: bool = False) -> int:
        """Tokens to draft at a time; 0: it does not pay."""
        return best_drafted(self.acceptance(sampling), self.cost_ratio, self.checking)

    def speed_up(self, sampling: bool = False) -> float:
        """How many times faster the target is with so many; at least 1."""
        drafted = self.drafted(sampling)
        return speed_up(self.acceptance(sampling), self.cost_ratio, drafted, self.checking[drafted])


def score_drafts(
    supernet: StitchedSupernetForCausalLM,
    batches: Iterable[Any],
    *,
    target: AnyPath | None = None,
    usage: Usage | None = None,
) -> list[Draft]:
    """Foretell how much of each path's drafts a target path accepts, and what that is worth.

    Args:
        supernet: its anchors run once per batch for all paths that begin with them.
        batches: token ids.
        target: one of its paths; None takes the dearest.
        usage: how it is run; given, costs are seconds per token, which is what counts, and it is timed how much longer
            the target reads several tokens than one. MACs leave both out.

    Returns:
        All other paths, the greatest speed-up of greedy decoding first.

    Raises:
        ValueError: no tokens to compare on, or an unknown target.

    Example:
        >>> supernet = StitchedSupernet.from_anchors([source, target], [(1, 2), "1[:2] 1[3:]"], calibration=batches)
        >>> drafts = score_drafts(supernet, batches)
        >>> len(drafts), all(0 <= draft.greedy <= 1 and draft.speed_up() >= 1 for draft in drafts)
        (3, True)
    """
    costs, _ = path_costs(supernet, usage)
    goal = max(costs, key=lambda path: costs[path].macs) if target is None else supernet.check_path(target)
    paths = [path for path in costs if path != goal]
    sums = [RatioSums((len(paths), 1)) for _ in range(2)]
    with evaluating(supernet), torch.no_grad():
        for batch in progress(shared_out(supernet.read_anchors[0].read(batches)), f"comparing {len(paths)} drafts"):
            _add(supernet, [goal, *paths], batch, sums)
    for one in sums:
        one.set_moments(sum_array_over_processes(one.moments()))
    if not np.isfinite(sums[0].value).all():
        raise ValueError("got no tokens to compare drafts on; expected text. Check the attention masks")
    timed = {} if usage is None else {"checking": time_checking(supernet.path_model(goal), usage.prompt, MOST)}
    found = [
        Draft(path, float(share[0]), float(error[0]), float(greedy[0]), _ratio(costs[path], costs[goal]), **timed)
        for path, share, error, greedy in zip(paths, sums[0].value, sums[0].standard_error, sums[1].value, strict=True)
    ]
    return sorted(found, key=lambda draft: (-draft.speed_up(), draft.cost_ratio))


def _add(supernet: Any, paths: Sequence[Path], batch: Any, sums: Sequence[RatioSums]) -> None:
    """Add a batch: of every path behind the first, what the first accepts."""
    log_p, items = None, batch.unit_items
    for place, logits in enumerate(supernet.logits_of(paths, batch.to(supernet.device)), -1):
        log_q = logits[batch.counted.to(logits.device)].float().log_softmax(-1)
        if log_p is None:
            log_p = log_q
            continue
        for one, terms in zip(sums, (acceptance(log_p, log_q), log_p.argmax(-1) == log_q.argmax(-1)), strict=True):
            totals = torch.zeros(2, len(batch), dtype=torch.float64)
            values = torch.stack([terms.double().cpu(), torch.ones(len(terms), dtype=torch.float64)])
            totals.index_add_(1, items, values)
            one.add_at((place, 0), totals[0].numpy(), totals[1].numpy())
    for one in sums:
        one.sequences += len(batch)


def _ratio(draft: Cost, target: Cost) -> float:
    if draft.latency is None or target.latency is None:
        return draft.macs / target.macs
    return draft.latency / target.latency


def measure_draft(
    supernet: StitchedSupernetForCausalLM,
    draft: Draft,
    prompts: Iterable[Sequence[int]],
    *,
    target: AnyPath,
    drafted: int = 4,
    tokens: int = 64,
    sampling: bool = False,
) -> Draft:
    """The draft with the share of its tokens that the target took in assisted generation (`assistant_model`).

    Args:
        draft: of `score_drafts`.
        prompts: token ids of each.
        target: the path that it drafts for.
        drafted: tokens at a time, always so many.
        tokens: to be written after each prompt.
        sampling: at temperature 1; else greedily.

    Raises:
        ValueError: no token was drafted, or a path that is to draft for itself.

    Example:
        >>> supernet = StitchedSupernet.from_anchors([source, target], [(1, 2), (2, 3)], calibration=batches)
        >>> draft = next(one for one in score_drafts(supernet, batches) if one.path == Path.of((2, 3)))
        >>> draft = measure_draft(supernet, draft, [[5, 6, 7], [8, 9]], target="1[:]", tokens=8)
        >>> 0 <= draft.measured <= 1
        True
    """
    if supernet.check_path(target) == draft.path:
        raise ValueError(f"got {draft.path} as draft and target; expected two paths")
    model, assistant = supernet.path_model(target), supernet.path_model(draft.path)
    taken = refused = 0
    for prompt in prompts:
        one = _count(model, assistant, torch.tensor([list(prompt)], device=supernet.device), drafted, tokens, sampling)
        taken, refused = taken + one[0], refused + one[1]
    if not taken + refused:
        raise ValueError("got prompts after which no token was drafted; expected some, and tokens above 1")
    return replace(draft, measured=taken / (taken + refused))


def _count(
    model: StitchedForCausalLM, assistant: StitchedForCausalLM, ids: Tensor, drafted: int, tokens: int, sampling: bool
) -> tuple[int, int]:
    """Drafted tokens that were taken, and those at which a run stopped."""
    runs: list[tuple[int, int]] = []  # of each run of the target: tokens that it has read before, and reads

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        runs.append((kwargs["past_key_values"].get_seq_length(), kwargs["input_ids"].shape[1]))

    settings = assistant.generation_config
    assistant.generation_config = GenerationConfig.from_dict(
        settings.to_dict()
        | {
            "num_assistant_tokens": drafted,
            "num_assistant_tokens_schedule": "constant",
            "assistant_confidence_threshold": 0,
        }
    )
    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    options = (
        {"do_sample": sampling, "top_k": 0, "temperature": 1.0, "top_p": 1.0} if sampling else {"do_sample": False}
    )
    try:
        output = model.generate(ids, assistant_model=assistant, max_new_tokens=tokens, **options)
    finally:
        handle.remove()
        assistant.generation_config = settings
    taken = refused = 0
    ends = [past for past, _ in runs[1:]]
    for number, (past, read) in enumerate(runs):
        before = ids.shape[1] if number == 0 else past + 1  # tokens that were certain when the run began
        candidates = past + read - before
        after = ends[number] if number < len(ends) else output.shape[1] - 1
        kept = after - before
        taken += min(kept, candidates)
        refused += kept < candidates and number < len(ends)  # the last run may have stopped at its length
    return taken, refused


def draft_table(drafts: Sequence[Draft], *, sampling: bool = False) -> str:
    """Drafts as a Markdown table, with what they are worth by the arithmetic of `klas_hf.maths.drafting`.

    Args:
        drafts: of `score_drafts`, some measured.
        sampling: whether both sample; else they take the most likely token.

    Example:
        >>> pays = Draft(Path.parse("0[:]"), sampled=0.7, error=0.01, greedy=0.8, cost_ratio=0.1)
        >>> print(draft_table([pays, replace(pays, cost_ratio=0.9)]))
        | draft | of the target's time | pays above | accepted, foretold | measured | drafted at once | times as fast |
        |-------|----------------------|------------|--------------------|----------|-----------------|---------------|
        | 0[:]  | 0.100                | 0.100      | 0.800              | –        | 6               | 2.47          |
        | 0[:]  | 0.900                | 0.900      | 0.800              | –        | 0: does not pay | 1.00          |
    """
    columns = ["draft", "of the target's time", "pays above", "accepted, foretold", "measured", "drafted at once"]
    lines = [[*columns, "times as fast"]]
    for draft in drafts:
        foretold, count = draft.sampled if sampling else draft.greedy, draft.drafted(sampling)
        measured = "–" if draft.measured is None else f"{draft.measured:.3f}"
        told = str(count) if count else "0: does not pay"
        least = pays_above(draft.cost_ratio, draft.checking)
        lines.append([str(draft.path), f"{draft.cost_ratio:.3f}", "never" if least is None else f"{least:.3f}",
                      f"{foretold:.3f}", measured, told, f"{draft.speed_up(sampling):.2f}"])  # fmt: skip
    return markdown_table(lines)
