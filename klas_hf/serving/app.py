"""The server of transformers (`transformers serve`) with a supernet in the place of its models.

Requests, answers and streams are transformers' own; what differs is which model a request means, how long an answer may
be, that requests for one path are answered in batches, and what happens when too much is asked at once. Different paths
run at the same time.
"""

import socket
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import BaseGenerateManager, GenerationState

from klas_hf.serving.batching import ALONE, BatchManager
from klas_hf.serving.paths import ServedSupernet, UnknownModel

RETRY_SECONDS = 1


def build_app(served: ServedSupernet, most: int = 32) -> FastAPI:
    """The application that answers for a supernet.

    Args:
        served: the supernet.
        most: requests at once, running and waiting; more are refused with 503, to be sent again.

    Raises:
        ValueError: fewer than one.
    """
    if most < 1:
        raise ValueError(f"got most={most}; expected at least 1")
    manager, state, nothing = _Manager(served), _State(), _Unserved()
    handlers = [
        _OnPath(kind(manager, state), served) for kind in (ChatCompletionHandler, CompletionHandler, ResponseHandler)
    ]
    app = build_server(
        manager, handlers[0], completion_handler=handlers[1], response_handler=handlers[2],
        transcription_handler=nothing, systemone_handler=nothing, generation_state=state,
    )  # fmt: skip
    app.add_exception_handler(UnknownModel, _refusing(404))
    app.add_exception_handler(ValueError, _refusing(400))
    app.add_exception_handler(HTTPException, _explained)
    app.add_middleware(_Admission, most=most)
    return app


def check_address(host: str, port: int) -> None:
    """Find out before anything is loaded whether a server can listen there.

    Raises:
        ValueError: no port number.
        OSError: the port is taken, or the host is not this machine's.
    """
    if not 0 <= port <= 65_535:
        raise ValueError(f"got port={port}; expected 0 (any that is free) to 65535")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except OSError as error:
        raise OSError(f"got host={host!r} and port={port} ({error.strerror}); expected an address of this machine and "
                      "a free port") from error  # fmt: skip


def run_app(app: FastAPI, host: str, port: int) -> None:
    """Serve until interrupted; requests under way are finished first."""
    uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="info")).run()


class _OnPath:
    """A handler of transformers, given requests whose budget has become a path."""

    def __init__(self, handler: Any, served: ServedSupernet):
        self.handler, self.served = handler, served

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        if not isinstance(self.handler, CompletionHandler) and self.served.tokenizer.chat_template is None:
            raise ValueError(
                "got a chat, and the tokenizer of this supernet has no chat template; expected /v1/completions with a "
                "prompt. Or save a tokenizer with a template into its folder"
            )
        path = self.served.path_of(body.get("model"), body.pop("budget", None))
        ALONE.set(body.get("seed") is not None)
        return await self.handler.handle_request(body | {"model": f"{self.served.name}@{path}"}, request_id)


class _Unserved:
    async def handle_request(self, *args: Any) -> Any:
        raise HTTPException(404, "a supernet of language models serves /v1/chat/completions, /v1/completions and "
                            "/v1/responses")  # fmt: skip


class _Manager(ModelManager):
    """Hands out the paths of one supernet, which is never loaded anew nor unloaded."""

    def __init__(self, served: ServedSupernet):
        super().__init__()
        self.served = served

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def load_model_and_processor(
        self, model_id_and_revision: str, progress_callback: Any = None, **options: Any
    ) -> tuple[Any, Any]:
        path = self.served.path_of(model_id_and_revision)
        if progress_callback is not None:
            progress_callback({"status": "ready", "model": model_id_and_revision, "cached": True})
        return self.served.models[path], self.served.tokenizer

    def get_gen_models(self) -> list[dict[str, Any]]:
        return self.served.listed()


class _State(GenerationState):
    """One thread for each path, which answers together what waits together."""

    def get_manager(self, model_id: str, use_cb: bool = False) -> BaseGenerateManager:
        if model_id not in self._generate_managers:
            self._generate_managers[model_id] = BatchManager()
        return self._generate_managers[model_id]


class _Admission:
    """Lets in so many requests for text at once, until each is answered to its end; refuses more with 503."""

    def __init__(self, app: ASGIApp, most: int):
        self.app, self.most, self.inside = app, most, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
        elif self.inside >= self.most:
            refusal = _error(503, f"{self.most} requests are being answered or waiting; send this one again later")
            refusal.headers["Retry-After"] = str(RETRY_SECONDS)
            await refusal(scope, receive, send)
        else:
            self.inside += 1
            try:
                await self.app(scope, receive, send)
            finally:
                self.inside -= 1


def _error(status: int, message: str) -> JSONResponse:
    """As OpenAI's clients read it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status_code=status)


def _refusing(status: int) -> Any:
    async def refuse(request: Request, error: Exception) -> JSONResponse:
        return _error(status, str(error))

    return refuse


async def _explained(request: Request, error: HTTPException) -> JSONResponse:
    return _error(error.status_code, str(error.detail))
