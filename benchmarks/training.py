"""Training: a supernet against SN-Net's loop, and healing by a teacher that remembers against one that does not.

SN-Net's loop is our own short transcription of its method (Pan et al., CVPR 2023): each step draws a stitch, runs the
front of one anchor, the stitching layer and the rear of the other, and updates all weights that the loss depends on.
"""

import random
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.measuring import Figure, in_turns
from benchmarks.models import CLASSES, classifier, llamas, sequences, vit
from benchmarks.options import Options
from klas_hf import (
    StitchedModel,
    StitchedSupernet,
    TrainingConfig,
    heal,
    healing_config,
    remember_answers,
    train_stitches,
)
from klas_hf.training.teachers import LIMIT


class Images:
    """Random images, decoded already."""

    def __init__(self, count: int, size: int):
        self.pixels, self.labels = torch.randn(count, 3, size, size), torch.randint(CLASSES, (count,)).tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        return self.pixels[index], self.labels[index]


class Stitched(nn.Module):
    """Two ViTs and a linear layer for each stitch between them."""

    def __init__(self, anchors: Sequence[PreTrainedModel], stitches: Sequence[tuple[int, int]]):
        super().__init__()
        self.anchors, self.stitches = nn.ModuleList(anchors), stitches
        small, large = (anchor.config.hidden_size for anchor in anchors)
        self.layers = nn.ModuleList(nn.Linear(small, large) for _ in stitches)

    def forward(self, pixels: Tensor, choice: int) -> Tensor:
        small, large = self.anchors
        stop, start = self.stitches[choice]
        hidden = small.vit.embeddings(pixels)
        for block in small.vit.layers[:stop]:
            hidden = block(hidden)
        hidden = self.layers[choice](hidden)
        for block in large.vit.layers[start:]:
            hidden = block(hidden)
        return large.classifier(large.vit.layernorm(hidden)[:, 0])


def figures(options: Options) -> Iterator[Figure]:
    yield _supernet(options)
    yield _healed(options)


def _supernet(options: Options) -> Figure:
    steps, batch_size = (2, 2) if options.quick else (8, 4)
    configs = [vit(options, width=192), vit(options)]
    blocks = configs[0].num_hidden_layers
    stitches = [(k, k) for k in range(1, blocks)]  # SN-Net's pairs of equal depths
    data = Images(steps * batch_size, configs[0].image_size)
    config = TrainingConfig(
        trainable="full", max_steps=steps, per_device_batch_size=batch_size, gradient_accumulation_steps=1,
        learning_rate=5e-5, weight_decay=0.05, drop_path=0.0,
    )  # fmt: skip
    supernet = StitchedSupernet.from_anchors([classifier(one) for one in configs], stitches)
    plain = Stitched([classifier(one) for one in configs], stitches)
    ours, theirs = in_turns(
        min(2, options.repeats),
        lambda: train_stitches(supernet, data, config),
        lambda: _sn_net(plain, data, steps, batch_size),
    )
    return Figure(f"{steps} steps on a supernet of two ViTs", ours, "SN-Net's loop", theirs, "s", 1.05)


def _healed(options: Options) -> Figure:
    """Two halves of a Llama, healed one after the other with their sweeps of rates."""
    _, large = llamas(options, 8)
    batches = sequences(options, 16)
    rows = [row for batch in batches for row in batch["input_ids"].tolist()]
    examples = [{"input_ids": row, "labels": row} for row in rows]
    steps = 4 if options.quick else 10
    # A share that is given: nothing but the rate is looked for.
    config = healing_config(steps, per_device_batch_size=2, eval_steps=steps, distillation_weight=0.5)
    blocks = large.config.num_hidden_layers
    paths = [f"0[:{start}] 0[{start + blocks // 2}:]" for start in (1, 2)]

    def heal_both(limit: int) -> None:
        with remember_answers(large, limit=limit):
            for path in paths:
                model = StitchedModel.from_path([large], path, joint="identity")
                heal(
                    model, examples[2:], teacher=large, validation=examples[:2], config=config, rates=(1e-5, 3e-5, 1e-4)
                )

    ours, theirs = in_turns(min(2, options.repeats), lambda: heal_both(LIMIT), lambda: heal_both(0))
    return Figure("two halves of a Llama healed, each with its sweep", ours, "a teacher that forgets", theirs, "s", 1.0)


def _sn_net(model: Stitched, data: Images, steps: int, batch_size: int) -> None:
    draw = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.05)
    loader = torch.utils.data.DataLoader(data, batch_size, shuffle=True)
    model.train()
    for _, (pixels, labels) in zip(range(steps), loader, strict=False):
        loss = F.cross_entropy(model(pixels, draw.randrange(len(model.stitches))), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
