"""`klas-hf serve` on loopback: OpenAI's client, budgets in the name and in a field, streams, refusals, overload."""

import json
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path as Folder
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="klas_hf[serve]")
pytest.importorskip("openai", reason="klas_hf[serve]")

import openai
import torch
import uvicorn
from saved_models import ascii_tokenizer
from served_supernets import PATHS, supernet_of
from tiny_models import tiny_model

from klas_hf import ResultRow, RowFile, Usage
from klas_hf.cli import main
from klas_hf.serving import batching
from klas_hf.serving.app import build_app
from klas_hf.serving.paths import ServedSupernet

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer", "ignore:.*do not determine")

CHAT = [{"role": "user", "content": "the lazy dog"}]
TOKENS = 6


@contextmanager
def running(served: ServedSupernet, most: int = 32) -> Iterator[str]:
    """The address of a server that is up."""
    server = uvicorn.Server(uvicorn.Config(build_app(served, most), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            thread.join(0.02)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def served() -> ServedSupernet:
    return ServedSupernet(supernet_of(), ascii_tokenizer(), "tiny")


@pytest.fixture(scope="module")
def url(served: ServedSupernet) -> Iterator[str]:
    with running(served) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as made:
        yield made


def expected(served: ServedSupernet, path: str, prompt: str, tokens: int = TOKENS) -> str:
    """What the extracted model says."""
    ids = served.tokenizer(prompt, return_tensors="pt")["input_ids"]
    said = served.supernet.extract(path).generate(ids, do_sample=False, max_new_tokens=tokens)
    return served.tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)


def chat_prompt(served: ServedSupernet) -> str:
    return served.tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)


def share_of(served: ServedSupernet, path: str) -> float:
    cost = {str(one): cost.macs for one, cost in zip(served.supernet.paths, served.supernet.path_costs, strict=True)}
    return cost[path] / cost["1[:]"]


def test_the_list_of_models_is_one_of_budgets(served: ServedSupernet, client: openai.OpenAI) -> None:
    listed = {one.id: one.model_dump() for one in client.models.list()}
    assert listed["tiny"]["path"] == "1[:]"
    budgets = {name.removeprefix("tiny@"): one for name, one in listed.items() if "@" in name}
    assert len(budgets) == len({one["path"] for one in budgets.values()}) == len(served.supernet.paths)
    for budget, one in budgets.items():
        share = share_of(served, one["path"])
        assert one["share"] == pytest.approx(share, abs=1e-4)
        assert share <= float(budget.rstrip("%")) / 100 < share + 0.0011
        assert one["max_model_len"] == (60 if "0[" in one["path"] else 100)


def test_each_budget_is_answered_by_its_path(served: ServedSupernet, client: openai.OpenAI) -> None:
    share = 100 * share_of(served, PATHS[1]) + 0.1
    answers = {
        "0[:]": client.completions.create(model="tiny@0[:]", prompt="a big cat", max_tokens=TOKENS, temperature=0),
        PATHS[1]: client.completions.create(
            model=f"tiny@{share:.1f}%", prompt="a big cat", max_tokens=TOKENS, temperature=0
        ),
        "1[:]": client.completions.create(model="tiny", prompt="a big cat", max_tokens=TOKENS, temperature=0),
    }
    for path, answer in answers.items():
        assert answer.model == f"tiny@{path}"
        assert answer.choices[0].text == expected(served, path, "a big cat")
        assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", TOKENS)
    answer = client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=TOKENS, temperature=0, extra_body={"budget": f"{share:.1f}%, 1 GB"}
    )
    assert answer.choices[0].message.content == expected(served, PATHS[1], chat_prompt(served))
    assert len({one.choices[0].text for one in answers.values()}) == 3


def test_answers_are_streamed(served: ServedSupernet, client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=f"tiny@{PATHS[0]}", messages=CHAT, max_tokens=TOKENS, temperature=0, stream=True
        )
    )
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert len(pieces) > 1 and "".join(pieces) == expected(served, PATHS[0], chat_prompt(served))
    assert chunks[-1].choices[0].finish_reason == "length" and chunks[-1].model == f"tiny@{PATHS[0]}"


