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
from klas_hf.training.healing import HealingResult, heal
from klas_hf.training.loop import GiveUp

HOPE = 2.0  # times as fast as until now that a contender may still get better, before it is given up


@dataclass(frozen=True)
class Contest:
    """What became of the paths that were healed.

    Attributes:
        model: the one of least held-out loss.
        healing: what healing it did.
        contenders: every path, with what healing did to it, in the order of their divergence.

    Example:
        >>> found = search_paths([source, target], batches, tokens=16)
        >>> config = healing_config(4, per_device_batch_size=2)
        >>> contest = heal_best([source, target], found, "70%", examples, calibration=batches, config=config)
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
    contenders: int = 3,
    teacher: PreTrainedModel | None = None,
    validation: Any = None,
    config: TrainingConfig | None = None,
    output_dir: str | Folder | None = None,
    **assembly: Any,
) -> Contest:
    """Make and heal the best paths within a budget, and keep the one that does best on held-out examples.

    Each is healed as by `heal`, with the same settings. One that is behind after half of its steps, and would stay so
    at twice the pace at which it has been getting better, is given up.

    Args:
        anchors: those that were searched, in that order: Hub ids, folders or models.
        found: what the search found.
        budget: see `Budget.of`.
        data, teacher, validation, config: as for `heal`.
        contenders: paths to heal at most, as `PathScores.contenders` names them; 1: the best one alone.
        output_dir: where checkpoints go, a folder for each; interrupted, the same call goes on.
        assembly: as for `assemble_best`: `calibration`, `dtype`, `device_map`, …

    Returns:
        The model, with all contenders in its config's `search`.

    Raises:
        ValueError: as `PathScores.contenders`, `assemble_best` and `heal`.
        TrainingDiverged: as `heal`.

    Example:
        >>> found = search_paths([source, target], batches, tokens=16)
        >>> config = healing_config(4, per_device_batch_size=2)
        >>> contest = heal_best([source, target], found, "70%", examples, calibration=batches, config=config)
        >>> len(contest.contenders), contest.model.config.search["budget"]
        (3, '70%')
    """
    healed: dict[Path, HealingResult] = {}
    kept: tuple[Path, StitchedModel] | None = None
    best = float("inf")
    for number, path in enumerate(found.contenders(budget, contenders)):
        model = assemble_best(anchors, found, budget, path, **assembly)
        healed[path] = heal(
            model, data, teacher=teacher, validation=validation, config=config, give_up=hopeless(best),
            output_dir=None if output_dir is None else Folder(output_dir) / f"contender-{number}",
        )  # fmt: skip
        if kept is None or healed[path].end < best:
            kept, best = (path, model), healed[path].end
    assert kept is not None
    path, model = kept
    model.config.search["contenders"] = [
        {"path": str(of), "start": one.start, "end": one.end, "steps": one.training.steps} for of, one in healed.items()
    ]
    return Contest(model, healed[path], healed)


def hopeless(best: float) -> GiveUp:
    """Whether a run is to be given up, because what it may still gain will not bring it to another's loss.

    Args:
        best: held-out loss that the other has reached, in nats per label.

    Returns:
        What `train_stitches` takes as `give_up`. Learning curves flatten, so that a run that has fallen by d in s steps
        from its highest loss falls by no more than d in the next s; twice that is allowed for, as the cosine's end
        brings more than its middle.

    Example:
        >>> give_up = hopeless(2.0)
        >>> give_up([(0, 4.0), (5, 3.0)], 10), give_up([(0, 2.6), (5, 2.5)], 10), give_up([(0, 2.6), (4, 2.5)], 10)
        (False, True, False)
    """

    def decide(history: Sequence[tuple[int, float]], total: int) -> bool:
        step, loss = history[-1]
        highest, since = max((value, place) for place, value in history)
        if 2 * step < total or step == since:
            return 2 * step >= total and loss > best
        pace = (highest - loss) / (step - since)
        return loss - HOPE * pace * (total - step) > best

    return decide
