"""lm-evaluation-harness on models in memory: its tasks, its prompts, its scoring and its own `HFLM`; nothing of ours.

A task that the harness does not know is refused before anything is measured; one whose data cannot be had is left out
and told, and the others go on.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path as Folder
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.field_tasks import FieldTask, digest, unreachable
from klas_hf.evaluation import Measurement
from klas_hf.processes import process_state

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def harness_version() -> str:
    """The version of lm_eval: rows of different ones are not comparable.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return version("lm_eval")
    except PackageNotFoundError as error:
        raise ValueError('got no lm_eval; expected lm-evaluation-harness: pip install "klas_hf[evaluation]"') from error


def harness_tasks(
    names: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    include: Sequence[str | Folder] = (),
    copies: Mapping[str, str] | None = None,
    scratch: Folder,
    batch_size: int = 8,
    limit: int | None = None,
) -> tuple[list[FieldTask], dict[str, str]]:
    """Tasks of the harness, each loaded once for all models.

    Args:
        names: tasks or groups, as the harness calls them; `NAME:SHOTS` for other than the task's own number of examples
            in the prompt. A tag stands for its tasks.
        tokenizer: of all models.
        include: folders of tasks of one's own, as its `--include_path`.
        copies: Hub id of a data set → local folder that is read in its place.
        scratch: folder for what says so to the harness.
        batch_size: requests at once.
        limit: at most so many documents of each task; not for results.

    Returns:
        The tasks, and name → why it cannot be measured, for those whose data cannot be had.

    Raises:
        ValueError: a name that the harness does not know; the nearest ones are named.
    """
    shots = dict(_parsed(name) for name in names)
    if not shots:
        return [], {}
    manager = _manager(shots, [str(one) for one in include])
    shots = {task: count for name, count in shots.items() for task in _expanded(manager, name)}
    if copies:
        leaves = {leaf for name in shots for leaf in _leaves(manager, name)}
        folder = scratch / "tasks_on_copies"
        if process_state().is_main_process:
            _redirect(manager, leaves, copies, folder)
        process_state().wait_for_everyone()
        manager = _manager(shots, [*map(str, include), str(folder)])
    tasks, missing = [], {}
    for name, count in shots.items():
        source = _source(manager, name)
        try:
            loaded = manager.load([name])
        except (OSError, ImportError, ValueError) as error:
            missing[name] = unreachable(source["dataset"], error)
            continue
        options = {"num_fewshot": count, "limit": limit, "batch_size": batch_size, "task_manager": manager}
        harness = _Loaded(name, loaded, tokenizer, options)
        about = {"task": name, "version": _version(manager, name), "configuration": _configuration(manager, name)}
        about |= {"shots": count, "limit": limit, "lm_eval": harness_version()}
        tasks.append(FieldTask(name, about, harness.measure, source))
    return tasks, missing


class _Loaded:
    """One task or group with its data."""

    def __init__(self, name: str, loaded: Any, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]):
        self.name, self.tokenizer, self.options = name, tokenizer, options
        self.is_group = name in loaded.get("groups", {})
        self.whole = [loaded["groups"][name]] if self.is_group else list(loaded["tasks"].values())

    def measure(self, model: PreTrainedModel) -> Measurement:
        """Figures as the harness prints them, and each document's."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        harnessed = HFLM(pretrained=model, tokenizer=self.tokenizer, batch_size=self.options["batch_size"])
        with torch.random.fork_rng():  # the harness seeds everything
            found = lm_eval.simple_evaluate(model=harnessed, tasks=self.whole, bootstrap_iters=0, **self.options)
        # Every process has run all of it, but of those on one machine the harness answers only the first.
        (measured,) = broadcast_object_list([found and self._measurement(found)])
        assert measured is not None
        return measured

    def _measurement(self, found: Mapping[str, Any]) -> Measurement:
        results = found["groups" if self.is_group else "results"][self.name]
        metrics = {
            _metric(key): float(value) for key, value in results.items()
            if isinstance(value, int | float) and "," in key and "_stderr" not in key
        }  # fmt: skip
        better = found["higher_is_better"].get(self.name, {})
        directions = {key: bool(better.get(key.split(" (")[0], True)) for key in metrics}
        return Measurement(metrics, {"items": items_of_samples(found["samples"]), "higher_is_better": directions})


def items_of_samples(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """What the harness logged of each document: metric → values, in the order of tasks and documents.

    A pair (log-likelihood, units) counts as nats per unit; what is no number is left out.
    """
    values: dict[str, list[float]] = {}
    documents: list[tuple[str, Any, str]] = []
    for task in sorted(samples):
        for sample in sorted(samples[task], key=lambda one: (one["doc_id"], one["filter"])):
            documents.append((task, sample["doc_id"], sample["doc_hash"]))
            for name in sample["metrics"]:
                value, key = sample[name], _metric(f"{name},{sample['filter']}")
                if isinstance(value, tuple | list) and len(value) == 2:
                    values.setdefault(key, []).append(-float(value[0]) / float(value[1]))
                elif isinstance(value, bool | int | float) or getattr(value, "ndim", None) == 0:
                    values.setdefault(key, []).append(float(value))
    return {"documents": digest(sorted(set(documents))), "values": values}


def _metric(key: str) -> str:
    """`acc,none` → `acc`; `exact_match,strict-match` → `exact_match (strict-match)`."""
    name, _, kind = key.partition(",")
    return name if kind == "none" else f"{name} ({kind})"


def _parsed(name: str) -> tuple[str, int | None]:
    task, colon, shots = name.rpartition(":")
    if not colon:
        return name, None
    if not shots.isdigit():
        raise ValueError(f"got the task {name!r}; expected NAME, or NAME:SHOTS with a whole number, as mmlu:5")
    return task, int(shots)


def _manager(names: Iterable[str], include: list[str]) -> "TaskManager":
    """All that the harness knows; its own tasks, whose reading takes seconds, only where they are asked for."""
    from lm_eval.tasks import TaskManager

    own = TaskManager(include_path=include, include_defaults=False)
    if set(names) <= set(own.all_tasks):
        return own
    manager = TaskManager(include_path=include)
    if unknown := sorted(set(names) - set(manager.all_tasks)):
        near = {name: get_close_matches(name, manager.all_tasks, n=4, cutoff=0.5) for name in unknown}
        told = "; ".join(f"{name}: nearest are {', '.join(one) or 'none'}" for name, one in near.items())
        raise ValueError(
            f"got tasks that lm_eval {harness_version()} does not know ({told}); `lm_eval ls tasks` lists all, and "
            "--include_path adds a folder of your own"
        )
    return manager


def _expanded(manager: "TaskManager", name: str) -> list[str]:
    """A tag's tasks, and those of a group that has no figure of its own; else the name."""
    if name in manager.all_tags:
        return sorted(manager.task_index[name].tags)
    settings = manager.task_index[name].cfg or {}
    return (
        _leaves(manager, name) if name in manager.all_groups and not settings.get("aggregate_metric_list") else [name]
    )


