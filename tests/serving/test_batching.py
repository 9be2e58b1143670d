"""Batches of `klas-hf serve`: who joins, who waits, who leaves."""

from typing import Any

import pytest

pytest.importorskip("fastapi", reason="klas_hf[serve]")

from saved_models import ascii_tokenizer
from served_supernets import PATHS, supernet_of
from tiny_models import tiny_model, token_ids

from klas_hf import Path, StitchedSupernet
from klas_hf.serving import batching
from klas_hf.serving.paths import ServedSupernet

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer", "ignore:.*do not determine")


@pytest.fixture(scope="module")
def served() -> ServedSupernet:
    return ServedSupernet(supernet_of(), ascii_tokenizer(), "tiny")


@pytest.mark.parametrize("families", [("llama", "llama"), ("mistral", "qwen3")])
def test_who_comes_later_joins_behind_the_next_token(families: tuple[str, str]) -> None:
    """With longer and shorter prompts than those that run, while some end, and beyond a window."""
    changes: list[dict[str, Any]] = [{"sliding_window": 6} if one == "mistral" else {} for one in families]
    anchors = [
        tiny_model(family, large=bool(place), seed=place, **changes[place]) for place, family in enumerate(families)
    ]
    for anchor in anchors:
        anchor.generation_config.eos_token_id = None
    supernet = StitchedSupernet.from_anchors(anchors, PATHS, calibration=[token_ids(16, 12, seed=3)]).double()
    model = ServedSupernet(supernet, ascii_tokenizer(), "tiny").models[Path.parse(PATHS[0])]
    events: list[int] = []

    def request(number: int, prompt: int, answer: int) -> batching.Request:
        settings = model.generation_config
        settings.max_new_tokens = answer
        ids = token_ids(1, prompt, seed=number)
        return batching.Request(ids, settings, lambda _: events.append(number), lambda error: events.append(-number))

    requests = [request(1, 9, 7), request(2, 4, 14), request(3, 15, 12), request(4, 1, 9), request(5, 3, 1)]
    coming = {2: 1, 9: 2}  # how many of the last three come behind so many tokens

    def newcomers(*, taken: bool = True) -> list[batching.Request]:
        count = sum(many for tokens, many in coming.items() if len(events) >= tokens)
        there = requests[2 : 2 + count][len(joined) :]
        if taken:
            joined.extend(there)
        return there

    joined: list[batching.Request] = []
    batching.generate_together(model, requests[:2], newcomers)
    assert joined == requests[2:]
    for one in requests:
        alone = supernet.extract(PATHS[0]).generate(one.ids, do_sample=False, max_new_tokens=len(one.said))
        assert one.said == alone[0, one.ids.shape[1] :].tolist() and len(one.said) == one.settings.max_new_tokens
    assert sorted(events[-5:]) != sorted(-number for number in range(1, 6))  # not all at the end
    assert events.index(3) < events.index(-1) < events.index(-3) and events.index(5) < events.index(-2)


def test_a_batch_takes_so_many_and_only_what_is_in_front(
    served: ServedSupernet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not go with a batch waits no longer than it runs, and it takes no more than `MOST` in all."""
    model, batches = served.models[Path.parse("0[:]")], list[list[str]]()
    whole = batching.generate_together

    def spied(model: Any, requests: list[batching.Request], newcomers: Any) -> None:
        batches.append([names[one] for one in requests])

        def seen(**options: Any) -> list[batching.Request]:
            found = newcomers(**options)
            if options.get("taken", True):
                batches[-1] += [names[one] for one in found]
            return found

        whole(model, requests, seen)

    monkeypatch.setattr(batching, "generate_together", spied)
    monkeypatch.setattr(batching, "MOST", 3)
    manager, names = batching.BatchManager(), dict[batching.Request, str]()

    def arrive(name: str, temperature: float) -> None:
        settings = model.generation_config
        settings.max_new_tokens, settings.temperature = 4, temperature
        one = batching.Request(
            token_ids(1, 3), settings, lambda _: arrive_later() if name == "a" else None, lambda _: None
        )
        names[one] = name
        manager._waiting.append(one)

    later = [("b", 1.0), ("c", 1.0), ("d", 0.5), ("e", 1.0), ("f", 1.0)]

    def arrive_later() -> None:
        while later:
            arrive(*later.pop(0))

    arrive("a", 1.0)
    while manager._waiting:
        manager._answer(model)
    assert batches == [["a", "b", "c"], ["d"], ["e", "f"]]


def test_who_leaves_a_batch_or_breaks_it_is_told(served: ServedSupernet) -> None:
    ended: list[tuple[str, Exception | None]] = []

    def request(name: str, text: str, cancelled: bool = False) -> batching.Request:
        def take(token: int) -> None:
            if cancelled:
                raise batching._GenerationCancelled

        settings = served.models[Path.parse("0[:]")].generation_config
        settings.max_new_tokens = 4
        ids = served.tokenizer(text, return_tensors="pt")["input_ids"]
        return batching.Request(ids, settings, take, lambda error: ended.append((name, error)))

    one, other = request("one", "a cat", cancelled=True), request("other", "the lazy dog")
    assert one.goes_with(other)
    other.settings.temperature = 0.5
    assert not one.goes_with(other)
    batching.generate_together(served.models[Path.parse("0[:]")], [one, other])
    assert [(name, type(error)) for name, error in ended] == [
        ("one", batching._GenerationCancelled), ("other", type(None))
    ]  # fmt: skip
    assert (len(one.said), len(other.said)) == (0, 4)
    manager = batching.BatchManager()
    manager._waiting.append(request("third", "a"))
    manager._answer(None)
    assert ended[2][0] == "third" and isinstance(ended[2][1], AttributeError)
    manager._answer(None)  # nothing waits
    assert len(ended) == 3
