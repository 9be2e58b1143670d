"""Model cards written for the model: where it comes from, under which licence, what it costs, how good it is.

The metadata go through huggingface_hub's own ModelCardData and EvalResult, so the Hub shows the anchors as base models
of a merge and the figures as evaluation results.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel

from klas_hf.hub.licences import Licence, attribution, built_with, carried_licence, check_name, stated_licence
from klas_hf.hub.results import eval_results, sources_of, table
from klas_hf.hub.subject import Subject, facts_table
from klas_hf.hub.subjects import describe
from klas_hf.rows import ResultRow
from klas_hf.scores.values import StitchScores

_CITATION = """
*KLAS: Using Similarity to Stitch Neural Networks for Improved Accuracy-Efficiency Tradeoffs*, ICLR 2026, arXiv
2605.29259. It builds on SN-Net (*Stitchable Neural Networks*, CVPR 2023) and ESTA (CVPR 2024). Cite the anchors too.
"""


def model_card(
    what: PreTrainedModel | StitchScores,
    repo_id: str,
    *,
    rows: Sequence[ResultRow] | None = None,
    cost: str = "macs",
    dataset: str | None = None,
    split: str | None = None,
    licence: str | None = None,
    base_model: Sequence[str] | None = None,
    training: Any = None,
    tags: Sequence[str] = (),
    picture: str | None = None,
    processor: bool = True,
    token: str | bool | None = None,
) -> ModelCard:
    """The card of a stitched model, a supernet, probes or scores.

    Args:
        what: the model, probes or scores.
        repo_id: where it will be, `user/name`: the card's code loads it from there.
        rows: what was measured, of this model and of the others on its curve; this model's own go into the model-index.
        cost: what the models are compared over, as for `TradeoffCurve`.
        dataset, split: what it was measured on, a Hub id or any name; needed with rows that do not say so themselves
            (`sources` in their details).
        licence: identifier of the Hub's list; None takes the anchors', which must agree.
        base_model: Hub ids of the anchors, source first, where they were read from folders.
        training: how it was fine-tuned: the `TrainingConfig`, or a text; None takes what `train_stitches` has kept.
        tags: for the Hub, beside our own and the model's.
        picture: file name in the repo of the curve or heatmap.
        processor: whether the repo holds the tokenizer or image processor, which the code then loads.
        token: of the Hub, to read the anchors' cards with.

    Returns:
        A card of huggingface_hub, to go on writing and pass to `publish(…, card=…)`.

    Raises:
        TypeError: no card is known for this kind of thing.
        ValueError: the anchors' licences differ, or ask for another name; rows without a dataset or
            the cost, or of other models.
        OSError: the card of an anchor cannot be read.

    Example:
        >>> model = StitchedModel.from_anchors(source, target, stitch=(2, 2), calibration=batches)
        >>> anchors = ["me/small", "me/large"]
        >>> card = model_card(model, "me/between", rows=rows, dataset="my_text", licence="mit", base_model=anchors)
        >>> card.data.base_model, card.data.license, card.data.eval_results[0].metric_type
        (['me/small', 'me/large'], 'mit', 'loss')
        >>> "# between" in card.text.splitlines()
        True
    """
    subject = describe(what, base_model)
    if rows is not None and (subject.task is None or (dataset is None and not sources_of(rows))):
        expected = "dataset=…, what they were measured on" if subject.task else "none, for it is not measured itself"
        raise ValueError(f"got rows for the card of {type(what).__name__}; expected {expected}")
    licence_held, licences = _licences(subject, licence, token)
    check_name(licences, repo_id)
    name = repo_id.rpartition("/")[2]
    data = _metadata(subject, licence_held, dataset, [*tags, *_own_tags(what)])
    if rows is not None and subject.task is not None:
        data.model_name = name
        data.eval_results = eval_results(rows, subject.paths, subject.task, dataset, split, subject.trained)
    sections = {
        "Use": f"{_needs(subject)}\n\n```python\n{subject.code(repo_id, processor).strip()}\n```",
        "What it is": facts_table(subject.facts),
        "Results": _results(rows, cost, dataset, split, picture),
        "How it was made": f"{subject.origin}\n\n{_training(training or _recorded(what))}",
        "Limits": "\n".join(f"- {sentence}" for sentence in subject.limits),
        "Licence": _licence_text(licence_held, licences),
        "Citing": _CITATION.strip(),
    }
    head = [f"# {name}", f"**{subject.kind}.** {subject.summary}", *built_with(licences)]
    body = head + [f"## {title}\n\n{text}" for title, text in sections.items() if text]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n")


def _needs(subject: Subject) -> str:
    without = " (without it, leave the import out and load with `trust_remote_code=True`)"
    return f"With `klas_hf` installed{without if subject.carries_code else ''}:"


def _licences(
    subject: Subject, given: str | None, token: str | bool | None
) -> tuple[Licence | None, list[Licence | None]]:
    """The licence to state, and all that bind: those of the anchors too."""
    if subject.relation is None:
        held = Licence(given) if given else None
        return held, [held]
    stated: dict[str, Licence | None] = {}
    for place, anchor in enumerate(subject.anchors):
        title = anchor.title if anchor.title not in stated else f"{anchor.title} ({place + 1})"
        try:
            stated[title] = stated_licence(anchor.card(token))
        except OSError:
            if given is None:
                raise
            stated[title] = None
    held = carried_licence(stated, given)
    if held is None:
        warnings.warn(
            f"neither the card of {' nor that of '.join(stated)} states a licence, so this card states none; pass "
            'licence="…" to say under which one the model is',
            stacklevel=3,
        )
    return held, [*stated.values(), held]


def _metadata(subject: Subject, licence: Licence | None, dataset: str | None, tags: Sequence[str]) -> ModelCardData:
    bases = [anchor.base_model for anchor in subject.anchors if anchor.base_model] if subject.relation else []
    return ModelCardData(
        base_model=bases or None,
        base_model_relation=subject.relation if bases else None,
        license=licence.identifier if licence else None,
        license_name=licence.name if licence else None,
        license_link=licence.link if licence else None,
        library_name=subject.library_name,
        pipeline_tag=subject.pipeline_tag,
        tags=[*subject.tags, *tags],
        datasets=[dataset] if dataset and _is_hub_id(dataset) else None,
    )


def _own_tags(what: PreTrainedModel | StitchScores) -> list[str]:
    """What trainers have noted with `add_model_tags`."""
    return list(what.model_tags or []) if isinstance(what, PreTrainedModel) else []


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _results(
    rows: Sequence[ResultRow] | None, cost: str, dataset: str | None, split: str | None, picture: str | None
) -> str | None:
    parts = []
    if rows is not None:
        named = dataset or ", ".join(dict.fromkeys(source["dataset"] for source in sources_of(rows).values()))
        where = f"{named}, split {split}" if split else named
        parts.append(f"Measured on {where}:\n\n{table(rows, cost)}")
    if picture is not None:
        parts.append(f"![picture of the results]({picture})")
    return "\n\n".join(parts) or None


def _recorded(what: PreTrainedModel | StitchScores) -> str | None:
    """What `train_stitches` has kept in the model's config, one training after the other."""
    record = getattr(what.config, "training", None) if isinstance(what, PreTrainedModel) else None
    parts: list[str] = []
    while record:
        data, teacher = record["data"], record["teacher"]
        facts = {
            "data": f"{data['examples']:,} examples of {data['kind']}",
            "optimiser steps": f"{record['steps']:,} on {record['processes']} process(es)",
            "loss of the first and last step": f"{record['first_loss']:.4f}, {record['last_loss']:.4f} nats per label",
        }
        facts |= {"teacher": teacher} if teacher else {}
        facts |= {name: f"`{value}`" for name, value in record["settings"].items()}
        parts.append("Then fine-tuned with:\n\n" + facts_table(facts))
        record = record.get("before")
    return "\n\n".join(reversed(parts)) or None


def _training(training: Any) -> str:
    if training is None:
        return "Whether and how it was fine-tuned after that was not given."
    if isinstance(training, str):
        return training
    if not dataclasses.is_dataclass(training) or isinstance(training, type):
        raise TypeError(f"got training of {type(training).__name__}; expected a TrainingConfig or a text")
    settings: Mapping[str, Any] = dataclasses.asdict(training)
    return "Then fine-tuned with:\n\n" + facts_table({name: f"`{value}`" for name, value in settings.items()})


def _licence_text(licence: Licence | None, licences: Sequence[Licence | None]) -> str | None:
    if licence is None:
        return None
    label = f"[{licence.label}]({licence.link})" if licence.link else f"`{licence.label}`"
    carried = len(licences) > 1 and all(one == licence for one in licences)
    return "\n\n".join([f"{label}, as its anchors." if carried else f"{label}.", *attribution(licences)])
