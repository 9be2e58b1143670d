"""Probes: what each block of an anchor already says about the next token (KLAS Alg. 1, in logit-lens form).

A full linear probe per block would have width × vocabulary parameters, 15 billion for Llama 3.2 1B and 3B. A probe
here is a translator in hidden space, followed by the anchor's own frozen final norm and unembedding:

    logits = unembed(norm(h + W h + b))

Three kinds: `logit` has W = b = 0 (the logit lens); `ridge` is the least-squares map to the last block's output,
in closed form from one pass; `tuned` starts there and is trained (the tuned lens; `klas_hf.training.train_probes`).
The last block needs no translator.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from klas_hf.actions import Publishable
from klas_hf.anchors.language import LanguageAnchor, load_anchor
from klas_hf.maths.least_squares import LeastSquares, summing_device
from klas_hf.models.checkpoint_files import load_whole
from klas_hf.models.replacing import WrittenWhole
from klas_hf.processes import progress, shared_out, sum_over_processes

KINDS = ("logit", "ridge", "tuned")


class ProbeConfig(PreTrainedConfig):
    """How probes are made, and of which anchor they are.

    Args:
        kind: "ridge" (default), "logit" or "tuned".
        ridge: penalty on W, relative to the variance of a standardised hidden unit; None leaves it to the fit.
        tuned_loss: what tuned probes learn: "kl" to the anchor's own output distribution, or "ce" of the next token.
        tuned_start: "ridge" or "zero" (the logit lens).
        epochs, learning_rate: of the tuning, AdamW with a linear decay.
        anchor_name, anchor_revision, anchor_fingerprint, num_blocks, width: filled in by the fit.
        r2: share that each ridge translator explains of what is still to come after its block, the variance of
            last block's output - h, on its own training data.

    Raises:
        ValueError: an unknown kind, loss or start.

    Example:
        >>> probes = train_probes(source, batches, ProbeConfig(kind="tuned", tuned_loss="ce", learning_rate=1e-4))
        >>> probes.config.num_blocks, probes.config.width, len(probes.config.r2)
        (3, 16, 2)
    """

    model_type = "klas_probes"

    kind: str = "ridge"
    ridge: float | None = 1e-4
    tuned_loss: str = "kl"
    tuned_start: str = "ridge"
    epochs: int = 1
    learning_rate: float = 1e-3
    anchor_name: str | None = None
    anchor_revision: str | None = None
    anchor_fingerprint: str | None = None
    num_blocks: int = 1
    width: int = 1
    r2: list[float] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name, value, known in (
            ("kind", self.kind, KINDS),
            ("tuned_loss", self.tuned_loss, ("kl", "ce")),
            ("tuned_start", self.tuned_start, ("ridge", "zero")),
        ):
            if value not in known:
                raise ValueError(f"got {name}={value!r}; expected one of {known}")
        super().__post_init__(**kwargs)


class ProbeNet(Publishable, WrittenWhole, PreTrainedModel):
    """One probe per block of an anchor (Alg. 1); saves, loads and goes to the Hub as any model.

    The anchor's norm and unembedding are not part of it: they are used where the anchor is at hand.

    Args:
        config: with the anchor's depth and width; `train_probes` makes both.

    Example:
        >>> _ = train_probes(source, batches, ProbeConfig(kind="ridge")).save_pretrained(folder)
        >>> probes = ProbeNet.from_pretrained(folder)
        >>> probes.translate(0, torch.zeros(5, 16)).shape  # as if the last block had run
        torch.Size([5, 16])
    """

    config_class = ProbeConfig
    base_model_prefix = ""
    main_input_name = "hidden"

    def __init__(self, config: ProbeConfig):
        super().__init__(config)
        translated = config.num_blocks - 1
        self.offsets = nn.Parameter(torch.zeros(translated, config.width))
        self.translators = nn.ModuleList(
            nn.Linear(config.width, config.width, bias=False)
            for _ in range(0 if config.kind == "logit" else translated)
        )
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "ProbeNet":
        """Load saved probes.

        Raises:
            OSError: they are damaged, incomplete or pickled.
        """
        return load_whole(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            nn.init.zeros_(parameter)

    def translate(self, block: int, hidden: Tensor) -> Tensor:
        """Hidden states as the last block would have them: h + W h + b.

        Args:
            block: which block `hidden` is the output of, from 0.
            hidden: `(..., width)`.
        """
        hidden = hidden.to(self.offsets)
        if block == self.config.num_blocks - 1:
            return hidden
        moved = hidden + self.offsets[block]
        return moved + self.translators[block](hidden) if self.translators else moved

    def log_probs(self, hidden: Sequence[Tensor], anchor: LanguageAnchor, out: Tensor | None = None) -> Tensor:
        """Next-token log-probabilities of all probes, fp32, in nats.

        Args:
            hidden: `(tokens, width)` output of every block.
            anchor: the anchor that the probes are of.
            out: fp32 tensor to write to; None makes one. Taking new memory for a large vocabulary costs a CPU more
                than filling it.

        Returns:
            `(blocks, tokens, vocabulary)`.
        """
        translated = torch.stack([self.translate(block, h) for block, h in enumerate(hidden)])
        logits = anchor.logits(translated)
        if out is None:
            return logits.float().log_softmax(-1)
        for block, block_logits in enumerate(logits):
            out[block] = block_logits.float().log_softmax(-1)
        return out

    @property
    def summary(self) -> dict[str, Any]:
        """What scores say about the probes that they were measured with, as plain JSON values."""
        return {"kind": self.config.kind, "ridge": self.config.ridge}

    def check(self, anchor: LanguageAnchor) -> None:
        """Raise ValueError unless these are the probes of this anchor's very weights."""
        config = self.config
        if (config.num_blocks, config.width) != (anchor.num_blocks, anchor.width):
            raise ValueError(
                f"got probes of {config.num_blocks} blocks {config.width} wide ({config.anchor_name}) for "
                f"{anchor.name}, which has {anchor.num_blocks} blocks {anchor.width} wide; train probes for this anchor"
            )
        if config.anchor_fingerprint != anchor.fingerprint:
            raise ValueError(
                f"got probes of {config.anchor_name} (weights {str(config.anchor_fingerprint)[:12]}) for {anchor.name} "
                f"(weights {anchor.fingerprint[:12]}): other weights; expected the model they were trained on. "
                "Train probes for this anchor with train_probes"
            )


