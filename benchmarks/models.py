"""The anchors that are measured: random weights, published shapes, or a part of these."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    SwinConfig,
    ViTConfig,
)

from benchmarks.options import Options
from klas_hf import Stitch, StitchedModel

CLASSES = 1000


def llama_configs(options: Options, scale: int) -> tuple[LlamaConfig, LlamaConfig]:
    """Of the shape of Llama 3.2 1B and 3B, their widths divided by `scale` unless the options say otherwise."""
    scale = options.scale or scale
    shared = {"vocab_size": options.vocabulary, "intermediate_size": 8192 // scale, "tie_word_embeddings": True}
    shared |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    heads = max(1, 32 // scale), max(1, 24 // scale)
    small = LlamaConfig(
        hidden_size=2048 // scale, num_hidden_layers=options.blocks, num_attention_heads=heads[0],
        num_key_value_heads=max(1, heads[0] // 4), head_dim=64, **shared,
    )  # fmt: skip
    large = LlamaConfig(
        hidden_size=3072 // scale, num_hidden_layers=options.blocks * 7 // 4, num_attention_heads=heads[1],
        num_key_value_heads=max(1, heads[1] // 3), head_dim=128, **shared,
    )  # fmt: skip
    return small, large


def llamas(options: Options, scale: int) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    small, large = (
        LlamaForCausalLM._from_config(config, dtype=getattr(torch, options.dtype)).to(options.device).eval()
        for config in llama_configs(options, scale)
    )
    return small, large


def sequences(options: Options, count: int, seed: int = 0, batch_size: int = 4) -> list[dict[str, Tensor]]:
    """Random tokens, in batches."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, options.vocabulary, (count, options.tokens), generator=generator)
    return [{"input_ids": part} for part in ids.split(batch_size)]


def halves(small: PreTrainedConfig, large: PreTrainedConfig) -> Stitch:
    """The first half of the blocks of one Llama and the second of another's."""
    return Stitch(small.num_hidden_layers // 2, large.num_hidden_layers // 2)


def swins(options: Options) -> list[SwinConfig]:
    """Swin-T, -S and -B, or three tiny ones."""
    if options.quick:
        common = {"image_size": 64, "window_size": 2, "num_heads": [1, 2, 2, 2], "num_labels": CLASSES}
        shapes = [(8, [1, 1, 2, 1]), (8, [1, 1, 4, 1]), (12, [1, 1, 4, 1])]
        return [SwinConfig(embed_dim=width, depths=depths, **common) for width, depths in shapes]
    return [
        SwinConfig(embed_dim=width, depths=depths, num_heads=[heads * 2**n for n in range(4)], num_labels=CLASSES)
        for width, depths, heads in ((96, [2, 2, 6, 2], 3), (96, [2, 2, 18, 2], 3), (128, [2, 2, 18, 2], 4))
    ]


def middle(small: PreTrainedConfig, large: PreTrainedConfig) -> Stitch:
    """The stitch from the middle of the third stage of one Swin to that of another."""
    return Stitch(*(sum(config.depths[:2]) + config.depths[2] // 2 for config in (small, large)))


def vit(options: Options, width: int = 384, blocks: int = 6) -> ViTConfig:
    """ViT-Ti/16 (192) or ViT-S/16 (384) with fewer blocks, or a tiny one."""
    if options.quick:
        width, blocks = width // 12, 3
    return ViTConfig(
        image_size=64 if options.quick else 224, hidden_size=width, num_hidden_layers=blocks,
        num_attention_heads=max(1, width // 64), intermediate_size=4 * width, num_labels=CLASSES,
    )  # fmt: skip


def classifier(config: PreTrainedConfig) -> PreTrainedModel:
    return AutoModelForImageClassification.from_config(copy.deepcopy(config)).eval()


def images(options: Options, batch_size: int, count: int) -> list[dict[str, Tensor]]:
    size = 64 if options.quick else 224
    return [
        {"pixel_values": torch.randn(batch_size, 3, size, size), "labels": torch.randint(0, CLASSES, (batch_size,))}
        for _ in range(count)
    ]


@contextmanager
def saved_llamas(options: Options, scale: int = 2) -> Iterator[Path]:
    """A folder with two Llamas, source and target, in shards, the model stitched of their halves, and stitch.json."""
    small, large = llamas(options, scale)
    with TemporaryDirectory() as name:
        folder = Path(name)
        for one, model in (("source", small), ("target", large)):
            model.save_pretrained(folder / one, max_shard_size="5GB" if options.scale == 1 else "50MB")
        del small, large, model
        _keep_stitch(folder, halves(*llama_configs(options, scale)))
        yield folder


@contextmanager
def saved_swins(options: Options) -> Iterator[Path]:
    """The same of two Swins."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        small, _, large = swins(options)
        for one, config in (("source", small), ("target", large)):
            classifier(config).save_pretrained(folder / one)
        _keep_stitch(folder, middle(small, large))
        yield folder


def _keep_stitch(folder: Path, stitch: Stitch) -> None:
    both = [stitch.source_stop, stitch.target_start]
    (folder / "stitch.json").write_text(json.dumps(both))
    StitchedModel.from_anchors(folder / "source", folder / "target", both).save_pretrained(folder / "stitched")
