"""PEFT on stitched models: default targets, regexes per slice, the stitching layers in full, saving, merging."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from stitched_examples import KV_SHAPES, inputs_of, logits_of, loss_of, saved, stitched_classifier, stitched_lm
from tiny_models import FAMILIES, tiny_model, token_ids
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedModel

from klas_hf import StitchedForCausalLM, StitchedModel

JOINTS = ["joints.0", "joints.1"]


def adapted(model: nn.Module) -> set[str]:
    """Names of the modules that have LoRA, as the model without PEFT names them."""
    names = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {name.removeprefix("base_model.model.") for name in names}


def train(model: nn.Module, steps: int = 4) -> list[float]:
    """A few steps on what asks for gradients; the loss of each.

    In eval mode, for what BatchNorm counts in training is in no adapter of PEFT.
    """
    model.eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("families", [("llama", "llama"), ("gpt_neox", "mistral"), ("qwen3", "gemma2")])
def test_default_targets_are_those_of_each_anchor(families: tuple[str, str]) -> None:
    """PEFT's own defaults for the native models of both families, in the blocks that are kept."""
    model = stitched_lm(families=families)
    expected = set()
    for slices, family in zip((("0.layers.0", "0.layers.1"), ("1.layers.0", "2.layers.0")), families, strict=True):
        native = get_peft_model(tiny_model(family), LoraConfig(task_type="CAUSAL_LM"))
        ends = {name.partition(".0.")[2] for name in adapted(native) if ".0." in name}
        assert ends
        expected |= {f"model.slices.{block}.{end}" for block in slices for end in ends}
    assert adapted(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_default_targets_find_the_attention_of_every_family(family: str) -> None:
    found = adapted(get_peft_model(stitched_lm(families=(family, family)), LoraConfig(task_type="CAUSAL_LM")))
    blocks = {".".join(name.split(".")[:5]) for name in found}
    assert blocks == {f"model.slices.{place}" for place in ("0.layers.0", "0.layers.1", "1.layers.0", "2.layers.0")}
    assert {name.split(".")[5] for name in found} <= {"self_attn", "attention"}


@pytest.mark.slow
def test_default_targets_need_no_order_of_imports(tmp_path: Path) -> None:
    """PEFT imported after the model was made; klas_hf itself does not import it."""
    saved(stitched_lm(), tmp_path)
    code = f"""
import sys
from klas_hf import StitchedModel
model = StitchedModel.from_pretrained({str(tmp_path)!r})
assert "peft" not in sys.modules
from peft import LoraConfig, get_peft_model
print(sum("lora_A" in name for name, _ in get_peft_model(model, LoraConfig()).named_parameters()))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["8"]  # query and value of four blocks


@pytest.mark.parametrize(
    ("pattern", "blocks"),
    [
        (r"model\.slices\.0.*q_proj", ["0.layers.0", "0.layers.1"]),
        (r"model.slices.1.*q_proj", ["1.layers.0"]),
        (r".*slices\.[12]\..*q_proj", ["1.layers.0", "2.layers.0"]),
    ],
)
def test_a_regex_adapts_the_slices_it_names(pattern: str, blocks: list[str]) -> None:
    model = get_peft_model(stitched_lm(), LoraConfig(target_modules=pattern))
    assert adapted(model) == {f"model.slices.{block}.self_attn.q_proj" for block in blocks}


@pytest.mark.parametrize("kv_shapes", KV_SHAPES)
def test_adapter_and_stitching_layer_learn_and_come_back(kv_shapes: str, tmp_path: Path) -> None:
    base = StitchedModel.from_pretrained(saved(stitched_lm(kv_shapes), tmp_path / "base"))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    plain = logits_of(base)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", modules_to_save=JOINTS))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in learning if ".lora_" not in name} == {
        f"base_model.model.model.{joint}.modules_to_save.default.{end}"
        for joint in JOINTS
        for end in ("weight", "bias")
    }
    losses = train(model)
    assert losses[-1] < losses[0]
    trained = logits_of(model)
    assert (trained - plain).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(logits_of(model), plain)

    model.save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(auto.get_base_model(), StitchedForCausalLM)
    assert torch.equal(logits_of(auto), trained)
    onto = PeftModel.from_pretrained(StitchedModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits_of(onto), trained)
    for name, tensor in StitchedModel.from_pretrained(tmp_path / "base").state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("kv_shapes", KV_SHAPES)
def test_merged_adapters_give_a_stitched_model(kv_shapes: str, tmp_path: Path) -> None:
    model = get_peft_model(stitched_lm(kv_shapes), LoraConfig(task_type="CAUSAL_LM", modules_to_save=JOINTS))
    train(model)
    adapter = logits_of(model)
    saved_joints = [one.modules_to_save["default"].weight for one in model.get_base_model().model.joints]
    merged = model.merge_and_unload()
    assert type(merged) is StitchedForCausalLM
    assert all(torch.equal(a.weight, b) for a, b in zip(merged.stitching_layers(), saved_joints, strict=True))
    torch.testing.assert_close(logits_of(merged), adapter, rtol=1e-4, atol=1e-4)
    loaded = AutoModelForCausalLM.from_pretrained(saved(merged, tmp_path))
    assert torch.equal(logits_of(loaded), logits_of(merged))


def test_an_adapted_model_generates() -> None:
    """With a cache as without one, and other tokens than before."""
    base = stitched_lm()
    ids, settings = token_ids(2, 5), {"max_new_tokens": 6, "do_sample": False}
    plain = base.generate(ids, **settings)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    cached = model.generate(input_ids=ids, **settings)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **settings))
    assert not torch.equal(cached, plain)


def test_adapters_of_transformers_itself(tmp_path: Path) -> None:
    """`add_adapter` and `load_adapter`, without a PeftModel around the stitched one."""
    model = StitchedModel.from_pretrained(saved(stitched_lm(), tmp_path / "base"))
    plain = logits_of(model)
    model.add_adapter(LoraConfig(init_lora_weights=False))
    trained = logits_of(model)
    assert not torch.equal(trained, plain)
    assert len(adapted(model)) == 8
    model.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").glob("*.safetensors")} == {"adapter_model.safetensors"}
    other = StitchedModel.from_pretrained(tmp_path / "base")
    other.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits_of(other), trained)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), trained)
    other.disable_adapters()
    assert torch.equal(logits_of(other), plain)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_leaves_the_adapters_gradients(reentrant: bool) -> None:
    model = get_peft_model(stitched_lm(), LoraConfig(init_lora_weights=False, modules_to_save=JOINTS)).train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss_of(model).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert len(plain) == 8 * 2 + 2 * 2
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert model.get_base_model().is_gradient_checkpointing
    for name, gradient in gradients().items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("source", ["vit", "resnet"])
def test_a_classifier_takes_lora(source: str, tmp_path: Path) -> None:
    """On tokens and on maps; here the user names the modules, as for any vision model in PEFT."""
    base: PreTrainedModel = stitched_classifier(source)
    base = AutoModelForImageClassification.from_pretrained(saved(base, tmp_path / "base"))
    pattern = r"slices\.[01]\..*\.(q_proj|v_proj|convolution)"
    model = get_peft_model(base, LoraConfig(target_modules=pattern, modules_to_save=["joints.0"]))
    assert {name.split(".")[1] for name in adapted(model)} == {"0", "1"}
    losses = train(model)
    assert losses[-1] < losses[0]
    trained = logits_of(model)
    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    assert not torch.equal(logits_of(fresh), trained)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.equal(logits_of(loaded), trained)
    merged = loaded.merge_and_unload()
    assert type(merged) is type(base)
    torch.testing.assert_close(merged(**inputs_of(merged)).logits, trained, rtol=1e-4, atol=1e-4)
