"""torch.compile without graph breaks, activation checkpointing and bfloat16, on text and on images."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from quick_cases import quick
from stitched_examples import KV_SHAPES, inputs_of, logits_of, loss_of, stitched_classifier, stitched_lm
from tiny_models import left_padded, token_ids
from tiny_vision import KINDS, images, tiny_pair, tiny_stitched
from torch import Tensor, nn
from transformers import CompileConfig, PreTrainedModel, StaticCache

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "equal KV shapes": lambda: stitched_lm("equal"),
    "unequal KV shapes": lambda: stitched_lm("unequal"),
    "gemma2 to llama": lambda: stitched_lm(families=("gemma2", "llama")),
    "vit": stitched_classifier,
    "resnet to swin": lambda: stitched_classifier("resnet", "swin"),
}


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def gradients(model: PreTrainedModel, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    run().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kind", quick([one for one in MODELS if one != "resnet to swin"], ["unequal KV shapes"]))
def test_forward_and_backward_compile_in_one_graph(kind: str) -> None:
    """AOTAutograd traces both passes; `fullgraph` raises at a break."""
    model = MODELS[kind]().train()
    expected = gradients(model, lambda: loss_of(model))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = inputs_of(model)
    labels = inputs["input_ids"] if "input_ids" in inputs else torch.tensor([1, 3])
    with torch.no_grad():
        plain = model(**inputs).logits
    got = compiled(**inputs, labels=labels)
    torch.testing.assert_close(got.logits, plain, rtol=1e-4, atol=1e-4)
    model.zero_grad()
    got.loss.backward()
    assert expected.keys() == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", quick(MODELS, ["unequal KV shapes", "resnet to swin"]))
def test_dynamo_finds_no_break(kind: str) -> None:
    model = MODELS[kind]()
    found = torch._dynamo.explain(model)(**inputs_of(model))
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@pytest.mark.parametrize("kind", quick(KINDS, [list(KINDS)[8], list(KINDS)[10]]))
def test_a_classifier_compiles_where_its_anchors_do(kind: str) -> None:
    """As one graph for every kind, as natively."""
    source, target = tiny_pair(kind)
    pixels = images(kind)
    with torch.no_grad():
        for anchor in (source, target):
            torch.compile(anchor, fullgraph=True, backend="eager")(pixels)
        model = tiny_stitched(source, target, (1, 1))
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(pixels).logits, model(pixels).logits)


@pytest.mark.parametrize("kv_shapes", KV_SHAPES)
def test_decoding_with_a_static_cache_compiles_once(kv_shapes: str) -> None:
    """One graph for every step: tokens are those of the plain model, and nothing is compiled anew."""
    model, ids = stitched_lm(kv_shapes), token_ids(2, 4)
    expected = model.generate(ids, max_new_tokens=7, min_new_tokens=7, do_sample=False)
    graphs: list[int] = []

    def counting(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(1)
        return graph.forward

    cache = StaticCache(config=model.config, max_cache_len=16)
    decode = torch.compile(model, fullgraph=True, backend=counting)
    with torch.no_grad():
        logits = model(ids, past_key_values=cache).logits
        tokens = [logits[:, -1:].argmax(-1)]
        for position in range(4, 10):
            step = {"position_ids": torch.tensor([[position]]), "past_key_values": cache}
            tokens.append(decode(tokens[-1], **step).logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat([ids, *tokens], dim=1), expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("kv_shapes", quick(KV_SHAPES, ["unequal"]))
def test_generate_compiles_the_decoding(kv_shapes: str) -> None:
    model = stitched_lm(kv_shapes)
    inputs = left_padded(token_ids(2, 6), [6, 4])
    plain = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, **plain)
    settings = CompileConfig(fullgraph=True, backend="eager", mode=None)
    settings._compile_all_devices = True  # transformers leaves a CPU's decoding as it is otherwise
    torch._dynamo.utils.counters.clear()
    got = model.generate(**inputs, **plain, cache_implementation="static", compile_config=settings)
    assert torch.equal(got, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unequal KV shapes", "vit"])
def test_inductor_gives_the_same(kind: str) -> None:
    model = MODELS[kind]()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs_of(model)).logits, logits_of(model), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["equal KV shapes", "unequal KV shapes", "vit"])
def test_checkpointing_leaves_gradients_as_they_are(kind: str, reentrant: bool, autocast: bool) -> None:
    model = MODELS[kind]().train()
    blocks = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    runs: list[nn.Module] = []
    for block in blocks:
        next(block.children()).register_forward_pre_hook(lambda module, args: runs.append(module))

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return loss_of(model)

    plain = gradients(model, run)
    assert len(runs) == len(blocks) > 2
    assert set(plain) == {name for name, _ in model.named_parameters()} - unused(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    again = gradients(model, run)
    assert len(runs) == 3 * len(blocks)
    assert again.keys() == plain.keys()
    for name, gradient in again.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-6)


def unused(model: PreTrainedModel) -> set[str]:
    """What a classifier's tiny anchors hold and no forward uses (a ViT's mask token)."""
    return {name for name, _ in model.named_parameters() if name.endswith("mask_token")}


@pytest.mark.parametrize("kind", MODELS)
def test_bfloat16_is_left_nowhere(kind: str) -> None:
    """Every module of a model in bfloat16 puts out bfloat16, forward and backward."""
    model = MODELS[kind]().to(torch.bfloat16)
    found: dict[str, set[torch.dtype]] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensors = [one for one in (output if isinstance(output, tuple) else (output,)) if isinstance(one, Tensor)]
            found[name] = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(look(name))
    inputs = {name: t.bfloat16() if t.is_floating_point() else t for name, t in inputs_of(model).items()}
    labels = inputs["input_ids"] if "input_ids" in inputs else torch.tensor([1, 3])
    output = model(**inputs, labels=labels)
    assert output.logits.dtype == torch.bfloat16
    assert len([name for name, dtypes in found.items() if dtypes]) > 20
    assert {name: dtypes for name, dtypes in found.items() if dtypes - {torch.bfloat16}} == {}
    output.loss.backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.bfloat16}


@pytest.mark.parametrize("kind", MODELS)
def test_autocast_follows_float32(kind: str) -> None:
    """Weights and gradients stay in float32, matrix products are in bfloat16."""
    model = MODELS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 0.3  # larger ones make a tiny model answer a rounding error with another output
    expected = gradients(model, lambda: loss_of(model))

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            assert model(**inputs_of(model)).logits.dtype == torch.bfloat16
            return loss_of(model)

    got = gradients(model, run)
    assert {gradient.dtype for gradient in got.values()} == {torch.float32}
    norms = [torch.cat([gradient.flatten() for gradient in one.values()]) for one in (got, expected)]
    assert 0 < (norms[0] - norms[1]).norm() < 0.1 * norms[1].norm()