def _leaves(manager: "TaskManager", name: str) -> list[str]:
    """The tasks that a task, group or tag stands for."""
    entry = manager.task_index[name]
    if name in manager.all_tags:
        return [leaf for task in sorted(entry.tags) for leaf in _leaves(manager, task)]
    if name not in manager.all_groups:
        return [name]
    inner = [one if isinstance(one, str) else one.get("task") or one.get("group") for one in (entry.cfg or {})["task"]]
    return [leaf for one in inner if one in manager.task_index for leaf in _leaves(manager, one)]


def _configuration(manager: "TaskManager", name: str) -> str:
    """A digest of a task's whole configuration, those of a group's tasks included, but not of where files lie."""
    settings = {leaf: dict(manager.task_index[leaf].cfg or {}) for leaf in [name, *_leaves(manager, name)]}
    return digest({leaf: {key: _unplaced(key, value) for key, value in one.items()} for leaf, one in settings.items()})


def _unplaced(key: str, value: Any) -> Any:
    """A setting without folders of this machine: those of data, and of functions, which the index has as paths."""
    if key in ("dataset_path", "dataset_kwargs"):
        return None
    if key == "metadata" and isinstance(value, Mapping):
        return {name: one for name, one in value.items() if name != "data"}
    return re.sub(r"^/\S*/", "", value) if isinstance(value, str) else value


def _version(manager: "TaskManager", name: str) -> Any:
    return ((manager.task_index[name].cfg or {}).get("metadata") or {}).get("version")


def _source(manager: "TaskManager", name: str) -> dict[str, Any]:
    """Hub id, configuration and split of a task's data, of a group's first task."""
    leaves = _leaves(manager, name)
    settings = (manager.task_index[leaves[0]].cfg if leaves else None) or {}
    split = settings.get("test_split") or settings.get("validation_split")
    data = (settings.get("metadata") or {}).get("data") or settings.get("dataset_path") or name
    configuration = settings.get("dataset_name") if len(leaves) == 1 else None
    return {"dataset": data, "split": split} | ({"configuration": configuration} if configuration else {})


def _redirect(manager: "TaskManager", names: Iterable[str], copies: Mapping[str, str], folder: Folder) -> None:
    """Write tasks that read local copies in place of what is on the Hub, and are the same but for that.

    Raises:
        ValueError: a copy that is no folder or file.
    """
    for dataset, place in copies.items():
        if not Folder(place).expanduser().exists():
            raise ValueError(f"got copies={dataset}={place}, where nothing lies; expected a folder or file")
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        entry = manager.task_index[name]
        dataset = str((entry.cfg or {}).get("dataset_path"))
        if dataset in copies:
            settings: dict[str, Any] = {"include": str(entry.yaml_path), "task": name}
            settings["dataset_path"] = str(Folder(copies[dataset]).expanduser().resolve())
            settings["metadata"] = {**((entry.cfg or {}).get("metadata") or {}), "data": dataset}
            (folder / f"{name}.yaml").write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
