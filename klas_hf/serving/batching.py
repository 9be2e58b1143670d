"""Requests for one path that wait together are answered together, as one batch padded at the left.

While a path is busy, requests for it gather; when it is free, the first of them and all that are generated with the
same settings run at once, each to its own end. One that waits alone runs alone, and begins with what others have read.
What begins anew in a batch is read whole. transformers' continuous batching is no way here: its paged cache has one
number of heads and one head width for all layers, which those of a path differ in.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.utils import DirectStreamer, GenerateManager, _GenerationCancelled, _StreamError
from transformers.generation.configuration_utils import GenerationMode

ALONE: ContextVar[bool] = ContextVar("ALONE", default=False)  # whether this request must not share its random numbers


@dataclass(eq=False)
class Request:
    """One request of a batch.

    Attributes:
        ids: `(1, tokens)`.
        settings: how it is generated.
        take: is given each token.
        end: is called once at its end, with what went wrong.
    """

    ids: Tensor
    settings: GenerationConfig
    take: Callable[[int], None]
    end: Callable[[Exception | None], None]
    taken: int = field(default=0, init=False)
    over: bool = field(default=False, init=False)

    def goes_with(self, other: "Request") -> bool:
        """Whether both are generated alike, but for their lengths."""
        one, two = (request.settings.to_dict() | {"max_new_tokens": None} for request in (self, other))
        return one == two

    def add(self, token: int, last: Sequence[int]) -> None:
        """Take a token; those in `last` end an answer."""
        if self.over:
            return
        try:
            self.take(token)
        except _GenerationCancelled as error:
            return self.close(error)
        self.taken += 1
        if token in last or self.taken == self.settings.max_new_tokens:
            self.close()

    def close(self, error: Exception | None = None) -> None:
        if not self.over:
            self.over = True
            self.end(error)


class Answers(StoppingCriteria):
    """Hands every sequence's tokens to its request, as a streamer, and says which have ended, as a criterion."""

    def __init__(self, requests: Sequence[Request], last: Sequence[int]):
        self.requests, self.last, self.begun = requests, last, False

    def put(self, tokens: Tensor) -> None:
        """The prompts at first, then a token of each sequence."""
        if self.begun:
            for request, token in zip(self.requests, tokens.tolist(), strict=True):
                request.add(token, self.last)
        self.begun = True

    def end(self) -> None:
        for request in self.requests:
            request.close()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.tensor([request.over for request in self.requests], device=input_ids.device)


class BatchManager(GenerateManager):
    """What one path has to answer, on a thread of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: deque[Request] = deque()
        self._lock = Lock()

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: GenerationConfig, request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue, DirectStreamer]:  # fmt: skip
        """As transformers' own, in a batch with others."""
        model.fit(inputs["input_ids"].shape[-1], gen_config)
        if not _shareable(gen_config):
            return super().generate_streaming(model, processor, inputs, gen_config, request_id, response_parser)
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
        streamer = DirectStreamer(processor._tokenizer, loop, queue, response_parser=response_parser)
        streamer.put(inputs["input_ids"][0])  # the prompt, which it passes over

        def end(error: Exception | None) -> None:
            if error is None:
                streamer.end()
            else:
                told = None if isinstance(error, _GenerationCancelled) else _StreamError(str(error))
                loop.call_soon_threadsafe(queue.put_nowait, told)

        self._ask(
            model, Request(inputs["input_ids"], gen_config, lambda token: streamer.put(torch.tensor([token])), end)
        )
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: GenerationConfig, request_id: str
    ) -> tuple[str, int, Tensor]:
        """As transformers' own, in a batch with others."""
        length = inputs["input_ids"].shape[-1]
        model.fit(length, gen_config)
        if not _shareable(gen_config):
            return await super().generate_non_streaming(model, processor, inputs, gen_config, request_id)
        loop, tokens = asyncio.get_running_loop(), list[int]()
        answer: asyncio.Future[None] = loop.create_future()

        def set_answer(error: Exception | None) -> None:
            if error is not None and not answer.done():
                answer.set_exception(error)
            elif not answer.done():
                answer.set_result(None)

        def end(error: Exception | None) -> None:
            loop.call_soon_threadsafe(set_answer, error)

        self._ask(model, Request(inputs["input_ids"], gen_config, tokens.append, end))
        await answer
        return processor.decode(tokens, skip_special_tokens=True), length, torch.tensor(tokens)

    def _ask(self, model: Any, request: Request) -> None:
        with self._lock:
            self._waiting.append(request)
        self.submit(self._answer, model)

    def _answer(self, model: Any) -> None:
        """Answer the first that waits, and those that go with it; nothing, where it was answered with others."""
        with self._lock:
            together = [one for one in self._waiting if one.goes_with(self._waiting[0])]
            self._waiting = deque(one for one in self._waiting if one not in together)
        if together:
            try:
                generate_together(model, together)
            except Exception as error:  # told to those who asked
                for one in together:
                    one.close(error)


def generate_together(model: Any, requests: Sequence[Request]) -> None:
    """Generate the answers of requests that go together, each to its own end."""
    longest = max(one.ids.shape[1] for one in requests)
    ids = requests[0].ids.new_zeros(len(requests), longest)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(requests):
        ids[row, longest - one.ids.shape[1] :] = one.ids[0]
        mask[row, longest - one.ids.shape[1] :] = 1
    settings = GenerationConfig.from_dict(requests[0].settings.to_dict())
    settings.max_new_tokens = max(int(one.settings.max_new_tokens or 0) for one in requests)
    last = settings.eos_token_id if settings.eos_token_id is not None else model.generation_config.eos_token_id
    answers = Answers(requests, last if isinstance(last, list) else [] if last is None else [last])
    model.generate(
        input_ids=ids, attention_mask=mask, generation_config=settings, streamer=answers,
        stopping_criteria=StoppingCriteriaList([answers]),
    )  # fmt: skip


def _shareable(settings: GenerationConfig) -> bool:
    """Whether a request is one answer token by token, ended by its length or a token of the model's."""
    return (
        not ALONE.get()
        and settings.get_generation_mode() in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        and (settings.num_return_sequences or 1) == 1
        and not settings.stop_strings
        and settings.max_new_tokens is not None
    )
