"""Quantised loading: blocks in int8 (torchao) or 4 bits (bitsandbytes), stitching layer and head as they were."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from stitched_examples import PATH, inputs_of, joined, logits_of, loss_of, saved, stitched_classifier, stitched_lm
from tiny_models import tiny_model, token_ids
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
    TorchAoConfig,
)

from klas_hf import StitchedModel

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
torchao = pytest.importorskip("torchao")
bitsandbytes = pytest.importorskip("bitsandbytes")


def int8(**options: Any) -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), **options)


def four_bits(**options: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)


QUANTISERS: dict[str, Callable[..., Any]] = {"torchao int8": int8, "bitsandbytes 4 bits": four_bits}
# What each may do to logits, relative to them; and its arithmetic, which is in bfloat16 on some processors.
ROUNDING = {"torchao int8": 0.05, "bitsandbytes 4 bits": 0.5}
ARITHMETIC = {"torchao int8": 1e-5, "bitsandbytes 4 bits": 0.02}
HEAD_DIM = {"equal": (32, 32), "unequal": (32, 64)}


def wide_anchors(kv_shapes: str = "unequal") -> tuple[PreTrainedModel, PreTrainedModel]:
    """On a CPU, bitsandbytes multiplies by matrices of multiples of 64 only.

    Weights are of such a size as training leaves: with larger ones a tiny model answers a rounding error with quite
    another output.
    """
    source, target = (
        tiny_model(large=large, seed=int(large), hidden_size=width, intermediate_size=width, head_dim=head_dim,
                   num_key_value_heads=1, num_attention_heads=width // 32, tie_word_embeddings=False)
        for large, width, head_dim in zip((False, True), (64, 128), HEAD_DIM[kv_shapes], strict=True)
    )  # fmt: skip
    with torch.no_grad():
        for parameter in (*source.parameters(), *target.parameters()):
            if parameter.ndim > 1:
                parameter *= 0.2
    return source, target


def wide_lm(kv_shapes: str = "unequal") -> PreTrainedModel:
    return joined(wide_anchors(kv_shapes))


def dequantised(weight: Tensor) -> Tensor | None:
    """By the quantiser's own function; None for an ordinary weight."""
    if isinstance(weight, bitsandbytes.nn.Params4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    return weight.dequantize() if type(weight.data) is not Tensor else None


def quantised_layers(model: nn.Module) -> set[str]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name for name, layer in layers.items() if dequantised(layer.weight) is not None}


