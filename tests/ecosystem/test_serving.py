"""`transformers serve` and `transformers chat` with a stitched checkpoint, as a user types them.

Both run in processes of their own that import no klas_hf: the checkpoint's code comes from its folder.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version
from saved_models import SavedModel, save_stitched

pytestmark = [
    pytest.mark.filterwarnings("ignore:the stitching layer is random"),
    pytest.mark.skipif(
        Version(transformers.__version__) < Version("5.23"),
        reason="this server looks for classes in transformers alone",
    ),
]

TOKENS = 10
TRANSFORMERS = [sys.executable, "-m", "transformers.cli.transformers"]
CHATS = [
    [{"role": "user", "content": "the lazy dog"}],
    [
        {"role": "system", "content": "a big cat"},
        {"role": "user", "content": "one bird"},
        {"role": "assistant", "content": "sang"},
        {"role": "user", "content": "and the fox"},
    ],
]


@dataclass(frozen=True)
class Server:
    """A running `transformers serve`, and the model that it serves."""

    url: str
    saved: SavedModel
    environment: dict[str, str]

    def post(self, path: str, **body: Any) -> str:
        greedy = {"model": str(self.saved.folder), "generation_config": json.dumps({"do_sample": False})}
        data = json.dumps(greedy | body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read().decode()

    def answer(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        return json.loads(self.post("/v1/chat/completions", messages=messages, max_tokens=TOKENS))["choices"][0]

    def expected(self, messages: list[dict[str, str]]) -> str:
        return self.saved.continuation(self.saved.encode_chat(messages), TOKENS)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    for package in ("fastapi", "uvicorn", "openai", "rich"):
        pytest.importorskip(package, reason="transformers[serving]")
    folder = tmp_path_factory.mktemp("serving")
    saved = save_stitched(folder, "mistral", "llama")
    environment = os.environ | {"HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--trust-remote-code", "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    log = folder / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*TRANSFORMERS, "serve", str(saved.folder), *options], stdout=out, stderr=out, cwd=folder, env=environment
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy(process, url, log)
        yield Server(url, saved, environment)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_until_healthy(process: subprocess.Popen, url: str, log: Path, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the server did not start: {log.read_text()[-3000:]}")


def test_answers_are_what_the_model_generates(server: Server) -> None:
    for messages in CHATS:
        choice = server.answer(messages)
        assert choice["message"] == {"role": "assistant", "content": server.expected(messages)}
        assert choice["finish_reason"] == "length"
    assert server.expected(CHATS[0]) != server.expected(CHATS[1])


def test_answers_are_streamed(server: Server) -> None:
    lines = server.post("/v1/chat/completions", messages=CHATS[0], max_tokens=TOKENS, stream=True).splitlines()
    chunks = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines if line.startswith("data: {")]
    pieces = [chunk["delta"]["content"] for chunk in chunks if chunk["delta"].get("content")]
    assert len(pieces) > 1
    assert "".join(pieces) == server.expected(CHATS[0])
    assert chunks[-1]["finish_reason"] == "length"


def test_questions_asked_at_the_same_time(server: Server) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(server.answer, CHATS * 2))
    assert [answer["message"]["content"] for answer in answers] == [server.expected(chat) for chat in CHATS] * 2


def test_plain_text_goes_on(server: Server) -> None:
    prompt = "the quick brown fox"
    answer = json.loads(server.post("/v1/completions", prompt=prompt, max_tokens=TOKENS))
    assert answer["choices"][0]["text"] == server.saved.continuation(server.saved.encode(prompt), TOKENS)


def test_chat_in_a_terminal(server: Server) -> None:
    """Two turns. The client refuses even a loopback address where HF_HUB_OFFLINE is set."""
    model, flags = str(server.saved.folder), [f"max_new_tokens={TOKENS}", "do_sample=False"]
    chat = [*TRANSFORMERS, "chat", model, f"{server.url}/v1", *flags, "--user", "me"]
    environment = server.environment | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "COLUMNS": "300"}
    typed = "the lazy dog\nn\nand the fox\nn\n!exit\n"  # "n": the answer need not go on after its last token
    done = subprocess.run(chat, input=typed, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    first = [{"role": "user", "content": "the lazy dog"}]
    answers = [server.expected(first)]
    second = [*first, {"role": "assistant", "content": answers[0]}, {"role": "user", "content": "and the fox"}]
    answers.append(server.expected(second))
    shown = " ".join(done.stdout.split())
    for answer in answers:
        assert " ".join(answer.split()) in shown
