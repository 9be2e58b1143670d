"""`klas-hf make`: from anchors and a budget to a model: search, assembly, healing, evaluation, card.

Every step leaves a file behind that the next one reads, so the same command goes on wherever it was interrupted.
"""

import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klas_hf.cli.make_steps import WORK, MakeData, MakeOptions, described, healed, measured, read_data, searched
from klas_hf.cli.output import check_output, check_writable, human_bytes, human_count, is_main_process, names, say
from klas_hf.cli.parsing import Command
from klas_hf.files import claim, remove_folder, understood, write_atomically
from klas_hf.tables import format_table

if TYPE_CHECKING:
    import torch

    from klas_hf.budgets import Budget
    from klas_hf.selection.plan import SearchPlan

RECORD = "klas_hf_make.json"  # of the run: its options, how far it is, what healing did
LEFT = ("paths.safetensors", "paths.png", "paths.svg", "rows.jsonl", "curve.png", "README.md")


def run(options: MakeOptions) -> int:
    """Go on from whatever step the folder holds; 0 at the end. Errors are for the command to tell."""
    output = Path(options.output).expanduser()
    check_writable(output)
    with nullcontext() if options.dry_run or not is_main_process() else claim(output):
        return _run(options, output)


def _run(options: MakeOptions, output: Path) -> int:
    from klas_hf.budgets import Budget
    from klas_hf.selection.plan import SearchPlan, unallocated_anchors

    budget = Budget.of(options.budget)
    state = {} if options.dry_run else _begun(output, options)
    if state.get("stage") == "finished":
        say(f"{output} holds the model of this run, which is finished; nothing to do")
        return 0
    shapes = unallocated_anchors(options.anchors)
    data = read_data(options)
    plan = SearchPlan(shapes, data.searched, None, options.length, options.usage(budget), budget)
    plan.check(budget)
    if options.dry_run:
        say(_foretold(plan, budget, data, options))
        return 0
    _note(output, state)
    found = searched(options, budget, data, output)
    if found.provenance["data"] != plan.digest:
        raise ValueError(
            f"got data={options.data}, whose content is not what {output} was begun with; name another output, or "
            "remove that one"
        )
    if state.get("stage") != "healed":
        state |= {"stage": "healed", "healing": healed(options, budget, plan.reference, found, data, output)}
        _note(output, state)
    rows = measured(options, budget, plan.reference, found, data, output)
    described(options, budget, rows, found, output)
    _note(output, state | {"stage": "finished"})
    if is_main_process() and (output / WORK).is_dir():
        remove_folder(output / WORK)
    say(format_table(rows, list(rows[0].metrics), plan.dearest.macs, budget.cost))
    say(f"\n{rows[-1].path}, for a budget of {budget.text}; {state['healing']}. Saved in {output}")
    return 0


def _begun(output: Path, options: MakeOptions) -> dict[str, Any]:
    """How far a run with these options has come in this folder; what another has left there goes, if that is asked.

    Raises:
        ValueError: the folder holds a run with other options, which are named.
        FileExistsError: it holds something else.
    """
    wanted = {name: value for name, value in asdict(options).items() if name not in ("output", "dry_run", "overwrite")}
    file = output / RECORD
    state: dict[str, Any] = {"options": wanted}
    if file.is_file():
        with understood(file, "what klas-hf make writes; remove it to begin anew"):
            state = json.loads(file.read_text(encoding="utf-8"))
            dict(state["options"])
    changed = [name for name in wanted if state["options"].get(name) != wanted[name]]
    goes_on = file.is_file() and not changed and state.get("stage") != "finished"
    if changed and not options.overwrite:
        there = ", ".join(f"{name}={state['options'].get(name)!r}, now {wanted[name]!r}" for name in changed)
        raise ValueError(
            f"got {output}, begun with other settings ({there}); repeat those, name another output, or add --overwrite"
        )
    check_output(output, options.overwrite, resumable=RECORD)
    if options.overwrite and not goes_on and is_main_process():
        for name in (RECORD, *LEFT):
            (output / name).unlink(missing_ok=True)
        if (output / WORK).is_dir():
            remove_folder(output / WORK)
    return {"options": wanted} if options.overwrite and not goes_on else state


def _note(output: Path, state: Mapping[str, Any]) -> None:
    """Write how far the run is."""
    from klas_hf.processes import process_state

    if is_main_process():
        write_atomically(output / RECORD, lambda path: path.write_text(json.dumps(state), encoding="utf-8"))
    process_state().wait_for_everyone()


def _foretold(plan: "SearchPlan", budget: "Budget", data: MakeData, options: MakeOptions) -> str:
    """What a run would do."""
    from klas_hf.cli.headers import stored_tensors

    weights = sum(one.bytes for anchor in options.anchors for one in stored_tensors(anchor).values())
    first, size = plan.first(), plan.bytes_per_parameter
    within = sum(budget.allows(plan.cost(path), plan.dearest, size) for path in first)
    items = sum(map(len, [*plan.calibration, *plan.scored]))
    teacher, dearest = options.anchors[plan.reference], plan.dearest
    rate = _macs_per_second(plan.anchors[plan.reference].model.dtype)
    runs = 1.4 * options.contenders  # four of a tenth of the steps before each
    healing = runs * options.steps * options.batch_size * 4 * dearest.macs  # forward, twice that back, the teacher's
    lines = [
        f"weights to be read: {human_bytes(weights)} of {names(options.anchors)}",
        f"dearest anchor: {teacher}, {human_count(dearest.macs)} MACs, {human_count(dearest.parameters)} parameters",
        f"search over {plan.config.cost}: {len(first):,} paths of one joint, {within:,} of them within {budget.text}, "
        f"then their neighbours; at most {plan.forwards:,} runs of a block on one of {items:,} sequences or images"
        f"{f' (a run of the head, for every path, counts as {plan.head:,})' if plan.head else ''}, "
        f"{_time(plan.forwards * dearest.macs / plan.anchors[plan.reference].num_blocks, rate)}",
        f"healing: {options.steps:,} steps of up to {options.contenders} paths, and short runs to find their rates, "
        f"{_time(healing, rate)}; "
        f"teacher: {teacher}",
        f"measured on {sum(map(_items, data.held_out)):,} sequences or images; nothing was loaded",
    ]
    return "\n".join(lines)


def _macs_per_second(dtype: "torch.dtype") -> float:
    """Multiply-accumulates that products of matrices reach here, which no model does."""
    import torch

    from klas_hf.processes import process_state

    side, device = 1024, process_state().device
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    float((matrix @ matrix)[0, 0])  # what the first one takes is not counted
    runs, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < 0.2:
        float((matrix @ matrix)[0, 0])
        runs += 1
    return runs * side**3 / (time.perf_counter() - begun)


def _time(macs: float, rate: float) -> str:
    """How long so many multiply-accumulates take at least."""
    seconds = macs / rate
    told = (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.0f} h"
    )
    return f"{told} or more here"


def _items(batch: Mapping[str, Any]) -> int:
    return len(batch["labels"])


COMMAND = Command(
    "Make the best model within a budget out of anchors: search its path, assemble, heal, measure, write its card. The "
    "same command goes on with an interrupted run.",
    MakeOptions,
    run,
)
