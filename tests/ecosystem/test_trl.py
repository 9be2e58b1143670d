"""TRL's SFTTrainer on stitched models, with a real tokenizer, a chat template and a conversational dataset."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from stitched_examples import KV_SHAPES, StopAt, saved, stitched_lm
from tiny_models import VOCABULARY
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from klas_hf import StitchedForCausalLM, StitchedModel

trl = pytest.importorskip("trl")
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<a>' }}{% generation %}{{ message['content'] + '<end>' }}{% endgeneration %}"
    "{% else %}{{ '<u>' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)
ANIMALS = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen"]


def conversations() -> Dataset:
    """A question and its answer: the animal, backwards."""
    asked = [f"{one} {other}" for one in ANIMALS for other in ANIMALS]
    return Dataset.from_dict(
        {
            "messages": [
                [{"role": "user", "content": question}, {"role": "assistant", "content": question[::-1]}]
                for question in asked
            ]
        }
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs learnt from the conversations, with as many entries as the tiny models have."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<end>", "<u>", "<a>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    words.train_from_iterator((m["content"] for c in conversations()["messages"] for m in c), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<end>", chat_template=TEMPLATE
    )


def sft(model: Any, folder: Path, callbacks: Any = None, peft_config: LoraConfig | None = None, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "report_to": [], "max_steps": 6, "save_steps": 3,
        "logging_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "disable_tqdm": True,
        "max_length": 32, "bf16": False, "gradient_checkpointing": False, "assistant_only_loss": True,
    }  # fmt: skip
    return trl.SFTTrainer(
        model, trl.SFTConfig(**settings | options), train_dataset=conversations(), processing_class=tokenizer(),
        callbacks=callbacks, peft_config=peft_config,
    )  # fmt: skip


def lora() -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", modules_to_save=["joints.0", "joints.1"])


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("kv_shapes", KV_SHAPES)
def test_a_stitched_model_learns_to_answer(kv_shapes: str, adapter: bool, tmp_path: Path) -> None:
    folder = saved(stitched_lm(kv_shapes), tmp_path / "base")
    tokenizer().save_pretrained(folder)
    model = StitchedModel.from_pretrained(folder)
    run = sft(
        model, tmp_path / "run", max_steps=40, save_strategy="no", peft_config=lora() if adapter else None,
        learning_rate=2e-2 if adapter else 5e-3,
    )  # fmt: skip
    run.train()
    assert losses(run)[-1] < 0.7 * losses(run)[0]
    run.save_model(str(tmp_path / "end"))
    if adapter:
        learnt = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
        assert sum("lora_" in name for name in learnt) == 16 and sum("joints" in name for name in learnt) == 4
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "end")
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "end")
        assert isinstance(loaded, StitchedForCausalLM)
    words = AutoTokenizer.from_pretrained(tmp_path / "end")
    asked = [{"role": "user", "content": "cat dog"}]
    prompt = words.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**prompt).logits, run.model.eval()(**prompt).logits)
    answers = [one.generate(**prompt, max_new_tokens=8, do_sample=False) for one in (loaded, run.model)]
    assert torch.equal(*answers) and answers[0].shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.parametrize("adapter", [False, True])
def test_a_resumed_run_ends_as_an_unbroken_one(adapter: bool, tmp_path: Path) -> None:
    folder = saved(stitched_lm(), tmp_path / "base")

    def run(name: str, callbacks: Any = None) -> Any:
        torch.manual_seed(0)  # LoRA's start
        return sft(
            StitchedModel.from_pretrained(folder), tmp_path / name, callbacks, peft_config=lora() if adapter else None
        )

    whole, broken, resumed = run("whole"), run("broken", [StopAt(3)]), run("broken")
    whole.train()
    broken.train()
    checkpoint = tmp_path / "broken" / "checkpoint-3"
    assert (checkpoint / ("adapter_model.safetensors" if adapter else "model.safetensors")).exists()
    resumed.train(resume_from_checkpoint=str(checkpoint))
    ours, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert any(not torch.equal(tensor, broken.model.state_dict()[name]) for name, tensor in ours.items())
    assert losses(resumed) == losses(whole)


def test_packed_conversations_do_not_see_each_other(tmp_path: Path) -> None:
    """Both sides part a row where its positions begin anew."""
    model = stitched_lm()
    run = sft(
        model, tmp_path, packing=True, max_length=64, per_device_train_batch_size=1, save_strategy="no", max_steps=20
    )
    batch = next(iter(run.get_train_dataloader()))
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
    assert len(starts) > 3
    model.eval()
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        for start, stop in zip(starts, starts[1:], strict=False):
            alone = model(input_ids=batch["input_ids"][:, start:stop]).logits
            torch.testing.assert_close(packed[:, start:stop], alone, rtol=1e-4, atol=1e-4)
    run.train()
    assert sum(losses(run)[-5:]) < 0.9 * sum(losses(run)[:5])
