"""Next-token training of language models and supernets: cross-entropy, distillation from a teacher, random paths."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from klas_hf.anchors.language import evaluating
from klas_hf.training.config import TrainingConfig
from klas_hf.training.data import EpochOrder, batches_of
from klas_hf.training.losses import cross_entropy_sum, distillation_sum, label_count
from klas_hf.training.objectives import Objective, stitched_from
from klas_hf.training.paths import path_sampler


class LanguageObjective(Objective):
    """The loss of examples with `input_ids` and `labels`.

    Args:
        model: the model that is trained, not wrapped.
        data: the examples.
        config: settings.
        teacher: for distillation; unused without a `distillation_weight`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        data: Sequence[Mapping[str, Any]],
        config: TrainingConfig,
        teacher: PreTrainedModel | None,
    ):
        self.model, self.data, self.config = model, data, config
        self.teacher = teacher if config.distillation_weight else None
        self.paths = path_sampler(model, config)
        self.may_skip_parameters = self.paths is not None

    def batches(self, multiple: int) -> tuple[DataLoader, EpochOrder]:
        return batches_of(self.data, self.config.per_device_batch_size, multiple, self.config.seed)

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return label_count(batch["labels"])

    def loss_sum(self, model: nn.Module, batch: dict[str, Tensor], seed: tuple[int, ...]) -> Tensor:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        # Not left to the Accelerator, whose precision is one for the life of the process.
        is_bf16 = self.config.mixed_precision == "bf16"
        with torch.autocast(batch["labels"].device.type, torch.bfloat16, enabled=is_bf16):
            logits = model(**inputs, **self._options(seed)).logits
        loss = cross_entropy_sum(logits, batch["labels"])
        weight = self.config.distillation_weight
        if self.teacher is None:
            return loss
        with torch.no_grad(), evaluating(self.teacher):
            teacher_logits = self.teacher(**inputs).logits
        distance = distillation_sum(logits, teacher_logits, batch["labels"], self.config.distillation_temperature)
        return (1 - weight) * loss + weight * distance

    @contextmanager
    def while_training(self, device: torch.device) -> Iterator[None]:
        if self.teacher is not None:
            self.teacher.to(device)
        if self.config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            yield
        finally:
            if self.config.gradient_checkpointing:
                self.model.gradient_checkpointing_disable()

    def description(self) -> dict[str, Any]:
        sizes = {name: getattr(self.model.config, name, None) for name in ("num_hidden_layers", "hidden_size")}
        paths = None if self.paths is None else [str(path) for path in self.model.paths]
        return stitched_from(self.model.config) | sizes | ({} if paths is None else {"paths": paths})

    def _options(self, seed: tuple[int, ...]) -> dict[str, Any]:
        return {} if self.paths is None else {"path": self.model.paths[self.paths.draw(seed)]}
