"""`klas-hf serve` under load on loopback: seconds to the first token and between tokens, refusals, nothing lost.

    python benchmarks/serving.py

A supernet of two random Llamas is served by a process of its own. Clients ask at the same time, each request with a
budget of its own, all after one long beginning; those that are refused ask again as they are told to. Then one client
asks the same of every path in turn, with and without what the paths share of the beginning. Last, requests for one path
are sent all at once and one after the other, in turn, with prompts that have nothing in common.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, HfArgumentParser, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from klas_hf import StitchedSupernet
from klas_hf.tables import markdown_table


@dataclass
class Options:
    widths: list[int] = field(default_factory=lambda: [256, 512], metadata={"help": "of the two anchors"})
    blocks: list[int] = field(default_factory=lambda: [6, 8], metadata={"help": "of the two anchors"})
    prompt: int = field(default=256, metadata={"help": "tokens that all requests begin with"})
    tokens: int = field(default=24, metadata={"help": "of each answer"})
    clients: int = field(default=8, metadata={"help": "that ask at once"})
    requests: int = field(default=48, metadata={"help": "in all"})
    most: int = field(default=4, metadata={"help": "requests that the server lets in at once"})
    threads: int = field(default=1, metadata={"help": "torch threads of the server"})
    together: int = field(default=8, metadata={"help": "requests for one path, at once and one after the other"})
    rounds: int = field(default=5, metadata={"help": "of these"})
    only_together: bool = field(default=False, metadata={"help": "measure nothing else"})


VOCABULARY = 4_000
PATHS = ["0[:3] 1[4:]", "0[:3] 1[6:]", "0[:5] 1[7:]", "1[:4] 1[6:]"]


def main() -> None:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    with tempfile.TemporaryDirectory() as folder:
        save_supernet(options, f"{folder}/net")
        print(f"torch {torch.__version__}, {options}\n", flush=True)
        with served(options, f"{folder}/net", "1 GB", 2 * options.together) as url:  # places are freed late
            at_once(options, url)
        if options.only_together:
            return
        with served(options, f"{folder}/net", "1 GB", options.most) as url:
            under_load(options, url)
            shared = in_turn(options, url)
        with served(options, f"{folder}/net", "0.001 KB", options.most) as url:
            alone = in_turn(options, url)
    print(f"\nseconds to the first token of {options.prompt} on each path in turn, for a new beginning each round:")
    lines = [["path", "nothing kept", "beginnings kept", "ratio"]]
    for path in alone:
        lines.append([path, f"{alone[path]:.4f}", f"{shared[path]:.4f}", f"{shared[path] / alone[path]:.2f}"])
    print(markdown_table(lines))


def save_supernet(options: Options, folder: str) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        StitchedSupernet.from_anchors([anchor(options, place) for place in (0, 1)], PATHS).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


def anchor(options: Options, place: int) -> PreTrainedModel:
    width = options.widths[place]
    config = LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=options.blocks[place],
        num_attention_heads=width // 64, num_key_value_heads=width // 128, vocab_size=VOCABULARY,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    return model


@contextmanager
def served(options: Options, folder: str, prefixes: str, most: int) -> Iterator[str]:
    """The address of `klas-hf serve` in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["serve", folder, "--host", "127.0.0.1", "--port", str(port), "--most", str(most)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    process = subprocess.Popen(
        [sys.executable, "-m", "klas_hf.cli", *arguments, "--prefixes", prefixes], env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.2)
        else:
            raise RuntimeError(f"klas-hf {' '.join(arguments)} ended with code {process.returncode}")
        yield url
    finally:
        process.terminate()
        process.wait(30)


def under_load(options: Options, url: str) -> None:
    """All requests, by so many clients at once."""
    listed = json.load(urllib.request.urlopen(f"{url}/v1/models"))["data"]
    names = [one["id"] for one in listed if "@" in one["id"]]
    beginning, refused, lock = words(options.prompt, 0), Counter[str](), threading.Lock()

    def one(number: int) -> tuple[str, float, float]:
        name = names[number % len(names)]
        while True:
            try:
                return name, *ask(url, name, f"{beginning} {words(8, number)}", options.tokens)
            except urllib.error.HTTPError as error:
                if error.code != 503:
                    raise
                with lock:
                    refused[name] += 1
                time.sleep(float(error.headers["Retry-After"]))

    begun = time.perf_counter()
    with ThreadPoolExecutor(options.clients) as pool:
        answers = list(pool.map(one, range(options.requests)))
    taken = time.perf_counter() - begun
    lines = [["model", "path", "answers", "refused first", "s to the first token", "ms between tokens"]]
    paths = {one["id"]: one["path"] for one in listed}
    for name in names:
        first, between = zip(*((one[1], one[2]) for one in answers if one[0] == name), strict=True)
        cells = [str(len(first)), str(refused[name]), f"{median(first):.3f}", f"{1e3 * median(between):.1f}"]
        lines.append([name, paths[name], *cells])
    print(markdown_table(lines))
    print(
        f"\n{len(answers)} of {options.requests} requests answered whole in {taken:.1f} s by {options.clients} clients,"
        f" {options.requests * options.tokens / taken:.0f} tokens/s; refused and sent again: {sum(refused.values())}"
    )


def at_once(options: Options, url: str) -> None:
    """Tokens a second of some requests for one path, one after the other and all at once; rounds of both in turn."""
    path, lengths = PATHS[0], (options.prompt // 4, options.prompt)
    print(f"{options.together} requests of {options.tokens} tokens for {path}, medians of {options.rounds} rounds:")
    lines = [["tokens of the prompt", "one after the other, tokens/s", "at once, tokens/s", "ratio"]]
    for length in lengths:
        rates: dict[int, list[float]] = {1: [], options.together: []}
        for number in range(options.rounds):
            for clients, found in rates.items():
                seeds = [1000 * number + 100 * clients + one for one in range(options.together)]
                begun = time.perf_counter()
                with ThreadPoolExecutor(clients) as pool:
                    prompts = [words(length, seed) for seed in seeds]
                    list(pool.map(lambda prompt: ask(url, f"net@{path}", prompt, options.tokens), prompts))
                found.append(options.together * options.tokens / (time.perf_counter() - begun))
        one, all_ = (median(found) for found in rates.values())
        lines.append([str(length), f"{one:.1f}", f"{all_:.1f}", f"{all_ / one:.2f}"])
    print(markdown_table(lines) + "\n", flush=True)


def in_turn(options: Options, url: str) -> dict[str, float]:
    """Median seconds to the first token on each path, in rounds of one beginning each."""
    paths = ["1[:]", "1[:4] 1[6:]", "0[:]", *PATHS[:3]]
    found: dict[str, list[float]] = {path: [] for path in paths}
    for number in range(5):
        for path in paths:
            first, _ = ask(url, f"net@{path}", words(options.prompt, 1000 + number), 2)
            found[path].append(first)
    return {path: median(seconds) for path, seconds in found.items()}


def ask(url: str, model: str, prompt: str, tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and between tokens, of a streamed answer, which must be whole."""
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    begun, times, usage = time.perf_counter(), list[float](), {}
    with urllib.request.urlopen(request, timeout=600) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                usage = chunk.get("usage") or usage
                times.append(time.perf_counter() - begun)
    if usage.get("completion_tokens") != tokens:
        raise RuntimeError(f"got {usage} of {model}; expected {tokens} tokens")
    return times[0], (times[-1] - times[0]) / (tokens - 1)


def words(count: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{n}" for n in torch.randint(1, VOCABULARY, (count,), generator=generator).tolist())


if __name__ == "__main__":
    main()
