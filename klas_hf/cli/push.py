"""`klas-hf push`: a saved stitched model on the Hub, in one commit, with its card."""

from dataclasses import dataclass, field
from pathlib import Path

from klas_hf.cli.card import CardOptions, saved_processor
from klas_hf.cli.data import load_model
from klas_hf.cli.output import say
from klas_hf.cli.parsing import Command, flag


@dataclass(frozen=True, kw_only=True)
class PushOptions(CardOptions):
    """Options of `klas-hf push`."""

    metric: str | None = field(default=None, metadata={"help": "of the curve; without it, the rows' first"})
    private: bool = flag("make a new repository private")
    overwrite: bool = flag("replace what the repository holds, whatever it is")
    revision: str | None = field(default=None, metadata={"metavar": "BRANCH", "help": "to commit to"})
    create_pr: bool = flag("open a pull request")


def run(options: PushOptions) -> int:
    """Run `klas-hf push`; its exit status."""
    from huggingface_hub import ModelCard

    from klas_hf.hub import publish

    about = options.about()
    readme = Path(options.folder) / "README.md"
    commit = publish(
        load_model(options.folder),
        options.repo_id,
        tokenizer_or_processor=saved_processor(options.folder),
        card=ModelCard.load(readme) if readme.exists() else None,
        metric=options.metric,
        private=True if options.private else None,
        overwrite=options.overwrite,
        revision=options.revision,
        create_pr=options.create_pr,
        **about,
    )
    say(str(commit.pr_url if options.create_pr else commit.commit_url))
    return 0


COMMAND = Command(
    "Publish a stitched model on the Hugging Face Hub with its tokenizer or image processor and its card (the folder's "
    "README.md, if there is one). The token is the one of `hf auth login` or HF_TOKEN.",
    PushOptions,
    run,
)
