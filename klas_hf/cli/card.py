"""`klas-hf card`: the model card of a saved stitched model, written into its folder for the user to go on with."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from klas_hf.budgets import COSTS
from klas_hf.cli.data import load_model
from klas_hf.cli.output import OVERWRITE, check_output, say
from klas_hf.cli.parsing import Command, flag, positional, two
from klas_hf.rows import read_rows, read_run


@dataclass(frozen=True, kw_only=True)
class CardOptions:
    """What `klas-hf card` and `klas-hf push` share."""

    folder: str = positional("the stitched model, as `stitch` or `train` saved it")
    repo_id: str = positional("its place on the Hub: user/name")
    rows: str | None = field(default=None, metadata={"metavar": "FILE", "help": "rows.jsonl of it and its curve"})
    cost: str | None = field(
        default=None,
        metadata={
            "help": f"over which the curve is drawn: {', '.join(COSTS)}; without it, what their run names, or macs"
        },
    )
    dataset: str | None = field(default=None, metadata={"help": "what the rows were measured on: Hub id or name"})
    split: str | None = field(default=None, metadata={"help": "of the dataset"})
    licence: str | None = field(default=None, metadata={"help": "Hub identifier; without it, the anchors'"})
    base_model: list[str] | None = two("Hub ids of anchors that were read from folders", str, ("SOURCE", "TARGET"))

    def about(self) -> dict[str, Any]:
        """Arguments of `model_card`."""
        given = {name: getattr(self, name) for name in ("dataset", "split", "licence", "base_model")}
        named = {} if self.rows is None else read_run(self.rows)[0]
        given |= {"rows": None if self.rows is None else read_rows(self.rows)}
        return given | {"cost": self.cost or named.get("cost", "macs")}


@dataclass(frozen=True, kw_only=True)
class CardCommandOptions(CardOptions):
    """Options of `klas-hf card`."""

    overwrite: bool = flag(OVERWRITE)


def run(options: CardCommandOptions) -> int:
    """Run `klas-hf card`; its exit status."""
    from klas_hf.hub import model_card
    from klas_hf.hub.folder import draw_picture, picture_name
    from klas_hf.hub.subjects import describe

    folder = Path(options.folder)
    path = check_output(folder / "README.md", options.overwrite)
    model, about = load_model(options.folder), options.about()
    picture = picture_name(model, about["rows"])
    if picture is not None:
        check_output(folder / picture, options.overwrite)
    processor = saved_processor(options.folder) is not None
    card = model_card(model, options.repo_id, processor=processor, picture=picture, **about)
    draw_picture(folder, model, describe(model, options.base_model), about["rows"], None, about["cost"])
    card.save(path)
    say(f"Wrote {path}; `klas-hf push` takes it as it is then")
    return 0


def saved_processor(folder: str) -> Any:
    """The tokenizer or image processor that was saved with a model, or None."""
    from transformers import AutoImageProcessor, AutoTokenizer

    from klas_hf.anchors.vision import is_vision

    if is_vision(folder):
        present = (Path(folder) / "preprocessor_config.json").exists()
        return AutoImageProcessor.from_pretrained(folder) if present else None
    present = (Path(folder) / "tokenizer_config.json").exists()
    return AutoTokenizer.from_pretrained(folder) if present else None


COMMAND = Command(
    "Write the model card of a stitched model into its folder: base models, licence, costs, figures, code.",
    CardCommandOptions,
    run,
)
