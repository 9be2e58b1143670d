"""`klas-hf draft`: which paths of a supernet are worth drafting with, foretold, measured, and by what arithmetic."""

from dataclasses import dataclass, field

from klas_hf.cli.data import DataOptions, read_texts, tokenizer_of
from klas_hf.cli.output import say
from klas_hf.cli.parsing import Command, flag, positional
from klas_hf.cli.usage import UsageOptions


@dataclass(frozen=True, kw_only=True)
class DraftOptions(UsageOptions, DataOptions):
    """Options of `klas-hf draft`."""

    supernet: str = positional("a saved supernet of language models: folder or Hub id")
    target: str | None = field(
        default=None, metadata={"metavar": "PATH", "help": "that the others draft for; without it, the dearest"}
    )
    measure: int = field(
        default=0, metadata={"metavar": "N", "help": "run assisted generation on N prompts for each draft"}
    )
    drafted: int = field(default=4, metadata={"metavar": "N", "help": "tokens at a time there"})
    sampling: bool = flag("draft and target sample at temperature 1; else they take the most likely token")
    timed: bool = flag("time drafts and target: what is saved is seconds, and MACs flatter drafts")


def run(options: DraftOptions) -> int:
    """Run `klas-hf draft`; its exit status."""
    from klas_hf.anchors.language import on_accelerator
    from klas_hf.data.text import TextBatches, text_sequences
    from klas_hf.evaluation.drafting import draft_table, measure_draft, score_drafts
    from klas_hf.paths import Path
    from klas_hf.processes import others_bars
    from klas_hf.stitching import StitchedSupernet, StitchedSupernetForCausalLM
    from klas_hf.stitching.supernet_budgets import path_costs

    tokenizer = tokenizer_of(options.supernet)
    sequences = text_sequences(read_texts(options.data), tokenizer, options.length)
    with others_bars():
        supernet = StitchedSupernet.from_pretrained(options.supernet, device_map=on_accelerator())
    if not isinstance(supernet, StitchedSupernetForCausalLM):
        raise ValueError(f"got {options.supernet}, a supernet of image classifiers; expected one of language models")
    usage = options.usage() if options.timed else None
    costs, _ = path_costs(supernet, usage)
    target = Path.of(options.target) if options.target else max(costs, key=lambda path: costs[path].macs)
    batches = TextBatches(sequences, options.batch_size, count=options.samples)
    drafts = score_drafts(supernet, batches, target=target, usage=usage)
    prompts = [sequence[: options.length // 2] for sequence in sequences[: options.measure]]
    if prompts:
        drafts = [
            measure_draft(supernet, one, prompts, target=target, drafted=options.drafted, sampling=options.sampling)
            for one in drafts
        ]
    say(f"Drafts for {target}, by {'seconds per token' if options.timed else 'MACs, not seconds (--timed)'}:\n")
    say(draft_table(drafts, sampling=options.sampling))
    say(_told)
    return 0


_told = """
Times as fast = (1 - a^(n+1)) / ((1 - a) (n c + r)), with a the share accepted, n tokens drafted at a time, c the
draft's part of the target's time for one token, and r how many times longer the target reads n + 1 tokens than one
(Leviathan et al. 2023, Theorem 3.8, where r is 1; so it is here without --timed). Where a <= c no draft pays."""

COMMAND = Command("Say which paths of a supernet pay as drafts for another, and what they save.", DraftOptions, run)