def test_the_responses_protocol_has_budgets_too(served: ServedSupernet, client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model=f"tiny@{PATHS[1]}", input="the lazy dog", max_output_tokens=TOKENS, temperature=0, stream=False
    )
    assert answer.output_text == expected(served, PATHS[1], chat_prompt(served))


def test_requests_of_different_budgets_at_the_same_time(served: ServedSupernet, client: openai.OpenAI) -> None:
    prompts = ["the quick brown fox", "the quick brown bird sang", "one big cat"]
    asked = [(path, prompt) for prompt in prompts for path in ("0[:]", "1[:]", *PATHS)]

    def ask(one: tuple[str, str]) -> str:
        answer = client.completions.create(model=f"tiny@{one[0]}", prompt=one[1], max_tokens=TOKENS, temperature=0)
        return answer.choices[0].text

    before = served.prefixes.reused
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, asked)) == [expected(served, *one) for one in asked]
    assert served.prefixes.reused > before


@contextmanager
def waiting(served: ServedSupernet, monkeypatch: pytest.MonkeyPatch, count: int) -> Iterator[list[int]]:
    """A path that is busy until `count` further requests for it wait; the sizes of the batches that it answers."""
    sizes: list[int] = []
    asked, whole, ask = threading.Semaphore(0), served.supernet.generate, batching.BatchManager._ask

    def counted(*args: Any) -> None:
        ask(*args)
        asked.release()

    def slowly(*args: Any, **kwargs: Any) -> Any:
        sizes.append(len(kwargs.get("input_ids", args[0] if args else ())))
        if len(sizes) == 1:
            assert all(asked.acquire(timeout=30) for _ in range(1 + count))
        return whole(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(batching.BatchManager, "_ask", counted)
        patch.setattr(served.supernet, "generate", slowly)
        yield sizes


def test_what_waits_together_is_answered_together_as_alone(
    served: ServedSupernet, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts and answers of other lengths, streamed or not."""
    prompts = ["the quick brown fox", "a", "one big cat sang", "the lazy dog", "a big bird sang the quick brown fox"]

    def ask(number: int) -> str:
        about: dict[str, Any] = {"prompt": prompts[number], "max_tokens": 3 + 2 * number, "temperature": 0}
        if number % 2:
            return client.completions.create(model=f"tiny@{PATHS[0]}", **about).choices[0].text
        chunks = list(client.completions.create(model=f"tiny@{PATHS[0]}", stream=True, **about))
        assert chunks[-1].usage.completion_tokens == 3 + 2 * number
        assert chunks[-1].choices[0].finish_reason == "length"
        return "".join(chunk.choices[0].text for chunk in chunks)

    with waiting(served, monkeypatch, 4) as sizes, ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(ask, range(5)))
    assert max(sizes) == 5  # those that came later too
    assert answers == [expected(served, PATHS[0], one, 3 + 2 * n) for n, one in enumerate(prompts)]


def test_answers_of_a_batch_end_where_they_end_alone(
    served: ServedSupernet, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a token of the model's; those that are generated otherwise run by themselves."""
    prompts = ["the quick brown fox", "a big bird", "one cat"]
    ids = [served.tokenizer(one, return_tensors="pt")["input_ids"] for one in prompts]
    model = served.supernet.path_model("0[:]")
    said = [model.generate(one, do_sample=False, max_new_tokens=8)[0, one.shape[1] :].tolist() for one in ids]
    last = said[1][2]
    monkeypatch.setattr(model.generation_config, "eos_token_id", last)
    whole = [one[: one.index(last) + 1] if last in one else one for one in said]

    def ask(number: int) -> Any:
        about: dict[str, Any] = {"seed": 5} if number == 3 else {"stop": ["zzz"]} if number == 4 else {}
        return client.completions.create(
            model="tiny@0[:]", prompt=prompts[number % 3], max_tokens=8, temperature=0, **about
        )

    with waiting(served, monkeypatch, 2) as sizes, ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(ask, range(5)))
    assert max(sizes) >= 2 and sizes.count(1) >= 2
    for number, answer in enumerate(answers):
        assert answer.usage.completion_tokens == len(whole[number % 3])
        assert answer.choices[0].finish_reason == ("stop" if last in whole[number % 3] else "length")
        assert answer.choices[0].text == served.tokenizer.decode(whole[number % 3], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"model": "tiny@fast"}, r"got budget='fast'; expected .* Served are tiny, tiny@.*%, .* any path"),
        ({"model": "tiny@1%"}, r"below what any path .* The nearest: .* Served are tiny"),
        ({"model": "tiny@0[:1] 1[1:]"}, r"was not made with; expected one of .* Served are"),
        ({"model": "tiny", "extra_body": {"budget": [1]}}, r"got budget=\[1\]; expected .* Served are"),
        ({"model": "tiny@60%", "extra_body": {"budget": "60%"}}, "expected one budget"),
        ({"model": "tiny@20 ms"}, "nothing was timed here; .* start the server with --timed"),
        ({"model": "tiny@0[:]", "prompt": "a big cat " * 30}, r"got a prompt of .* read up to 60; expected fewer than"),
        (
            {"model": "tiny@1[:]", "prompt": "a big cat", "max_tokens": 99},
            "reads up to 100; expected max_tokens of at most",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_served_is_refused_with_what_can(
    client: openai.OpenAI, request_: dict[str, Any], message: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**{"prompt": "a", "max_tokens": 2, "stream": stream} | request_)
    assert re.search(message, refused.value.body["message"])  # clients quote it, each in its own way
    assert refused.value.body["type"] == "invalid_request_error"


def test_other_models_and_tasks_are_not_found(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError, match=r"got the model 'huge'; expected one of tiny, tiny@"):
        client.completions.create(model="huge", prompt="a")
    body = urllib.request.Request(f"{url}/audio/transcriptions", b"{}", {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError, match="404") as refused:
        urllib.request.urlopen(body)
    assert "/v1/completions" in json.loads(refused.value.read())["error"]["message"]


def test_an_answer_of_no_stated_length_fills_what_the_path_reads(served: ServedSupernet, client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny@0[:]", prompt="the quick brown fox", temperature=0)
    assert answer.usage.total_tokens == 60 and answer.choices[0].finish_reason == "length"


def test_too_many_are_told_to_come_again_and_none_is_lost(
    served: ServedSupernet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two places, held by two requests that wait: a third is refused; OpenAI's client asks again until it is let in."""
    held, entered, whole = threading.Event(), threading.Semaphore(0), served.supernet.generate

    def slowly(*args: Any, **kwargs: Any) -> Any:
        entered.release()
        held.wait(30)
        return whole(*args, **kwargs)

    monkeypatch.setattr(served.supernet, "generate", slowly)
    with running(served, most=2) as address, ThreadPoolExecutor(3) as pool:
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)

        def ask(path: str, client: openai.OpenAI = client) -> str:
            made = client.completions.create(model=f"tiny@{path}", prompt="a cat", max_tokens=TOKENS, temperature=0)
            return made.choices[0].text

        waiting = [pool.submit(ask, path) for path in ("0[:]", "1[:]")]
        assert all(entered.acquire(timeout=30) for _ in waiting)
        with pytest.raises(openai.InternalServerError, match="2 requests are being answered") as refused:
            ask(PATHS[0])
        assert refused.value.status_code == 503 and int(refused.value.response.headers["retry-after"]) >= 1
        assert len(client.models.list().data) > 1  # questions about the server are answered
        patient = pool.submit(ask, PATHS[0], client.with_options(max_retries=10))
        held.set()
        for path, answer in zip(("0[:]", "1[:]", PATHS[0]), [*waiting, patient], strict=True):
            assert answer.result(60) == expected(served, path, "a cat")


@pytest.mark.slow
def test_budgets_in_seconds_where_they_were_measured(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    timed = ServedSupernet(supernet_of(), ascii_tokenizer(), "tiny", usage=Usage(prompt=4))
    seconds = sorted(one["seconds_per_token"] for one in timed.listed())
    path = timed.path_of(f"tiny@{1e3 * seconds[0]} ms, 100%")
    assert timed.costs[path].latency <= seconds[0]
    with pytest.raises(ValueError, match="got name='a@b'"):
        ServedSupernet(timed.supernet, timed.tokenizer, "a@b")
    with pytest.raises(ValueError, match="got most=0; expected at least 1"):
        build_app(timed, 0)


def test_the_command_says_what_it_serves(
    tmp_path: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[Any] = []
    monkeypatch.setattr("klas_hf.serving.app.uvicorn.Server.run", lambda server: ran.append(server.config))
    supernet, folder = supernet_of(), tmp_path / "tiny"
    supernet.save_pretrained(folder)
    assert main(["serve", str(folder)]) == 2 and "without a tokenizer" in capsys.readouterr().err
    ascii_tokenizer().save_pretrained(folder)
    rows = RowFile(tmp_path / "rows.jsonl", {})
    for number, path in enumerate(supernet.paths):  # the cheapest is the best
        rows.append(ResultRow("mine", path, 0, supernet.path_costs[number].macs, 1, {"accuracy": -number / 10}))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = str(taken.getsockname()[1])
        assert main(["serve", str(folder), "--host", "127.0.0.1", "--port", free]) == 2
        assert re.search(f"got --host '127.0.0.1' and --port {free} .*expected .* a free port", capsys.readouterr().err)
    arguments = ["serve", str(folder), "--rows", str(tmp_path / "rows.jsonl"), "--metric", "accuracy", "--port", free]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("tiny: 0[:], ")
    assert str(ran[0].port) == free
    assert main(["serve", str(folder), "--prefixes", "60%"]) == 2
    assert "got --prefixes '60%'; expected bytes, such as 1GB" in capsys.readouterr().err
    for option, value, message in (
        ("--prefixes", "lots", "got --prefixes 'lots'; expected bytes, such as 1GB"),
        ("--most", "0", "got --most 0; expected at least 1"),
        ("--port", "99999", "got --port 99999; expected 0 (any that is free) to 65535"),
    ):
        assert main(["serve", "nowhere", option, value]) == 2
        assert message in capsys.readouterr().err


def test_what_is_no_supernet_is_not_served(tmp_path: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model().save_pretrained(tmp_path / "llama")
    ascii_tokenizer().save_pretrained(tmp_path / "llama")
    for name, message in (
        ("llama", r"llama', a checkpoint of 'LlamaForCausalLM'; expected a supernet, one of .*from_anchors makes one"),
        ("nothing", "could not load the checkpoint .*nothing"),
    ):
        assert main(["serve", str(tmp_path / name), "--port", "0"]) == 2
        assert re.search(message, capsys.readouterr().err)


def test_a_chat_without_a_template_is_told_what_to_send(
    client: openai.OpenAI, served: ServedSupernet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.tokenizer, "chat_template", None)
    for ask in (
        lambda: client.chat.completions.create(model="tiny", messages=CHAT),
        lambda: client.responses.create(model="tiny", input="a"),
    ):
        with pytest.raises(openai.BadRequestError, match="no chat template; expected /v1/completions with a prompt"):
            ask()
    assert client.completions.create(model="tiny", prompt="a", max_tokens=2).usage.completion_tokens == 2


def test_the_default_is_the_dearest_anchor(served: ServedSupernet) -> None:
    assert str(served.path_of(None)) == "1[:]" == str(served.path_of("tiny", budget=1.0))
    assert torch.is_floating_point(served.models[served.path_of("tiny")].model.lm_head.weight)
