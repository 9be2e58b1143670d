"""How a model will be run: what its seconds and its memory depend on."""

from dataclasses import dataclass

import torch

from klas_hf.processes import process_state


@dataclass(frozen=True)
class Usage:
    """How a model will be run, for costs in seconds and bytes.

    Attributes:
        prompt: tokens that are read before the first is written; images have none.
        batch: sequences or images at once.
        weight_bits: of each weight of the blocks' linear layers, a quantiser's scales included (4.5 for 4 bits with a
            scale of 32 bits for every 64 weights); None: as many as the dtype has.
        device: where it will run; None takes accelerate's.

    Raises:
        ValueError: a number below 1, or a device that is not here or has no clock.

    Example:
        >>> Usage(prompt=512, batch=8).on.type
        'cpu'
    """

    prompt: int = 128
    batch: int = 1
    weight_bits: float | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"got {name}={getattr(self, name)}; expected at least 1")
        if self.weight_bits is not None and not 0 < self.weight_bits <= 32:
            raise ValueError(f"got weight_bits={self.weight_bits}; expected more than 0 and at most 32")
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        here = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
        kind = process_state().device.type if self.device is None else self.device.partition(":")[0]
        if kind not in here:
            raise ValueError(f"got device={kind!r}, which is not here or has no clock; expected {' or '.join(here)}")

    @property
    def on(self) -> torch.device:
        """The device."""
        return process_state().device if self.device is None else torch.device(self.device)
