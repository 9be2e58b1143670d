"""Export of a stitched model for ExecuTorch, and its run by ExecuTorch's own runtime.

transformers' export keeps a static cache in the program: one call takes one token and its place. Layers with a sliding
window get whole caches there, which is transformers' own limit, and gives the same logits.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import randomise_joints, tiny_model, token_ids
from torch import Tensor
from torch.export import ExportedProgram
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

from klas_hf import StitchedForCausalLM, StitchedModel

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer is random")

LENGTH = 24
Step = Callable[[Tensor, Tensor], Tensor]  # ids (1, 1), place (1,) → logits (1, 1, vocabulary)


def stitched(source: str, target: str) -> StitchedForCausalLM:
    model = StitchedModel.from_anchors(tiny_model(source, seed=1), tiny_model(target, large=True, seed=2), (2, 2))
    randomise_joints(model)
    model.generation_config.cache_implementation = "static"
    return model


def export(model: StitchedForCausalLM) -> ExportedProgram:
    module = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=LENGTH)
    return module.export(input_ids=torch.tensor([[3]]), cache_position=torch.tensor([0]))


def logits_by_steps(step: Step, ids: Tensor) -> Tensor:
    return torch.cat([step(ids[:, n : n + 1], torch.tensor([n])).clone() for n in range(ids.shape[1])], dim=1)


def greedy_by_steps(step: Step, ids: Tensor, tokens: int) -> Tensor:
    logits = logits_by_steps(step, ids)
    for _ in range(tokens):
        place = torch.tensor([ids.shape[1]])
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        logits = step(ids[:, -1:], place).clone()
    return ids


@torch.no_grad()
def assert_same(step: Step, model: StitchedForCausalLM) -> None:
    """Logits, greedy tokens, and no memory of the prompt before."""
    for seed in (1, 2):
        ids = token_ids(1, 11, seed=seed)
        torch.testing.assert_close(logits_by_steps(step, ids), model(ids).logits, rtol=1e-4, atol=1e-4)
    expected = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=-1)
    assert torch.equal(greedy_by_steps(step, ids, 8), expected)


SLOW_PAIRS = [pytest.param(*pair, marks=pytest.mark.slow) for pair in (("qwen3", "olmo2"), ("gpt_neox", "phi"))]


@pytest.mark.parametrize(("source", "target"), [("mistral", "gemma2"), *SLOW_PAIRS])
def test_the_exported_program_equals_the_model(source: str, target: str) -> None:
    model = stitched(source, target)
    program = export(model).module()
    assert_same(lambda ids, place: program(input_ids=ids, cache_position=place), model)


@pytest.mark.parametrize(
    "lowered",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["portable kernels", "XNNPACK"],
)
@pytest.mark.slow
def test_executorch_runs_the_exported_model(lowered: bool, tmp_path: Path) -> None:
    exir = pytest.importorskip("executorch.exir", reason="the optional executorch")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.runtime import Runtime

    model = stitched("llama", "llama")
    parts = [XnnpackPartitioner()] if lowered else None
    program = exir.to_edge_transform_and_lower(export(model), partitioner=parts).to_executorch()
    (tmp_path / "model.pte").write_bytes(program.buffer)
    assert (b"XnnpackBackend" in program.buffer) == lowered
    method = Runtime.get().load_program(tmp_path / "model.pte").load_method("forward")
    assert_same(lambda ids, place: method.execute([ids, place])[0], model)
