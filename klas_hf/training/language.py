"""The loss of text: every next token that has a label."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from klas_hf.training.config import TrainingConfig
from klas_hf.training.data import IGNORED, EpochOrder, batches_of
from klas_hf.training.losses import cross_entropies
from klas_hf.training.objectives import Objective


class LanguageObjective(Objective):
    """The loss of examples with `input_ids` and `labels`.

    Raises:
        ValueError: settings that are of images; as `Objective`.
    """

    kind = "text"

    def __init__(
        self,
        model: PreTrainedModel,
        data: Sequence[Mapping[str, Any]],
        config: TrainingConfig,
        teacher: PreTrainedModel | None,
    ):
        super().__init__(model, config, teacher)
        if config.augmentation is not None:
            raise ValueError(f"got an augmentation for {type(model).__name__}, which reads text; expected None")
        self.data = data
        self.may_skip_parameters = self.paths is not None

    def batches(self, multiple: int) -> tuple[DataLoader, EpochOrder]:
        config, vocabulary = self.config, self.classes(self.model)
        return batches_of(
            self.data, config.per_device_batch_size, multiple, config.seed, config.num_workers, vocabulary
        )

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["labels"][:, 1:] != IGNORED).sum()

    def inputs(self, batch: dict[str, Tensor]) -> tuple[dict[str, Any], Tensor]:
        forward = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        following = batch["labels"][:, 1:]
        return forward, following[following != IGNORED]

    def labelled(self, output: Any, batch: dict[str, Tensor]) -> Tensor:
        return output.logits[:, :-1][batch["labels"][:, 1:] != IGNORED]

    def own_losses(self, output: Any, logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropies(logits, targets)

    def by_example(self, losses: Tensor, batch: dict[str, Tensor]) -> Tensor:
        rows = (batch["labels"][:, 1:] != IGNORED).nonzero()[:, 0]
        labelled, place = rows.unique_consecutive(return_inverse=True)
        return losses.new_zeros(len(labelled)).index_add(0, place, losses)

    def classes(self, model: PreTrainedModel) -> int:
        return model.config.get_text_config().vocab_size