@torch.no_grad()
def fit_probes(anchor: Any, data: Iterable[Any], config: ProbeConfig | None = None) -> ProbeNet:
    """Probes in closed form (`logit`, `ridge`, or the start of `tuned`), from one pass over the data.

    Args:
        anchor: Hub id, folder or model.
        data: batches of token ids; padding and BOS are left out.
        config: kind and ridge; None takes the defaults.

    Raises:
        ValueError: no token to fit to, or activations that are not finite.
    """
    anchor = load_anchor(anchor)
    config = described(config or ProbeConfig(), anchor)
    probes = ProbeNet(config).to(anchor.device)
    if config.kind == "logit" or (config.kind == "tuned" and config.tuned_start == "zero"):
        return probes.eval()
    equations = [LeastSquares(anchor.width, anchor.width, anchor.device) for _ in probes.translators]
    for batch in progress(shared_out(anchor.read(data)), f"ridge probes of {anchor.name}"):
        home = summing_device(anchor.device)
        *earlier, last = (anchor.rows(state, batch).to(home).double() for state in anchor.states(batch)[1:])
        for equation, h in zip(equations, earlier, strict=True):
            equation.update(h, last - h)
    config.r2 = []
    for block, equation in enumerate(equations):
        equation.combine(sum_over_processes)
        fit = equation.solve(config.ridge)
        probes.translators[block].weight.copy_(fit.weight)
        probes.offsets[block].copy_(fit.bias)
        config.r2.append(fit.r2)
    return probes.eval()


def described(config: ProbeConfig, anchor: LanguageAnchor) -> ProbeConfig:
    """A copy of the settings with the anchor's identity filled in."""
    return ProbeConfig(
        **{
            **config.to_dict(),
            "anchor_name": anchor.name,
            "anchor_revision": anchor.revision,
            "anchor_fingerprint": anchor.fingerprint,
            "num_blocks": anchor.num_blocks,
            "width": anchor.width,
        }
    )
