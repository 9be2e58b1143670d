"""`klas-hf select`: stitches from a file of scores, by any rule (KLAS Alg. 3 and what it is compared with).

With a budget, one of them is recommended.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from klas_hf.budgets import Budget, Cost, check_budget
from klas_hf.cli.output import say, say_json
from klas_hf.cli.parsing import Command, flag, positional
from klas_hf.cli.usage import UsageOptions
from klas_hf.paths import Stitch
from klas_hf.scores.values import SCORES, StitchScores
from klas_hf.selection.choice import StitchSelection, merge_selections
from klas_hf.selection.klas import select_stitches
from klas_hf.selection.rivals import esta_stitches, min_kl_stitches, random_stitches
from klas_hf.selection.snnet import snnet_stitches
from klas_hf.tables import markdown_table

if TYPE_CHECKING:
    from klas_hf.costs import Usage

EVERY = 1e12  # a threshold that all stitches of a bucket are within
RULES = (*SCORES, "min_kl", "esta", "snnet", "random")


@dataclass(frozen=True, kw_only=True)
class SelectOptions(UsageOptions):
    """Options of `klas-hf select`."""

    scores: str = positional("what `klas-hf score` wrote")
    rule: str | None = field(
        default=None, metadata={"help": f"{', '.join(RULES)}; without it, the score that the file is ranked by"}
    )
    buckets: int = field(default=20, metadata={"metavar": "N", "help": "cost buckets; for min_kl, how many stitches"})
    threshold: float = field(default=0.05, metadata={"metavar": "TAU", "help": "of Eq. 3, relative"})
    seed: int = field(default=0, metadata={"metavar": "N", "help": "of the rule random"})
    budget: str | None = field(
        default=None,
        metadata={
            "metavar": "SIZE",
            "help": "recommend one: 60%% (of the target's MACs), 2B, 4GB, 20ms, or '4GB, 20ms'",
        },
    )
    json: bool = flag("print JSON")


def run(options: SelectOptions) -> int:
    """Run `klas-hf select`; its exit status."""
    scores = load_scores(options.scores)
    chosen, best, why = choose(scores, options), None, ""
    if options.budget is not None:
        chosen, best, why = recommended(chosen, scores, options)
    if options.json:
        listed = described(chosen, scores)
        found: dict[str, Any] = {"rule": chosen.rule, "candidates": chosen.candidates, "stitches": listed}
        if best is not None:
            found["recommended"] = listed[chosen.stitches.index(best)] | {"why": why}
        say_json(found)
    else:
        say(table(chosen, scores, best) + (f"\n\n{why}" if why else ""))
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


def recommended(
    chosen: StitchSelection, scores: StitchScores, options: SelectOptions
) -> tuple[StitchSelection, Stitch, str]:
    """The stitch of the lowest score within the budget, the choice with it, and why; without a score, the dearest.

    A rule keeps the best of each cost bucket; of a bucket that the budget cuts in two, the others are looked at too.

    Raises:
        ValueError: no stitch is within the budget, or the target itself is; the range is named.
    """
    budget, target = Budget.of(str(options.budget)), scores.provenance.get("target", {})
    if "parameters" not in target:
        raise ValueError(f"got {options.scores}, which does not say how large the target is; score again")
    every, size = choose(scores, replace(options, threshold=EVERY)), target["bytes_per_parameter"]
    costs, whole = _costs(every, scores, budget, options.usage(budget))
    check_budget(budget, costs, whole, size)
    within = [n for n, cost in enumerate(costs) if budget.allows(cost, whole, size)]
    scored = not math.isnan(every.values[within[0]])
    place = min(within, key=lambda n: (every.values[n] if scored else 0, -every.macs[n]))
    both = merge_selections([chosen, every.take([place])])
    reason = f"has the lowest {every.rule}, {every.values[place]:.4g}," if scored else "is the dearest"
    why = f"{every[place]} {reason} of the {len(within)} stitches within the budget of {budget.text}."
    return replace(both, candidates=chosen.candidates, outside=chosen.outside), every[place], why


def _costs(
    every: StitchSelection, scores: StitchScores, budget: Budget, usage: "Usage | None"
) -> tuple[list[Cost], Cost]:
    """Of all stitches, and of the target: as they were counted, or anew from the anchors' configurations."""
    counted = scores.costs
    if usage is None and budget.kv_bytes_per_token is None:
        whole = Cost(counted.target_total, scores.provenance["target"]["parameters"])
        return [Cost(*counted.of(stitch)) for stitch in every], whole
    from klas_hf.anchors.language import anchor_config, hub_options
    from klas_hf.costs import measure_path_costs

    anchors = [scores.provenance[side] for side in ("source", "target")]
    configs = [anchor_config(one["name"], **hub_options({}, one["revision"])) for one in anchors]
    size = (counted.image_height, counted.image_width) if counted.image_height else None
    found = measure_path_costs(configs, tokens=counted.tokens, image_size=size, usage=usage)
    return [found.of(Stitch(one.source_stop, one.target_start)) for one in every], found.of("1[:]")


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


def table(chosen: StitchSelection, scores: StitchScores, best: Stitch | None = None) -> str:
    """The stitches as a table, cheapest first; the one that is recommended is marked."""
    lines = [["stitch", "M parameters", "M MACs", "of target", chosen.rule]]
    for stitch, value in zip(chosen.stitches, chosen.values, strict=True):
        macs, parameters = scores.costs.of(stitch)
        share = f"{macs / scores.costs.target_total:.0%}"
        shown = "–" if value != value else f"{value:.4g}"
        name = f"{stitch} ← recommended" if stitch == best else str(stitch)
        lines.append([name, f"{parameters / 1e6:,.2f}", f"{macs / 1e6:,.1f}", share, shown])
    return markdown_table(lines)


COMMAND = Command("Choose stitches from a file of scores, cheapest first.", SelectOptions, run)
