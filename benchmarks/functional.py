"""What functional scoring of two decoders costs: seconds, passes and memory, measured here and planned for real sizes.

    python benchmarks/functional.py --threads 1                     # widths of Llama 3.2 1B and 3B, few blocks
    python benchmarks/functional.py --device cuda --blocks 16 28 --vocabulary 128256 --dtype bfloat16  # all of them

Random weights. The plan is arithmetic from the configurations alone; what was measured stands beside the plan for the
same sizes.
"""

import argparse
import resource
import time
import warnings

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from klas_hf import FunctionalScoring, measure_stitch_costs, score_stitches
from klas_hf.scores.functional import pair_groups

GIB = 1 << 30


def llama(blocks: int, width: int, heads: int, hidden: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads, num_key_value_heads=8,
        head_dim=width // heads, intermediate_size=hidden, vocab_size=vocabulary, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip


def plan(configs: tuple[LlamaConfig, LlamaConfig], args: argparse.Namespace, blocks: tuple[int, int]) -> list[str]:
    """Memory and work of scoring all pairs, from the configurations."""
    m, n = blocks
    widths = [configs[0].hidden_size] * (m + 1), [configs[1].hidden_size] * (n + 1)
    pairs = [(i, j) for i in range(1, m + 1) for j in range(1, n)]
    moments = 8 * (m * widths[0][0] ** 2 + (n - 1) * widths[1][0] ** 2 + len(pairs) * widths[0][0] * widths[1][0])
    groups = len(pair_groups(pairs, widths, int(args.moment_gib * GIB)))
    costs = measure_stitch_costs(*(resized(one, k) for one, k in zip(configs, blocks, strict=True)), tokens=args.tokens)
    rear = sum(int(costs.target_blocks[j:].sum()) + costs.ends for _, j in pairs)
    both = costs.source_total + costs.target_total
    fit = args.calibration * args.tokens * len(pairs) * widths[0][0] * widths[1][0]
    maps = getattr(torch, args.dtype).itemsize * len(pairs) * widths[0][0] * widths[1][0]
    return [
        f"{m}×{n} blocks, {len(pairs)} pairs",
        f"{moments / GIB:.1f}",
        f"{maps / GIB:.1f}",
        f"{groups}",
        f"{groups * (args.calibration + args.scored) * both / 1e12:.1f}",
        f"{fit / 1e12:.1f}",
        f"{args.scored * rear / 1e12:.1f}",
    ]


def resized(config: LlamaConfig, blocks: int) -> LlamaConfig:
    return LlamaConfig(**{**config.to_dict(), "num_hidden_layers": blocks, "layer_types": None})


def model(config: LlamaConfig, args: argparse.Namespace) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).to(args.device).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, nargs=2, default=[3, 4], help="of source and target")
    parser.add_argument("--widths", type=int, nargs=2, default=[2048, 3072])
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--calibration", type=int, default=32, help="sequences")
    parser.add_argument("--scored", type=int, default=8, help="sequences")
    parser.add_argument("--batch", type=int, default=4, help="sequences that run together")
    parser.add_argument("--moment_gib", type=float, default=4.0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: no result")
    args = parser.parse_args()
    if args.smoke:
        args.blocks, args.widths, args.vocabulary, args.calibration, args.scored = [2, 3], [64, 128], 256, 4, 2
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    heads = 32 if args.widths[0] == 2048 else 8, 24 if args.widths[1] == 3072 else 8
    configs = tuple(
        llama(blocks, width, one, 4 * width if width == 2048 else width * 8 // 3, args.vocabulary)
        for blocks, width, one in zip(args.blocks, args.widths, heads, strict=True)
    )
    ids = torch.randint(2, args.vocabulary, (args.calibration + args.scored, args.tokens))
    batches = [{"input_ids": part} for part in ids.split(args.batch)]
    models = [model(config, args) for config in configs]
    before, start = peak(args), time.perf_counter()
    scores = score_stitches(
        models[0], models[1], batches[args.calibration // args.batch :], score="functional", tokens=args.tokens,
        functional=FunctionalScoring(
            calibration=batches[: args.calibration // args.batch], moment_bytes=int(args.moment_gib * GIB),
            rear_bytes=16 << 20,
        ),
    )  # fmt: skip
    seconds = time.perf_counter() - start
    passes = scores.provenance["functional"]["passes"]
    print(f"measured: {seconds:.1f} s, {passes} pass(es), {(peak(args) - before) / GIB:.2f} GiB beside the models\n")
    print("| plan | sums, GiB | maps, GiB | passes | forwards, T MACs | fits, T MACs | rears, T MACs |")
    print("|---|---|---|---|---|---|---|")
    for blocks in (tuple(args.blocks), (16, 28)):
        print("| " + " | ".join(plan(configs, args, blocks)) + " |")


def peak(args: argparse.Namespace) -> int:
    """Bytes, at most so far."""
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
