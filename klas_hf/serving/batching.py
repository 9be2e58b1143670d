"""Requests for one path are answered together, as one batch padded at the left, each to its own end.

What waits when a path is free begins as one batch, the first and all that are generated with the same settings, and is
read whole. What comes later and goes with them joins behind the next token: the batch stops there, the newcomer is read
alone, beginning with what others have read, and all go on from one cache. transformers' continuous batching is no way
here: its paged cache has one number of heads and one head width for all layers, which those of a path differ in.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import takewhile
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer
from transformers.cli.serving.utils import DirectStreamer, GenerateManager, _GenerationCancelled, _StreamError
from transformers.generation.configuration_utils import GenerationMode

ALONE: ContextVar[bool] = ContextVar("ALONE", default=False)  # whether this request must not share its random numbers
MOST = 64  # requests in one batch, one after the other: then what does not go with them has its turn
FROM_BEGINNING = (
    "min_length", "min_new_tokens", "max_time", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id",
    "exponential_decay_length_penalty", "guidance_scale", "encoder_repetition_penalty", "watermarking_config",
)  # fmt: skip


@dataclass(eq=False)
class Request:
    """One request of a batch.

    Attributes:
        ids: `(1, tokens)`.
        settings: how it is generated.
        take: is given each token.
        end: is called once at its end, with what went wrong.

    Attributes:
        said: tokens of the answer.
    """

    ids: Tensor
    settings: GenerationConfig
    take: Callable[[int], None]
    end: Callable[[Exception | None], None]
    said: list[int] = field(default_factory=list, init=False)
    over: bool = field(default=False, init=False)

    @property
    def text(self) -> Tensor:
        """`(tokens,)` Prompt and answer."""
        return torch.cat([self.ids[0], self.ids.new_tensor(self.said)])

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
        self.said.append(token)
        if token in last or len(self.said) == self.settings.max_new_tokens:
            self.close()

    def close(self, error: Exception | None = None) -> None:
        if not self.over:
            self.over = True
            self.end(error)


class Answers(StoppingCriteria):
    """Hands every sequence's tokens to its request, as a streamer, and says which have ended, as a criterion.

    All stop where `stops` says so.
    """

    def __init__(self, requests: Sequence[Request], last: Sequence[int], stops: Callable[[], bool]):
        self.requests, self.last, self.stops, self.begun = requests, last, stops, False

    def put(self, tokens: Tensor) -> None:
        """The prompts at first, then a token of each sequence."""
        if self.begun:
            for request, token in zip(self.requests, tokens.tolist(), strict=True):
                request.add(token, self.last)
        self.begun = True

    def end(self) -> None:
        """Nothing: the requests know their ends."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        stops = self.stops()
        return torch.tensor([stops or request.over for request in self.requests], device=input_ids.device)


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
        """Answer the first that waits, those that go with it and those that join; nothing, where it was answered."""
        with self._lock:
            asked = [one for one in self._waiting if one.goes_with(self._waiting[0])]
            self._waiting = deque(one for one in self._waiting if one not in asked)

        def newcomers(*, taken: bool = True) -> list[Request]:
            """Those in front of what does not go with the batch."""
            with self._lock:
                found = list(takewhile(asked[0].goes_with, self._waiting))[: max(0, MOST - len(asked))]
                if taken:
                    asked.extend(self._waiting.popleft() for _ in found)
            return found

        try:
            generate_together(model, list(asked), newcomers)
        except Exception as error:  # told to those who asked
            for one in asked:
                one.close(error)


def generate_together(
    model: Any, requests: Sequence[Request], newcomers: Callable[..., list[Request]] = lambda **_: []
) -> None:
    """Generate the answers of requests that go together, each to its own end.

    Args:
        model: of a path.
        requests: that begin as one batch.
        newcomers: hands out those who have come since and go with them; with `taken=False` it only shows them.
    """
    together, cache = list(requests), None
    while together:
        cache = _go_on(model, together, cache, lambda: bool(newcomers(taken=False)))
        parts = [(cache, [row for row, one in enumerate(together) if not one.over])]
        together = [one for one in together if not one.over]
        for one in newcomers() if together else ():
            read = _go_on(model, [one], None, lambda: True)
            if not one.over:
                together.append(one)
                parts.append((read, [0]))
        if together:
            cache = _merged(parts, max(len(one.text) for one in together) - 1)


def _go_on(model: Any, requests: Sequence[Request], cache: Cache | None, stops: Callable[[], bool]) -> Cache:
    """Generate until all have ended, or after a token where `stops` says so.

    Args:
        cache: of all of their tokens but the last; None: nothing was read.

    Returns:
        Such a cache.
    """
    texts = [one.text for one in requests]
    longest = max(map(len, texts))
    ids = torch.stack([pad(one, (longest - len(one), 0), value=int(one[0])) for one in texts])
    mask = torch.stack([pad(torch.ones_like(one), (longest - len(one), 0)) for one in texts])
    settings = GenerationConfig.from_dict(requests[0].settings.to_dict())
    settings.max_new_tokens = max(int(one.settings.max_new_tokens or 0) - len(one.said) for one in requests)
    settings.return_dict_in_generate = True
    last = settings.eos_token_id if settings.eos_token_id is not None else model.generation_config.eos_token_id
    answers = Answers(requests, last if isinstance(last, list) else [] if last is None else [last], stops)
    if cache is None and len(requests) > 1:
        cache = DynamicCache()
        cache.layers.extend(DynamicLayer() for _ in range(model.config.num_hidden_layers))  # such as can be merged
    return model.generate(
        input_ids=ids, attention_mask=mask, generation_config=settings, streamer=answers,
        stopping_criteria=StoppingCriteriaList([answers]), **{} if cache is None else {"past_key_values": cache},
    ).past_key_values  # fmt: skip


def _merged(parts: Sequence[tuple[Cache, list[int]]], length: int) -> DynamicCache:
    """Rows of some caches as one, with so many tokens: padded, or cut, at the left."""

    def aligned(states: Sequence[Tensor]) -> Tensor:
        chosen = zip(states, (rows for _, rows in parts), strict=True)
        return torch.cat([pad(one[rows], (0, 0, length - one.shape[-2], 0)) for one, rows in chosen])

    merged = DynamicCache()
    for layers in zip(*(cache.layers for cache, _ in parts), strict=True):
        layer = DynamicLayer()
        layer.update(aligned([one.keys for one in layers]), aligned([one.values for one in layers]))
        merged.layers.append(layer)
    return merged


def _shareable(settings: GenerationConfig) -> bool:
    """Whether a request is one answer token by token, ended by its length or a token of the model's."""
    return (
        not ALONE.get()
        and settings.get_generation_mode() in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        and (settings.num_return_sequences or 1) == 1
        and not settings.stop_strings
        and settings.max_new_tokens is not None
        and not any(getattr(settings, name, None) for name in FROM_BEGINNING)
    )
