"""`klas-hf select`: stitches from a file of scores, by any rule (KLAS Alg. 3 and what it is compared with)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from klas_hf.cli.output import amount, say, say_json
from klas_hf.cli.parsing import Command, flag, positional
from klas_hf.rows import markdown_table
from klas_hf.scores.values import SCORES, StitchScores
from klas_hf.selection.choice import StitchSelection
from klas_hf.selection.klas import select_stitches
from klas_hf.selection.rivals import esta_stitches, min_kl_stitches, random_stitches
from klas_hf.selection.snnet import snnet_stitches

RULES = (*SCORES, "min_kl", "esta", "snnet", "random")


@dataclass(frozen=True, kw_only=True)
class SelectOptions:
    """Options of `klas-hf select`."""

    scores: str = positional("what `klas-hf score` wrote")
    rule: str | None = field(
        default=None, metadata={"help": f"{', '.join(RULES)}; without it, the score that the file is ranked by"}
    )
    buckets: int = field(default=20, metadata={"metavar": "N", "help": "cost buckets; for min_kl, how many stitches"})
    threshold: float = field(default=0.05, metadata={"metavar": "TAU", "help": "of Eq. 3, relative"})
    seed: int = field(default=0, metadata={"metavar": "N", "help": "of the rule random"})
    macs: str | None = field(default=None, metadata={"metavar": "N", "help": "only stitches of so many MACs, as 1.5G"})
    parameters: str | None = field(
        default=None, metadata={"metavar": "N", "help": "only stitches of so many parameters, as 300M"}
    )
    json: bool = flag("print JSON")


def run(options: SelectOptions) -> int:
    scores = load_scores(options.scores)
    chosen = within_budget(choose(scores, options), scores, options)
    if options.json:
        say_json({"rule": chosen.rule, "candidates": chosen.candidates, "stitches": described(chosen, scores)})
    else:
        say(table(chosen, scores))
    return 0


def load_scores(path: str) -> StitchScores:
    """What `klas-hf score` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or is damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"got {path}, which is no file; expected what `klas-hf score` wrote")
    try:
        return StitchScores.load(path)
    except SafetensorError as error:
        raise ValueError(f"got {path}, which is no whole safetensors file ({error}); score again") from error


def choose(scores: StitchScores, options: SelectOptions) -> StitchSelection:
    """The stitches of the rule that the options name.

    Raises:
        ValueError: an unknown rule, or one whose statistics are not in the file.
    """
    rule = options.rule or scores.score
    others = {
        "min_kl": lambda: min_kl_stitches(scores, options.buckets),
        "esta": lambda: esta_stitches(scores.costs),
        "snnet": lambda: snnet_stitches(scores.costs),
        "random": lambda: random_stitches(scores.costs, buckets=options.buckets, seed=options.seed),
    }
    if rule in others:
        return others[rule]()
    if rule not in SCORES:
        raise ValueError(f"got the rule {rule!r}; expected one of {RULES}")
    return select_stitches(scores.with_score(rule), buckets=options.buckets, threshold=options.threshold)


def within_budget(chosen: StitchSelection, scores: StitchScores, options: SelectOptions) -> StitchSelection:
    """The stitches that cost at most what the options allow.

    Raises:
        ValueError: there is none.
    """
    for name, budget, place in (("MACs", options.macs, 0), ("parameters", options.parameters, 1)):
        if budget is None:
            continue
        costs = [scores.costs.of(stitch)[place] for stitch in chosen]
        kept = chosen.take([n for n, cost in enumerate(costs) if cost <= amount(budget)])
        if not len(kept):
            raise ValueError(
                f"got a budget of {amount(budget):,} {name}; expected at least {min(costs, default=0):,}, which the "
                f"least of the {len(costs)} stitches chosen by {chosen.rule} needs"
            )
        chosen = kept
    return chosen


def described(chosen: StitchSelection, scores: StitchScores) -> list[dict[str, Any]]:
    """The stitches as JSON values."""
    places = zip(chosen.stitches, chosen.values, chosen.buckets, strict=True)
    return [
        {
            "source_stop": stitch.source_stop,
            "target_start": stitch.target_start,
            "macs": scores.costs.of(stitch)[0],
            "parameters": scores.costs.of(stitch)[1],
            "value": value,
            "bucket": bucket,
        }
        for stitch, value, bucket in places
    ]


def table(chosen: StitchSelection, scores: StitchScores) -> str:
    """The stitches as a table, cheapest first."""
    lines = [["stitch", "M parameters", "M MACs", "of target", chosen.rule]]
    for stitch, value in zip(chosen.stitches, chosen.values, strict=True):
        macs, parameters = scores.costs.of(stitch)
        share = f"{macs / scores.costs.target_total:.0%}"
        shown = "–" if value != value else f"{value:.4g}"
        lines.append([str(stitch), f"{parameters / 1e6:,.2f}", f"{macs / 1e6:,.1f}", share, shown])
    return markdown_table(lines)


COMMAND = Command("Choose stitches from a file of scores, cheapest first.", SelectOptions, run)
