"""The paths of a supernet under the names that requests give them: `NAME`, `NAME@60%`, `NAME@0[:8] 1[14:]`."""

import copy
import math
import time
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from klas_hf.budgets import Budget
from klas_hf.costs import Usage
from klas_hf.paths import Path
from klas_hf.stitching import StitchedSupernetForCausalLM
from klas_hf.stitching.prefixes import PrefixCache
from klas_hf.stitching.supernet_budgets import path_costs
from klas_hf.stitching.supernet_generation import check_length, is_single

ANSWER = 1024  # tokens at most where a request does not say, as transformers' server has it
UNASKED = 1 << 30


class UnknownModel(LookupError):
    """A request for another model."""


class ServedSupernet:
    """A supernet that is served: its paths by name, and what its requests have read.

    Args:
        supernet: of language models; the models of all its paths are made here, on its own weights.
        tokenizer: of all of its anchors.
        name: that requests give, without "@".
        prefix_bytes: of keys, values and states that are kept for requests to come.
        usage: how it runs, which budgets in seconds need; None: they are refused.

    Raises:
        ValueError: a name with "@" in it.
    """

    def __init__(
        self,
        supernet: StitchedSupernetForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        prefix_bytes: int = 1 << 30,
        usage: Usage | None = None,
    ):
        if "@" in name:
            raise ValueError(f"got name={name!r}; expected one without @, behind which the budget stands")
        self.supernet, self.tokenizer, self.name, self.usage = supernet.eval(), tokenizer, name, usage
        self.prefixes = PrefixCache(prefix_bytes)
        self.begun = int(time.time())
        self.costs, self.dearest = path_costs(supernet, usage)
        self.models = {path: PathModel(self, path) for path in supernet.paths}

    def path_of(self, model: str | None, budget: Any = None) -> Path:
        """The path that a request asks for.

        Args:
            model: the name, with a budget or a path behind "@"; None is the name alone.
            budget: as a field of its own.

        Raises:
            UnknownModel: another name.
            ValueError: two budgets, one that no path meets, or a path that there is not; what is served is listed.
        """
        name, _, asked = str(model or self.name).partition("@")
        if name != self.name:
            raise UnknownModel(f"got the model {model!r}; expected one of {self._list()}")
        if asked and budget is not None:
            raise ValueError(f"got the model {model!r} and budget={budget!r}; expected one budget")
        try:
            return self._path(asked or (1.0 if budget is None else budget))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{error}. Served are {self._list()}, any other budget and any path") from error

    def _path(self, asked: Any) -> Path:
        if isinstance(asked, str) and "[" in asked:
            path = self.supernet.check_path(asked)
            if path not in self.models:
                raise ValueError(f"got path {path}, which no path of this supernet uses alone; expected another")
            return path
        budget = Budget.of(asked)
        if budget.timed and self.usage is None:
            raise ValueError(
                f"got a budget of {budget.text}, and nothing was timed here; expected a share, parameters or bytes. "
                "For seconds start the server with --timed"
            )
        return self.supernet.best_path(budget, usage=self.usage)

    def budgets(self) -> dict[str, Path]:
        """The least share of the dearest anchor's MACs that each path is chosen for, cheapest first; in tenths of a
        per cent, rounded up."""
        found: dict[Path, str] = {}
        for cost in sorted(self.costs.values(), key=lambda one: one.macs):
            share = math.ceil(1000 * cost.macs / self.dearest.macs) / 10
            if share <= 100:
                found.setdefault(self.supernet.best_path(f"{share:g}%"), f"{share:g}%")
        return {budget: path for path, budget in found.items()}

    def listed(self) -> list[dict[str, Any]]:
        """What `/v1/models` answers: the name alone, which is the best path, and a name for each budget."""
        names = {self.name: self._path(1.0)}
        names |= {f"{self.name}@{budget}": path for budget, path in self.budgets().items()}
        return [self._entry(name, path) for name, path in names.items()]

    def _entry(self, name: str, path: Path) -> dict[str, Any]:
        cost = self.costs[path]
        found = {
            "id": name,
            "object": "model",
            "created": self.begun,
            "owned_by": "klas_hf",
            "path": str(path),
            "share": round(cost.macs / self.dearest.macs, 4),
            "macs": cost.macs,
            "parameters": cost.parameters,
            "kv_bytes_per_token": cost.kv_bytes_per_token,
            "max_model_len": self.models[path].config.max_position_embeddings,
        }
        return found if cost.latency is None else found | {"seconds_per_token": cost.latency}

    def _list(self) -> str:
        return ", ".join([self.name, *(f"{self.name}@{budget}" for budget in self.budgets())])


class PathModel:
    """One path, as the handlers of transformers' server use a model."""

    def __init__(self, served: ServedSupernet, path: Path):
        self.served, self.path = served, path
        self.model = served.supernet.path_model(path)
        self.config, self.device = self.model.config, self.model.device

    @property
    def generation_config(self) -> GenerationConfig:
        """The path's settings; handlers write into a copy of them."""
        settings = copy.deepcopy(self.model.generation_config)
        settings.max_new_tokens = UNASKED
        return settings

    def fit(self, tokens: int, settings: GenerationConfig) -> None:
        """Set how long an answer may be, where the request does not say.

        Raises:
            ValueError: prompt and answer are longer than one of the path's anchors reads.
        """
        check_length(self.model, tokens)
        room = self.config.max_position_embeddings - tokens
        asked = settings.max_new_tokens
        if asked == UNASKED or (asked is None and settings.max_length is None):
            settings.max_new_tokens = min(ANSWER, room)
        elif asked is not None and asked > room:
            raise ValueError(
                f"got a prompt of {tokens:,} tokens and max_tokens={asked:,} for {self.path}, which reads up to "
                f"{self.config.max_position_embeddings:,}; expected max_tokens of at most {room:,}"
            )

    def generate(self, input_ids: Any, **options: Any) -> Any:
        """What `generate` gives; a single sequence begins with what others have read."""
        shared = self.served.prefixes if is_single(self.model, input_ids, options) else None
        return self.served.supernet.generate(input_ids, path=self.path, prefixes=shared, **options)
