"""All-pairs KL divergences: against a loop of `F.kl_div`, and the whole pass against what cannot be spared.

Always the sizes of Llama 3.2 1B and 3B, their blocks thin: forwards take next to no time, so that the share of
divergences in the pass is an upper bound of what whole anchors would show. The default needs some 5 GiB.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measuring import Figure, growth_of, in_children, in_turns
from benchmarks.options import Options
from klas_hf.anchors import LanguageAnchor, TokenBatch
from klas_hf.maths.divergences import pairwise_kl
from klas_hf.probes import ProbeConfig, ProbeNet, fit_probes
from klas_hf.scores.driver import WORKSPACE_BYTES
from klas_hf.scores.probed import Distributions, ProbedSums

NARROW = 64  # width of the anchors whose memory is watched: what grows is not their weights


@dataclass(frozen=True)
class Sizes:
    depths: tuple[int, int] = (16, 28)
    widths: tuple[int, int] = (2048, 3072)
    vocabulary: int = 128_256
    tokens: int = 28  # of a batch; a chunk of the default workspace holds 14
    pairwise_tokens: int = 64


TINY = Sizes((2, 3), (8, 12), 50, 5, 4)


def figures(options: Options) -> Iterator[Figure]:
    sizes = TINY if options.quick else Sizes()
    repeats = min(2, options.repeats)
    once, four = (in_children(options, ["divergences:memory"], n, repeats=1)[0]["peak"] for n in (1, 4))
    yield Figure("scoring pass, memory, 4 × the tokens", four, "once the tokens", once, "MiB", 1.05)
    ours, theirs = pairs(sizes, repeats)
    yield Figure("all-pairs KL", ours, "pairwise F.kl_div", theirs, "s", 20, larger=True)
    ours, theirs = whole_pass(options, sizes, repeats)
    yield Figure("scoring pass by probes", ours, "both forwards, all unembeddings", theirs, "s", 1.15)


def memory(options: Options, count: int) -> Mapping[str, float]:
    """MiB that so many batches grow a process by."""
    sizes = TINY if options.quick else Sizes()
    anchors = thin_anchors(options, sizes, (NARROW, NARROW))
    sums = ProbedSums(Distributions(anchors, WORKSPACE_BYTES), logit_probes(anchors))
    return growth_of(lambda: [add(sums, batch(sizes, anchors[0])) for _ in range(count)])


@torch.inference_mode()
def pairs(sizes: Sizes, repeats: int) -> tuple[float, float]:
    """Seconds of all pairs from their log-probabilities, at once and pair by pair (one row of pairs, times rows)."""
    shape = sizes.pairwise_tokens, sizes.vocabulary
    log_p, log_q = ((2 * torch.randn(depth, *shape)).log_softmax(-1) for depth in sizes.depths)

    def at_once() -> Tensor:
        return pairwise_kl(log_p, log_q).sum(0).float()

    def first_row() -> Tensor:
        return torch.stack([F.kl_div(q, log_p[0], log_target=True, reduction="sum") for q in log_q])

    torch.testing.assert_close(at_once()[0], first_row(), rtol=1e-4, atol=1e-3)
    ours, row = in_turns(repeats, at_once, first_row, warm_up=False)
    return ours, row * len(log_p)


@torch.inference_mode()
def whole_pass(options: Options, sizes: Sizes, repeats: int) -> tuple[float, float]:
    """Seconds of scoring a batch, and of both forwards and every unembedding."""
    anchors = thin_anchors(options, sizes, sizes.widths)
    distributions = Distributions(anchors, WORKSPACE_BYTES)
    sums, tokens = ProbedSums(distributions, logit_probes(anchors)), batch(sizes, anchors[0])

    def least() -> None:
        hidden = [torch.stack([one.rows(state, tokens) for state in one.states(tokens)[1:]]) for one in anchors]
        for start in range(0, sizes.tokens, distributions.chunk):
            for anchor, states in zip(anchors, hidden, strict=True):
                anchor.logits(states[:, start : start + distributions.chunk])

    ours, theirs = in_turns(repeats, lambda: add(sums, tokens), least)
    return ours, theirs


@torch.no_grad()
def add(sums: ProbedSums, tokens: TokenBatch) -> None:
    """What scoring does with a batch."""
    sums.update([anchor.states(tokens) for anchor in sums.distributions.anchors], tokens)


def thin_anchors(options: Options, sizes: Sizes, widths: tuple[int, int]) -> tuple[LanguageAnchor, LanguageAnchor]:
    first, last = (
        LanguageAnchor(
            LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=sizes.vocabulary, hidden_size=width, intermediate_size=64, num_hidden_layers=depth,
                    num_attention_heads=2, num_key_value_heads=1, head_dim=32, tie_word_embeddings=True,
                    bos_token_id=None,
                )
            ).eval().to(getattr(torch, options.dtype))
        )
        for depth, width in zip(sizes.depths, widths, strict=True)
    )  # fmt: skip
    return first, last


def logit_probes(anchors: tuple[LanguageAnchor, LanguageAnchor]) -> tuple[ProbeNet, ProbeNet]:
    first, last = (fit_probes(anchor, [], ProbeConfig(kind="logit")) for anchor in anchors)
    return first, last


def batch(sizes: Sizes, anchor: LanguageAnchor) -> TokenBatch:
    """Two sequences, of whose tokens as many count as asked for (the first of each does not)."""
    lengths = torch.tensor([sizes.tokens // 2 + 1, sizes.tokens - sizes.tokens // 2 + 1])
    ids = torch.randint(anchor.config.vocab_size, (2, int(lengths.max())))
    return TokenBatch(ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long())
