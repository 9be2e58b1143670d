"""Every step on Llama 3.2 1B and 3B at their full widths, of fewer blocks where the machine is small.

    python -m benchmarks.full_size --blocks 4 --tokens 64 --sequences 2
    python -m benchmarks.full_size --blocks 2 --vocabulary 32064 --tokens 64 --sequences 2 --only full_step
    python -m benchmarks.full_size --blocks 16 --tokens 128 --sequences 128 --device cuda

Random weights in bf16. Each step is a process of its own: its time, and what it grew by at its peak, of which the
weights alone take what stands beside it; the last column is that of all 16 and 28 blocks and 128,256 tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, HfArgumentParser, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.measuring import growth_of, in_child
from benchmarks.models import halves, llama_configs, saved_llamas, sequences
from benchmarks.options import Options
from benchmarks.scoring import _rears
from klas_hf import FunctionalScoring, Stitch, StitchedModel, TrainingConfig, score_stitches, train_stitches
from klas_hf.data.text import text_examples
from klas_hf.tables import markdown_table

HEADING = ["step", "seconds", "peak, MiB", "of it weights, MiB", "weights at full depth, MiB"]
DECODED = 8  # tokens


def main() -> None:
    parser = HfArgumentParser(Options, prog="python -m benchmarks.full_size", description=__doc__.split("\n")[0])
    parser.set_defaults(scale=1, blocks=4, vocabulary=128_256, dtype="bfloat16")
    options = parser.parse_args_into_dataclasses()[0]
    if unknown := sorted(set(options.only or ()) - set(STEPS)):
        parser.error(f"got --only {' '.join(unknown)}; expected some of {', '.join(STEPS)}")
    options.prepare()
    whole = replace(options, blocks=16, vocabulary=128_256)
    lines = [HEADING]
    with saved_llamas(options, 1) as folder:
        for name in options.only or STEPS:
            found = in_child(options, f"full_size:{name}", str(folder))
            weights = [STEPS[name][1](*mebibytes(one)) for one in (options, whole)]
            lines.append([STEPS[name][0], f"{found['seconds']:.3g}", *(f"{x:,.0f}" for x in (found["peak"], *weights))])
            print(lines[-1], {key: found[key] for key in found.keys() - {"seconds", "peak"}}, flush=True)
    print(markdown_table(lines))


def mebibytes(options: Options) -> tuple[float, float]:
    """Of the weights of both anchors, and of the model stitched of their halves, whose embedding and head are two."""
    configs = llama_configs(options, 1)
    with torch.device("meta"):
        anchors = [LlamaForCausalLM(config) for config in configs]
    whole = [sum(parameter.numel() for parameter in anchor.parameters()) for anchor in anchors]
    block = [sum(parameter.numel() for parameter in anchor.model.layers[0].parameters()) for anchor in anchors]
    stitch = halves(*configs)
    stitched = _head(configs[0]) + _head(configs[1]) + (configs[0].hidden_size + 2) * configs[1].hidden_size
    stitched += stitch.source_stop * block[0] + (configs[1].num_hidden_layers - stitch.target_start) * block[1]
    size = getattr(torch, options.dtype).itemsize
    return sum(whole) * size / 2**20, stitched * size / 2**20


def _head(config: LlamaConfig) -> int:
    return config.vocab_size * config.hidden_size


# ---- the steps


def load(options: Options, folder: str) -> Mapping[str, float]:
    return growth_of(lambda: [touched(anchor) for anchor in _anchors(options, folder)])


def from_anchors(options: Options, folder: str) -> Mapping[str, float]:
    return growth_of(lambda: touched(_stitched(options, folder)))


def least_squares(options: Options, folder: str) -> Mapping[str, float]:
    data = sequences(options, options.sequences)
    return growth_of(lambda: touched(_stitched(options, folder, calibration=data)))


def score(options: Options, folder: str) -> Mapping[str, float]:
    """Every stitch but those that enter the target's first block, in full, from folders; and their rears alone."""
    data, fitting = (sequences(options, options.sequences, seed) for seed in range(2))
    small, large = llama_configs(options, 1)
    pairs = [(i + 1, j) for i in range(small.num_hidden_layers) for j in range(1, large.num_hidden_layers)]
    settings = FunctionalScoring(fitting, [Stitch(*pair) for pair in pairs], scored_items=None)
    both = [f"{folder}/source", f"{folder}/target"]
    found = growth_of(
        lambda: score_stitches(*both, data, functional=settings, tokens=options.tokens, device_map=options.device)
    )
    return {**found, "pairs": len(pairs), "rears": _rears(_anchors(options, folder)[1], pairs, data, options)}


def prefill(options: Options, folder: str) -> Mapping[str, float]:
    ids = sequences(options, 1)[0]["input_ids"].to(options.device)
    return growth_of(lambda: _run(touched(_stitched(options, folder)), ids, 0))


def decode(options: Options, folder: str) -> Mapping[str, float]:
    ids = sequences(options, 1)[0]["input_ids"].to(options.device)
    return growth_of(lambda: _run(touched(_stitched(options, folder)), ids, DECODED))


def lora_step(options: Options, folder: str) -> Mapping[str, float]:
    return _trained(options, folder, "lora")


def full_step(options: Options, folder: str) -> Mapping[str, float]:
    return _trained(options, folder, "full")


Weights = Callable[[float, float], float]  # of both anchors' and the stitched model's
STEPS: dict[str, tuple[str, Weights]] = {
    "load": ("both anchors loaded", lambda both, _: both),
    "from_anchors": ("`from_anchors`, halves", lambda _, one: one),
    "least_squares": ("the same with least squares", lambda _, one: one),
    "score": ("stitches scored, anchors loaded", lambda both, _: both),
    "prefill": ("loaded, prefill", lambda _, one: one),
    "decode": (f"loaded, prefill, {DECODED} tokens decoded", lambda _, one: one),
    "lora_step": ("loaded, one LoRA step", lambda _, one: one),
    "full_step": ("loaded, one full step (16 bytes a weight)", lambda _, one: 8 * one),
}  # of weights in bf16; AdamW has four numbers in fp32 for each that learns


def touched(model: PreTrainedModel) -> PreTrainedModel:
    """With all of its weights read: what is not would not be in memory."""
    for parameter in model.parameters():
        parameter.sum()
    return model


def _anchors(options: Options, folder: str) -> list[PreTrainedModel]:
    return [
        AutoModelForCausalLM.from_pretrained(f"{folder}/{one}", device_map=options.device, dtype=options.dtype)
        for one in ("source", "target")
    ]


def _stitched(options: Options, folder: str, **given: object) -> PreTrainedModel:
    stitch, both = halves(*llama_configs(options, 1)), [f"{folder}/source", f"{folder}/target"]
    return StitchedModel.from_anchors(*both, stitch, device_map=options.device, **given)


@torch.no_grad()
def _run(model: PreTrainedModel, ids: torch.Tensor, tokens: int) -> None:
    if tokens:
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    else:
        model(ids, logits_to_keep=1)


def _trained(options: Options, folder: str, trainable: str) -> Mapping[str, float]:
    examples = text_examples(torch.cat([one["input_ids"] for one in sequences(options, options.sequences)]).tolist())
    config = TrainingConfig(
        trainable=trainable, max_steps=1, per_device_batch_size=len(examples), gradient_accumulation_steps=1,
        mixed_precision="bf16",
    )  # fmt: skip
    return growth_of(lambda: train_stitches(_stitched(options, folder), examples, config))


if __name__ == "__main__":
    main()
