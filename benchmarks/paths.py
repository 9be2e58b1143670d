"""What LOG.md says of the search over paths, on the quickstart's anchors; planned for real sizes.

    accelerate launch recipes/quickstart.py                          # trains and keeps the two anchors
    python benchmarks/paths.py search --anchors ~/.cache/klas_hf/quickstart/steps-500-1200-seed-0
    python benchmarks/paths.py plan                                  # Llama 3.2 1B and 3B, from configurations alone

`search` measures in full every path of one joint, and all of two within the large anchor that one move makes of these,
beside what few items say of them and what `search_paths` finds.
"""

import argparse
import tempfile
import time
from pathlib import Path as Folder

import torch
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from klas_hf import FunctionalScoring, SearchConfig, search_paths
from klas_hf.anchors.loading import load_anchors
from klas_hf.data.text import TextBatches, held_out, python_documentation, text_sequences
from klas_hf.scores.paths import PathScorer
from klas_hf.selection.plan import SearchPlan, unallocated_anchors

LENGTH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("search", "plan"))
    parser.add_argument("--anchors", type=Folder, help="folder with the anchors small and large")
    options = parser.parse_args()
    if options.what == "plan":
        plan()
        return
    if options.anchors is None or not (options.anchors.expanduser() / "small").is_dir():
        parser.error(
            f"got --anchors {options.anchors}; expected a folder with small and large, such as the quickstart's"
        )
    places = [options.anchors.expanduser() / name for name in ("small", "large")]
    models, tokenizer = (
        [AutoModelForCausalLM.from_pretrained(one) for one in places],
        AutoTokenizer.from_pretrained(places[0]),
    )
    search(models, tokenizer)


def search(models: list[PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> None:
    """Every path measured, what few items say of them, and what the search finds."""
    learnt, unseen = (text_sequences(texts, tokenizer, LENGTH) for texts in held_out(python_documentation()))
    fit, scored = TextBatches(learnt[:: len(learnt) // 128][:128], 16), TextBatches(unseen[::2][:128], 16)
    config = SearchConfig(scoring=FunctionalScoring(calibration=fit, temperature=1.0))
    anchors = load_anchors(models)
    planned = SearchPlan(anchors, scored, config, LENGTH)
    one = planned.first()
    cut = {path for first in one for move, path in planned.moves.neighbours(first) if move in ("cut", "put back")}
    two = sorted(
        (path for path in cut if path.anchors == (1,) and path.joints == 2 and planned.searched(path)), key=str
    )
    scorer = PathScorer(anchors, planned.reference, planned.calibration, planned.scored)
    every = [*one, *two]
    full = dict(zip(every, (score.divergence for score in scorer.score(every)), strict=True))
    print(f"{len(one)} paths of one joint and {len(two)} of two within the large anchor, measured in full")
    for batches in (planned.few, 4):
        few = [score.divergence for score in scorer.score(every, batches, planned.fitted)]
        print(f"Spearman of {16 * batches} items with all: {spearmanr(few, list(full.values())).statistic:.3f}")
    begun = time.perf_counter()
    found = search_paths(models, scored, config, tokens=LENGTH)
    spent = f"{found.provenance['spent']:,} of {found.provenance['limit']:,}"
    print(f"search: {len(found)} paths in full, {spent} runs of a block, {time.perf_counter() - begun:.0f} s")
    print("| share of MACs | best of all measured | found by the search |\n|---|---|---|")
    for budget in (0.45, 0.57, 0.67, 0.8, 0.9):
        within = [path for path in every if planned.macs(path) <= budget * planned.dearest.macs]
        best, ours = min(within, key=full.__getitem__), found.best(budget)
        print(f"| {budget:.0%} | {full[best]:.4f} `{best}` | {found.divergence[found.place(ours)]:.4f} `{ours}` |")


def plan() -> None:
    """Forwards that a search over Llama 3.2 1B and 3B may spend."""
    shared = {"vocab_size": 128256, "intermediate_size": 8192, "num_key_value_heads": 8, "tie_word_embeddings": True}
    shapes = (
        {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64},
        {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128},
    )
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folders = [Folder(name) / str(number) for number in range(len(shapes))]
        for folder, shape in zip(folders, shapes, strict=True):
            LlamaConfig(bos_token_id=128000, **shared, **shape).save_pretrained(folder)
        anchors = unallocated_anchors(folders)
    batches = [torch.randint(1000, (16, 128)) for _ in range(16)]
    planned = SearchPlan(anchors, batches, SearchConfig(), 128)
    first = planned.first()
    screening = sum(planned.price(path, planned.few) for path in first)
    print(f"{len(first):,} paths of one joint, screened with {screening:,} runs of a block on one sequence;")
    print(f"{planned.forwards:,} are allowed, three times what scoring all stitches in range takes;")
    print(f"planned in {time.perf_counter() - begun:.1f} s")


if __name__ == "__main__":
    main()
