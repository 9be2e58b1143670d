"""What takes no model at all: counting costs, selecting, ROUGE, and the import."""

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np

from benchmarks.measuring import ROOT, Figure, in_turns, seconds
from benchmarks.models import llama_configs, swins
from benchmarks.options import Options
from klas_hf import measure_stitch_costs
from klas_hf.evaluation.truthfulqa_rouge import lm_eval_correct, rouge_readings
from klas_hf.maths.buckets import bucket_of
from klas_hf.selection.klas import near_bucket_minimum

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "over", "one", "two", "big", "small", "no", "yes", "it", "is", "house"]


def figures(options: Options) -> Iterator[Figure]:
    pairs = {
        "Llama 3.2 1B and 3B": [llama_configs(Options(blocks=16, vocabulary=128_256), 1)],
        "Swin Ti/S/B": [(a, b) for place, a in enumerate(swins(options)) for b in swins(options)[place + 1 :]],
    }
    for name, configs in pairs.items():
        costs = []
        taken = seconds(
            lambda configs=configs, costs=costs: costs.extend(measure_stitch_costs(*one) for one in configs)
        )
        count = sum(one.macs.size if one.allowed is None else int(one.allowed.sum()) for one in costs)
        yield Figure(f"costs of all {count} stitches of {name}", taken, "10 s", 10, "s", 1)
    yield _selecting(options)
    yield from _importing(options)
    if find_spec("lm_eval"):
        yield _rouge(options)


def _selecting(options: Options) -> Figure:
    generator = np.random.default_rng(0)
    values, macs = generator.random(1_000_000), generator.integers(10**9, 3 * 10**9, 1_000_000)
    (taken,) = in_turns(
        options.repeats, lambda: near_bucket_minimum(values, bucket_of(macs, 10**9, 3 * 10**9, 20), 0.05)
    )
    return Figure("selecting among a million candidates", taken, "1 s", 1, "s", 1)


def _importing(options: Options) -> Iterator[Figure]:
    classes = "from transformers import AutoModel, GenerationMixin, PreTrainedModel"
    ours, theirs, lazy = _import_seconds(options, "import klas_hf", classes, "import transformers")
    yield Figure("import klas_hf", ours, "the classes of transformers it registers with", theirs, "s", 1.15)
    yield Figure("import klas_hf", ours, "import transformers, which is lazy", lazy, "s")


def _import_seconds(options: Options, *statements: str) -> list[float]:
    def run(statement: str) -> float:
        code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        return float(done.stdout)

    turns = [[run(statement) for statement in statements] for _ in range(options.repeats + (not options.quick))]
    return [min(column) for column in zip(*turns[0 if options.quick else 1 :], strict=True)]


def _rouge(options: Options) -> Figure:
    """All three readings of the references here; the harness has one."""
    from lm_eval.tasks.truthfulqa.utils import rouge

    generator = np.random.default_rng(0)

    def sentence() -> str:
        return " ".join(generator.choice(WORDS, generator.integers(3, 15))) + "."

    answers = [sentence() for _ in range(3 if options.quick else 40)]
    references = [
        {
            "best_answer": sentence(),
            "correct_answers": [sentence() for _ in range(4)],
            "incorrect_answers": [sentence() for _ in range(4)],
        }
        for _ in answers
    ]

    def harness() -> None:
        for answer, reference in zip(answers, references, strict=True):
            every = lm_eval_correct(reference) + reference["incorrect_answers"]
            for one in every:
                rouge([one], [answer])

    ours, theirs = in_turns(1, lambda: rouge_readings(answers, references), harness)
    return Figure(f"ROUGE of {len(answers)} answers, three readings", ours, "lm-eval's, one reading", theirs, "s", 1)
