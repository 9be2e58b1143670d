"""The best of several paths of one budget, found by healing them: a score of the start cannot know what each gains."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as Folder
from typing import Any

from transformers import PreTrainedModel

from klas_hf.budgets import Budget, Cost
from klas_hf.models import StitchedModel
from klas_hf.paths import Path
from klas_hf.scores.path_scores import PathScores
from klas_hf.stitching.assembly import assemble_best
from klas_hf.training.config import TrainingConfig
from klas_hf.training.healing import HealingResult, heal, healing_config, knows_nothing, split
from klas_hf.training.held_out import is_less
from klas_hf.training.rates import steps_of
from klas_hf.training.teachers import remember_answers


@dataclass(frozen=True)
class Contest:
    """What became of the paths that were healed.

    Attributes:
        model: the best one.
        healing: what healing it did.
        contenders: every path, with what healing did to it, in the order of their divergence.

    Example:
        >>> found = search_paths([source, target], batches, tokens=16)
        >>> options = {"config": healing_config(4, per_device_batch_size=2), "calibration": batches}
        >>> contest = heal_best([source, target], found, "70%", examples, validation=examples, **options)
        >>> contest.healing.end == min(healing.end for healing in contest.contenders.values())
        True
    """

    model: StitchedModel
    healing: HealingResult
    contenders: dict[Path, HealingResult]


def heal_best(
    anchors: Sequence[Any],
    found: PathScores,
    budget: Budget | Cost | str | float,
    data: Any,
    *,
    contenders: int = 4,
    teacher: PreTrainedModel | None = None,
    validation: Any = None,
    config: TrainingConfig | None = None,
    output_dir: str | Folder | None = None,
    **assembly: Any,
) -> Contest:
    """Make and heal the best paths within a budget, and keep the one that does best on held-out examples.

    Each is joined as `PathScores.joint(path, steps=…, known=…)` says, unless `assembly` does, and healed as by `heal`,
    with the same settings and for all of its steps: to give up half-way what is behind loses winners and saves little
    (LOG.md). Where the teacher does no better than chance, paths are joined as they are where they can be; where it
    does not know these data, so that the first learns from the labels alone, paths between other ends contend however
    far they start. Where it knows them and they are images, the first stays unless another's held-out loss is less by
    more than a standard error, since few images tell little of which is right more often.

    Args:
        anchors: those that were searched, in that order: Hub ids, folders or models.
        found: what the search found.
        budget: see `Budget.of`.
        data, teacher, validation, config: as for `heal`.
        contenders: paths to heal at most, as `PathScores.contenders` names them; 1: the best one alone.
        output_dir: where checkpoints go, a folder for each; interrupted, the same call goes on.
        assembly: as for `assemble_best`: `calibration`, `dtype`, `device_map`, …

    Returns:
        The model, with all contenders in its config's `search`; the divergence there is the search's, of the path as it
        starts, least squares merged where they can be.

    Raises:
        ValueError: as `PathScores.contenders`, `assemble_best` and `heal`.
        TrainingDiverged: as `heal`.

    Example:
        >>> found = search_paths([source, target], batches, tokens=16)
        >>> options = {"config": healing_config(4, per_device_batch_size=2), "calibration": batches}
        >>> contest = heal_best([source, target], found, "70%", examples, validation=examples, **options)
        >>> len(contest.contenders), contest.model.config.search["budget"]
        (3, '70%')
    """
    healed: dict[Path, HealingResult] = {}
    kept: tuple[Path, StitchedModel] | None = None
    config = config or healing_config()
    train, held = (data, validation) if validation is not None else split(data)
    steps = steps_of(config, train)
    named, known = found.contenders(budget, contenders, steps=steps), True
    with remember_answers(teacher):
        informed = teacher is None or not knows_nothing(teacher, held, config)
        while len(healed) < len(named):
            path = named[number := len(healed)]
            given = {"joint": found.joint(path, steps=steps, known=informed)} | assembly
            model = assemble_best(anchors, found, budget, path, **given)
            healed[path] = heal(
                model, train, teacher=teacher, validation=held, config=config,
                output_dir=None if output_dir is None else Folder(output_dir) / f"contender-{number}",
            )  # fmt: skip
            if not number and teacher is not None and not healed[path].distillation_weight:
                named, known = found.contenders(budget, contenders, steps=steps, known=False), False
            done, careful = healed.values(), known and model.main_input_name == "pixel_values"
            examples = [one.training.examples for one in done] if careful else ()
            if best_contender([one.end for one in done], examples) == number:
                kept = path, model
    assert kept is not None
    path, model = kept
    model.config.search["contenders"] = [
        {"path": str(of), "start": one.start, "end": one.end, "steps": one.training.steps} for of, one in healed.items()
    ]
    return Contest(model, healed[path], healed)


def best_contender(ends: Sequence[float], examples: Sequence[Sequence[float]] = ()) -> int:
    """The place of the best of some contenders, by held-out loss.

    Args:
        ends: held-out loss of each.
        examples: the losses of each on the held-out examples, where the first is to stay unless another's are less by
            more than a standard error; empty: by the least loss alone.
    """
    ahead = [place for place in range(len(ends)) if not place or not examples or is_less(examples[place], examples[0])]
    return min(ahead, key=ends.__getitem__)
