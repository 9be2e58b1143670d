"""`klas-hf draft`: which paths of a supernet are worth drafting with, foretold, measured, and by what arithmetic."""

from dataclasses import dataclass, field

from klas_hf.cli.data import DataOptions, load_supernet, read_texts
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

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("measure", 0), ("drafted", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"got {name}={getattr(self, name)}; expected at least {least}")


def run(options: DraftOptions) -> int:
    """Run `klas-hf draft`; its exit status."""
    from klas_hf.data.text import TextBatches, text_sequences
    from klas_hf.evaluation.drafting import draft_table, measure_draft, score_drafts
    from klas_hf.paths import Path
    from klas_hf.stitching.supernet_budgets import path_costs

    texts = read_texts(options.data)
    supernet, tokenizer = load_supernet(options.supernet)
    limit = min(config.max_position_embeddings for config in supernet.config.anchor_configs)
    if options.length > limit:
        raise ValueError(f"got length={options.length}; expected at most {limit:,}, which all anchors read")
    sequences = text_sequences(texts, tokenizer, options.length)
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
(Leviathan et al. 2023, Theorem 3.8, where r is 1; so it is here without --timed). Where a <= c no draft pays; above
the share that `pays above` names, some n does. What was measured counts before what was foretold."""

COMMAND = Command("Say which paths of a supernet pay as drafts for another, and what they save.", DraftOptions, run)
