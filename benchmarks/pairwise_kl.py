"""What scoring all stitches costs, as ratios measured in one run: time of the pass, and whether memory grows.

    python benchmarks/pairwise_kl.py
    python benchmarks/pairwise_kl.py --dtype bfloat16 --threads 1 --tokens 32

Weights are random and blocks thin: their forward takes next to no time, so the share of the pass that is spent on
divergences is an upper bound of what whole anchors would show. The default needs about 5 GB and a minute on 2 cores.
"""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM

from klas_hf.anchors import LanguageAnchor, TokenBatch
from klas_hf.maths.divergences import pairwise_kl
from klas_hf.probes import ProbeConfig, ProbeNet, fit_probes
from klas_hf.scores.driver import WORKSPACE_BYTES
from klas_hf.scores.probed import Distributions, ProbedSums

NARROW = 64  # width of the anchors whose memory is watched: what grows is not their weights


@dataclass(frozen=True)
class Options:
    """Sizes; the defaults are those of Llama 3.2 1B and 3B."""

    source_blocks: int = 16
    target_blocks: int = 28
    source_width: int = 2048
    target_width: int = 3072
    vocabulary: int = 128_256
    tokens: int = field(default=28, metadata={"help": "tokens of a batch; a chunk of the default workspace holds 14"})
    pairwise_tokens: int = field(default=64, metadata={"help": "tokens of the all-pairs KL and the pairwise loop"})
    dtype: str = field(default="float32", metadata={"help": "of the anchors: float32 or bfloat16"})
    workspace_bytes: int = WORKSPACE_BYTES
    repeats: int = field(default=2, metadata={"help": "the shortest of so many times counts"})
    threads: int = field(default=2, metadata={"help": "torch threads"})
    seed: int = 0


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    print(f"{options}\ntorch {torch.__version__}, {options.threads} threads\n")
    once, four_times = peak_memory(options)  # first: a peak can only be seen to rise
    print(f"| peak memory of the process | {options.tokens} tokens | 4 x {options.tokens} tokens | ratio | aim |")
    print(f"|---|---|---|---|---|\n| bytes | {once:,} | {four_times:,} | {four_times / once:.3f} | 1 |\n")
    print("| what | seconds | against | seconds | ratio | aim |\n|---|---|---|---|---|---|")
    ours, theirs = cross_part(options)
    print(f"| all-pairs KL | {ours:.3f} | pairwise F.kl_div | {theirs:.3f} | {theirs / ours:.1f} | at least 20 |")
    ours, theirs = whole_pass(options)
    print(f"| whole pass | {ours:.3f} | forwards + unembeddings | {theirs:.3f} | {ours / theirs:.3f} | at most 1.15 |")


def peak_memory(options: Options) -> tuple[int, int]:
    """Bytes of the process at its peak, after one batch and after three more."""
    anchors = thin_anchors(options, NARROW, NARROW)
    sums = ProbedSums(Distributions(anchors, options.workspace_bytes), logit_probes(anchors))
    peaks = []
    for count in (1, 3):
        for _ in range(count):
            add(sums, batch(options, anchors[0]))
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)  # Linux counts in KiB
    return peaks[0], peaks[1]


@torch.inference_mode()
def cross_part(options: Options) -> tuple[float, float]:
    """Seconds of all pairs from their log-probabilities, at once and pair by pair (one row of pairs, times rows)."""
    shape = options.pairwise_tokens, options.vocabulary
    log_p = (2 * torch.randn(options.source_blocks, *shape)).log_softmax(-1)
    log_q = (2 * torch.randn(options.target_blocks, *shape)).log_softmax(-1)

    def at_once() -> Tensor:
        return pairwise_kl(log_p, log_q).sum(0).float()

    def first_row() -> Tensor:
        return torch.stack([F.kl_div(q, log_p[0], log_target=True, reduction="sum") for q in log_q])

    torch.testing.assert_close(at_once()[0], first_row(), rtol=1e-4, atol=1e-3)
    ours, row = seconds(at_once, first_row, repeats=options.repeats)
    return ours, row * options.source_blocks


@torch.inference_mode()
def whole_pass(options: Options) -> tuple[float, float]:
    """Seconds of scoring a batch, and of what cannot be spared: both forwards and every unembedding."""
    anchors = thin_anchors(options, options.source_width, options.target_width)
    distributions = Distributions(anchors, options.workspace_bytes)
    sums = ProbedSums(distributions, logit_probes(anchors))
    tokens = batch(options, anchors[0])

    def least() -> None:
        hidden = [
            torch.stack([anchor.rows(state, tokens) for state in anchor.states(tokens)[1:]]) for anchor in anchors
        ]
        for start in range(0, options.tokens, distributions.chunk):
            for anchor, states in zip(anchors, hidden, strict=True):
                anchor.logits(states[:, start : start + distributions.chunk])

    least()  # the first touch of the weights is nobody's
    return seconds(lambda: add(sums, tokens), least, repeats=options.repeats)


@torch.no_grad()
def add(sums: ProbedSums, tokens: TokenBatch) -> None:
    """What scoring does with a batch."""
    sums.update([anchor.states(tokens) for anchor in sums.distributions.anchors], tokens)


def thin_anchors(options: Options, *widths: int) -> tuple[LanguageAnchor, LanguageAnchor]:
    depths = options.source_blocks, options.target_blocks
    first, last = (thin_anchor(options, depth, width) for depth, width in zip(depths, widths, strict=True))
    return first, last


def thin_anchor(options: Options, depth: int, width: int) -> LanguageAnchor:
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=depth,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=True,
        bos_token_id=None,
    )
    return LanguageAnchor(LlamaForCausalLM(config).eval().to(getattr(torch, options.dtype)))


def logit_probes(anchors: tuple[LanguageAnchor, LanguageAnchor]) -> tuple[ProbeNet, ProbeNet]:
    first, last = (fit_probes(anchor, [], ProbeConfig(kind="logit")) for anchor in anchors)
    return first, last


def batch(options: Options, anchor: LanguageAnchor) -> TokenBatch:
    """Two sequences, of whose tokens as many count as asked for (the first of each does not)."""
    lengths = torch.tensor([options.tokens // 2 + 1, options.tokens - options.tokens // 2 + 1])
    ids = torch.randint(anchor.config.vocab_size, (2, int(lengths.max())))
    return TokenBatch(ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long())


def seconds(one: Callable[[], object], other: Callable[[], object], repeats: int) -> tuple[float, float]:
    """The shortest times of two calls, taken in turns so that other work on the machine hits both."""
    times: tuple[list[float], list[float]] = [], []
    for _ in range(repeats):
        for call, taken in zip((one, other), times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return min(times[0]), min(times[1])


if __name__ == "__main__":
    main(HfArgumentParser(Options).parse_args_into_dataclasses()[0])
