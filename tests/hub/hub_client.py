"""The unmodified client of the Hub in a process of its own, which reads the endpoint and an empty cache at import."""

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

from hub_server import RIGHT_TOKEN


class HubClient:
    """Calls functions of test modules in a process whose Hub is the server; what they return or raise comes back."""

    def __init__(self, pool: ProcessPoolExecutor):
        self.pool = pool

    def __call__(
        self, function: Callable[..., Any], *args: Any, as_token: str | None = RIGHT_TOKEN, **kwargs: Any
    ) -> Any:
        """Call the function, logged in with a token; None: not logged in."""
        return self.pool.submit(_call, as_token, function, args, kwargs).result(timeout=120)


@contextmanager
def hub_client(url: str, cache: Path) -> Iterator[HubClient]:
    """A client of the server at this address."""
    settings = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with mock.patch.dict(os.environ, settings), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(_start, sys.path).result()
        yield HubClient(pool)


def _start(path: list[str]) -> None:
    sys.path[:] = path
    import torch

    torch.set_num_threads(1)


def _call(token: str | None, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    with mock.patch.dict(os.environ, {"HF_TOKEN": token} if token else {}):
        return function(*args, **kwargs)