def linear_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def rounded(model: PreTrainedModel, quantised: PreTrainedModel) -> PreTrainedModel:
    """The model with the quantised one's weights in its own dtype."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name in quantised_layers(quantised):
            weight = dequantised(quantised.get_submodule(name).weight)
            other.get_submodule(name).weight.copy_(weight)
    return other


def distance(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).norm() / expected.norm())


@pytest.mark.parametrize("quantiser", QUANTISERS)
@pytest.mark.parametrize("kv_shapes", ["equal", "unequal"])
def test_blocks_are_quantised_and_nothing_else(kv_shapes: str, quantiser: str, tmp_path: Path) -> None:
    model = wide_lm(kv_shapes)
    folder = saved(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QUANTISERS[quantiser]())
    assert quantised_layers(loaded) == linear_layers(model) - {"model.joints.0", "model.joints.1", "lm_head"}
    for name in (
        "model.joints.0.weight",
        "model.joints.1.bias",
        "lm_head.weight",
        "model.slices.0.embed_tokens.weight",
    ):
        assert torch.equal(loaded.get_parameter(name), model.get_parameter(name)), name
    plain, expected = logits_of(model), logits_of(rounded(model, loaded))
    got = logits_of(loaded)
    assert distance(got, expected) < ARITHMETIC[quantiser]
    assert ARITHMETIC[quantiser] < distance(got, plain) < ROUNDING[quantiser]


@pytest.mark.filterwarnings("ignore:the stitching layer is random")
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_anchors_are_quantised_on_the_fly(quantiser: str, on_disk: bool, tmp_path: Path) -> None:
    """To the weights that quantising the stitched checkpoint gives."""
    folder = saved(wide_lm(), tmp_path / "whole")
    expected = StitchedModel.from_pretrained(folder, quantization_config=QUANTISERS[quantiser]())
    anchors = [saved(one, tmp_path / str(number)) if on_disk else one for number, one in enumerate(wide_anchors())]
    model = StitchedModel.from_path(anchors, PATH, quantization_config=QUANTISERS[quantiser]())
    assert (
        quantised_layers(model)
        == quantised_layers(expected)
        == linear_layers(model) - {"model.joints.0", "model.joints.1", "lm_head"}
    )
    assert model.stitching_layers()[0].weight.dtype == torch.float32
    for name, parameter in model.named_parameters():
        if not name.startswith("model.joints."):
            whole, other = dequantised(parameter), dequantised(expected.get_parameter(name))
            pair = (parameter, expected.get_parameter(name)) if whole is None or other is None else (whole, other)
            assert torch.equal(*pair), name


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_calibration_fits_the_layer_to_quantised_blocks(quantiser: str) -> None:
    """Nearly as well as to whole ones."""
    batches = [token_ids(16, 16, seed=seed) for seed in range(4)]
    settings = {"quantization_config": QUANTISERS[quantiser]()}
    whole, model = (
        StitchedModel.from_anchors(*wide_anchors(), (2, 3), calibration=batches, **options)
        for options in ({}, settings)
    )
    fits = [one.config.joint_fits[0]["r2"] for one in (whole, model)]
    assert fits[1] == pytest.approx(fits[0], abs=0.05)
    assert distance(model.stitching_layers()[0].weight, whole.stitching_layers()[0].weight) < 0.5
    assert 0 < distance(logits_of(model), logits_of(whole)) < ROUNDING[quantiser]


@pytest.mark.parametrize(
    ("quantiser", "option"), [(int8, "modules_to_not_convert"), (four_bits, "llm_int8_skip_modules")]
)
def test_the_stitching_layer_stays_whatever_else_the_user_names(
    quantiser: Callable[..., Any], option: str, tmp_path: Path
) -> None:
    model = stitched_lm()
    settings = quantiser(**{option: ["lm_head", "model.slices.0"]})
    loaded = StitchedModel.from_pretrained(saved(model, tmp_path), quantization_config=settings)
    assert quantised_layers(loaded) == {
        name for name in linear_layers(model) if name.startswith(("model.slices.1.", "model.slices.2."))
    }


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_a_quantised_model_is_saved_and_loaded(quantiser: str, tmp_path: Path) -> None:
    folder = saved(wide_lm(), tmp_path / "whole")
    model = StitchedModel.from_pretrained(folder, quantization_config=QUANTISERS[quantiser]())
    loaded = StitchedModel.from_pretrained(saved(model, tmp_path / "quantised"))
    assert quantised_layers(loaded) == quantised_layers(model)
    assert torch.equal(loaded.stitching_layers()[0].weight, model.stitching_layers()[0].weight)
    assert torch.equal(logits_of(loaded), logits_of(model))
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(loaded.generate(token_ids(2, 5), **settings), model.generate(token_ids(2, 5), **settings))


@pytest.mark.parametrize(
    ("target", "quantiser"),
    # torchao wants an embedding of every model, and transformers finds none in a LeViT.
    [*((target, quantiser) for target in ("vit", "swin", "deit_teacher") for quantiser in QUANTISERS),
     ("levit", "bitsandbytes 4 bits")],
)  # fmt: skip
def test_a_classifier_keeps_stitch_and_heads(target: str, quantiser: str, tmp_path: Path) -> None:
    """transformers itself finds no head of a classifier whose head has a bias."""
    wide = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2} if target == "vit" else {}
    model = stitched_classifier("deit" if target == "deit_teacher" else target, target, **wide)
    kept = {"joints.0.projection"}
    kept |= {name for name in linear_layers(model) if name.startswith("slices.1.") and "classifier" in name}
    assert len(kept) == (3 if target == "deit_teacher" else 2)
    loaded = AutoModelForImageClassification.from_pretrained(
        saved(model, tmp_path), quantization_config=QUANTISERS[quantiser]()
    )
    assert quantised_layers(loaded) == linear_layers(model) - kept
    if target == "vit":
        expected = logits_of(rounded(model, loaded))
        assert distance(logits_of(loaded), expected) < ARITHMETIC[quantiser]


@pytest.mark.parametrize("kind", [stitched_lm, stitched_classifier])
def test_half_precision_is_that_of_the_whole_model(kind: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    """What is kept from quantisers is not kept in float32."""
    folder = saved(kind(), tmp_path)
    for dtype in (torch.float16, torch.bfloat16):
        model = StitchedModel.from_pretrained(folder, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs_of(model).items()}
        assert model(**inputs).logits.dtype == dtype


def test_adapters_learn_on_four_bits(tmp_path: Path) -> None:
    folder = saved(stitched_lm(), tmp_path)
    model = StitchedModel.from_pretrained(folder, quantization_config=four_bits(), dtype=torch.bfloat16)
    model = prepare_model_for_kbit_training(model)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", modules_to_save=["joints.0", "joints.1"]))
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(learning) == 8 * 2 + 2 * 2
    frozen = {name: p.data.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer, losses = torch.optim.AdamW(learning, lr=0.02), []
    for _ in range(6):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for name, tensor in frozen.items():
        assert torch.equal(model.get_parameter(name).data, tensor), name
