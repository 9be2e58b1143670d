"""The licence of a model that is made from others: carried over, and what it asks for honoured.

Llama's community licences ask that a model made with theirs has a name that begins with "Llama", that its page says
"Built with Llama", and that a notice goes with every copy.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from huggingface_hub import ModelCard

_LLAMA = re.compile(r"(?:meta-)?llama-?(\d(?:\.\d)?)")
_LEGAL = re.compile(r"(licen[sc]e|notice|use[-_]policy|usage[-_]policy|acceptable[-_]use\w*)([-_.].*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Licence:
    """A licence as a model card states it.

    Attributes:
        identifier: of the Hub's list, such as "apache-2.0", or "other".
        name, link: of another licence.
    """

    identifier: str
    name: str | None = None
    link: str | None = None

    @property
    def label(self) -> str:
        """What it is told apart by."""
        return self.name or self.identifier if self.identifier == "other" else self.identifier

    @property
    def llama(self) -> str | None:
        """The version of Llama whose community licence it is, or None."""
        found = _LLAMA.match(self.label.lower())
        return found[1] if found else None


def stated_licence(card: ModelCard | None) -> Licence | None:
    """The licence that a model card states, or None."""
    if card is None or not card.data.get("license"):
        return None
    return Licence(str(card.data.get("license")), card.data.get("license_name"), card.data.get("license_link"))


def carried_licence(stated: Mapping[str, Licence | None], given: str | None = None) -> Licence | None:
    """The licence of a model made from anchors.

    Args:
        stated: what the card of each anchor states.
        given: what the user says; None takes the anchors', which must agree.

    Raises:
        ValueError: the anchors' licences differ and none was given, or the one given is not the Llama licence that an
            anchor is under.
    """
    by_label = {licence.label: licence for licence in stated.values() if licence}
    if given is not None:
        bound = {title: licence.label for title, licence in stated.items() if licence and licence.llama}
        if bound and given not in bound.values():
            raise ValueError(
                f"got licence={given!r} for a model made from {_listed(bound)}; expected "
                f"{' or '.join(sorted(set(bound.values())))}: Llama's community licences stay with whatever is made "
                "from Llama. Leave the licence out, or name that"
            )
        return by_label.get(given) or Licence(given)
    labels = {title: licence.label if licence else "no licence stated" for title, licence in stated.items()}
    if len(set(labels.values())) > 1:
        raise ValueError(
            f"got anchors under different licences: {_listed(labels)}; expected one. Read both, and say which holds "
            'for a model made from them: licence="…"'
        )
    return next(iter(by_label.values()), None)


def check_name(licences: Sequence[Licence | None], repo_id: str) -> None:
    """Raise ValueError unless the repo's name is one that the licences allow."""
    name = repo_id.rpartition("/")[2]
    for licence in licences:
        prefix = _required_prefix(licence)
        if prefix and not re.sub(r"[-_ .]", "", name).startswith(prefix.replace(" ", "")):
            assert licence is not None
            raise ValueError(
                f"got the repo name {name!r} for a model made from one under the licence {licence.label}, which asks "
                f"that the name of whatever is made from it begins with {prefix!r}. Name it, for example, "
                f"{prefix.replace(' ', '-') + '-' + name!r}"
            )


def built_with(licences: Sequence[Licence | None]) -> list[str]:
    """The lines that the licences ask the model's page to show, each once."""
    lines = [
        "Built with Meta Llama 3" if one.llama == "3" else "Built with Llama" for one in licences if one and named(one)
    ]
    return list(dict.fromkeys(lines))


def attribution(licences: Sequence[Licence | None]) -> list[str]:
    """The notices that the licences ask to go with every copy, each once."""
    notices = []
    for version in dict.fromkeys(licence.llama for licence in licences if licence and licence.llama):
        name = "Meta Llama 3" if version == "3" else f"Llama {version}"
        agreement = "LLAMA 2" if version == "2" else name
        sign = "(c)" if version == "2" else "©"
        notices.append(
            f"{name} is licensed under the {agreement} Community License, Copyright {sign} Meta Platforms, Inc. "
            "All Rights Reserved."
        )
    return notices


def is_legal_file(name: str) -> bool:
    """Whether a file of this name is a licence, a notice or a use policy."""
    return _LEGAL.fullmatch(name) is not None


def named(licence: Licence) -> bool:
    """Whether a licence asks for a name and a line on the page: Llama's do from version 3 on."""
    return licence.llama is not None and licence.llama != "2"


def _required_prefix(licence: Licence | None) -> str | None:
    if licence is None or not named(licence):
        return None
    return "Llama 3" if licence.llama == "3" else "Llama"


def _listed(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{title} ({label})" for title, label in labels.items())
