"""`klas-hf serve`: a language supernet by the OpenAI protocol, each request on the path that its budget asks for."""

from dataclasses import dataclass, field
from pathlib import Path

from klas_hf.cli.data import load_supernet
from klas_hf.cli.output import say
from klas_hf.cli.parsing import Command, flag, positional


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Options of `klas-hf serve`."""

    supernet: str = positional("a saved supernet of language models: folder or Hub id")
    name: str | None = field(default=None, metadata={"help": "of the model in requests; without it, the folder's"})
    host: str = field(default="localhost", metadata={"help": "address to listen at"})
    port: int = field(default=8000, metadata={"metavar": "N", "help": "port to listen at"})
    most: int = field(
        default=32, metadata={"metavar": "N", "help": "requests at once, waiting ones too; more are told to come again"}
    )
    prefixes: str = field(
        default="1 GB", metadata={"metavar": "BYTES", "help": "kept of what was read, for requests that begin alike"}
    )
    rows: str | None = field(
        default=None, metadata={"metavar": "FILE", "help": "rows of all paths, by which the best is chosen"}
    )
    metric: str = field(default="loss", metadata={"help": "of these rows"})
    timed: bool = flag("time the paths before serving, for budgets such as 20ms")
    prompt: int = field(default=128, metadata={"metavar": "N", "help": "tokens that come first, for --timed"})
    dtype: str = field(default="auto", metadata={"help": "of the weights; auto: as they were saved"})

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError(f"got most={self.most}; expected at least 1")


def run(options: ServeOptions) -> int:
    """Run `klas-hf serve`; its exit status."""
    try:
        from klas_hf.serving.app import build_app, check_address, run_app
    except ImportError as error:
        raise ImportError(f'serving needs further packages ({error}): pip install "klas_hf[serve]"') from error
    from klas_hf.budgets import Budget
    from klas_hf.costs import Usage
    from klas_hf.curves.tradeoff import higher_is_better, measured_models
    from klas_hf.rows import read_rows
    from klas_hf.serving.paths import ServedSupernet

    try:
        size = Budget.of(options.prefixes).weight_bytes
    except ValueError:
        size = None
    if size is None:
        raise ValueError(f"got prefixes={options.prefixes!r}; expected bytes, such as 1GB")
    check_address(options.host, options.port)
    supernet, tokenizer = load_supernet(options.supernet, dtype=options.dtype)
    if options.rows is not None:
        sign = -1 if higher_is_better(options.metric) else 1
        measured = measured_models(read_rows(options.rows), options.metric)
        supernet.rank({one.rows[0].path: sign * one.value for one in measured if one.rows[0].path is not None})
    usage = Usage(prompt=options.prompt) if options.timed else None
    name = options.name or Path(options.supernet).name
    served = ServedSupernet(supernet, tokenizer, name, size, usage)
    for one in served.listed():
        say(f"{one['id']}: {one['path']}, {one['share']:.1%} of the MACs, up to {one['max_model_len']:,} tokens")
    run_app(build_app(served, options.most), options.host, options.port)
    return 0


COMMAND = Command(
    "Serve a supernet of language models by the OpenAI protocol. The model's name carries the budget: NAME@60%%, "
    "NAME@4GB; so does a field `budget` of the request.",
    ServeOptions,
    run,
)
