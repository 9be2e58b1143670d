"""Costs in seconds and bytes: sums by hand, bytes against what tensors take, parts that are slow on purpose."""

import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path as Folder

import pytest
import torch
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import trim_mean
from tiny_models import tiny_config, tiny_model
from tiny_vision import tiny_pair
from torch import nn

from klas_hf import Usage, measure_costs, measure_path_costs
from klas_hf.costs import measured, timing
from klas_hf.costs.measured import PathTimes
from klas_hf.costs.timing import LiveBytes, PartTimes, Timed, time_parts, usual

USAGE = Usage(prompt=7, batch=2)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(timing, "ROUNDS", 4)
    yield


def slow(module: nn.Module, seconds: float) -> None:
    module.register_forward_hook(lambda *_: time.sleep(seconds))


def test_every_part_is_timed_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ROUNDS", 8)
    monkeypatch.setattr(timing, "STEPS", 2)
    model = tiny_model(large=True)
    blocks = list(model.model.layers)
    slow(blocks[1], 0.02)
    slow(model.lm_head, 0.03)
    ids = {"input_ids": torch.ones(2, 7, dtype=torch.long)}
    plain = tiny_model()
    other, found = time_parts([Timed(plain, [], ids), Timed(model, [(block, block) for block in blocks], ids)])
    for seconds in (found.seconds, found.token_seconds):
        assert len(seconds) == 7
        assert seconds[2] >= 0.02 and seconds[6] >= 0.03
        assert max(seconds[:2] + seconds[3:6]) < 0.02
    assert not [module for module in blocks[0].modules() if module._forward_pre_hooks]
    assert len(other.seconds) == 1 and other.seconds[0] < 0.05
    (whole,) = time_parts([Timed(model, [], ids)])
    assert len(whole.seconds) == len(whole.token_seconds) == len(whole.peak_bytes) == 1
    assert whole.seconds[0] >= 0.05
    assert whole.peak_bytes[0] == max(found.peak_bytes)


@given(st.lists(st.lists(st.floats(0, 9), min_size=3, max_size=3), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_parts_add_up_to_the_trimmed_mean_of_the_whole(rounds: list[list[float]]) -> None:
    assert sum(usual(rounds)) == pytest.approx(trim_mean([sum(one) for one in rounds], 0.25))


def test_models_run_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    models, ran = [tiny_model(), tiny_model(large=True)], []
    for model in models:
        model.register_forward_pre_hook(lambda module, _: ran.append(module))
    monkeypatch.setattr(timing, "STEPS", 0)
    time_parts([Timed(model, [], {"input_ids": torch.ones(1, 4, dtype=torch.long)}) for model in models])
    assert ran[: 2 * timing.ROUNDS] == models * timing.ROUNDS


def test_living_tensors_are_counted() -> None:
    kept = torch.ones(100)
    with LiveBytes() as memory:
        double = kept * 2
        view = double.view(10, 10)
        triple = double + kept
        del double
        assert memory.live == 800
        del view
        assert memory.live == 400
        triple += 1
        assert (memory.live, memory.peak) == (400, 800)


def times(*parts: PartTimes, images: bool) -> PathTimes:
    ends = {(one, other, 7): (0.5, 0.25) for one in (16, 48) for other in (16, 48)}
    return PathTimes(USAGE, 4, parts, ends, images)


@pytest.mark.parametrize("images", [False, True])
def test_a_path_takes_the_sum_of_its_parts(images: bool) -> None:
    """Every slice of a language model makes masks and positions; images are embedded once."""
    small = PartTimes([1, 10, 20, 30, 2], [3, 1, 2, 3, 4], [5, 6, 9000, 7, 8])
    large = PartTimes([100, 1000, 2000, 3000, 4000, 5000, 200], [30, 5, 6, 7, 8, 9, 40], [50, 60, 70, 80, 90, 95, 99])
    costs = measure_path_costs([tiny_config("llama"), tiny_config("llama", large=True)], tokens=7)
    costs = replace(costs, times=times(small, large, images=images))
    cost = costs.of("0[:1] 1[1:3] 1[4:]")
    again = 0 if images else 2 * 100
    assert cost.seconds == 1 + 10 + again + 2000 + 3000 + 5000 + 200 + 2 * 0.5
    tokens = 3 + 1 + 2 * 30 + 6 + 7 + 9 + 40 + 2 * 0.25
    assert cost.token_seconds == (None if images else tokens)
    assert cost.latency == (cost.seconds if images else tokens)
    assert cost.per_second == pytest.approx(2 / cost.latency)
    assert cost.peak_bytes == 2 * 4 * 7 * (48 + 48)  # what goes into the second stitching layer and comes out of it
    assert costs.of("0[:2] 1[4:]").peak_bytes == 9000
    assert costs.of("1[:1] 1[4:]", identity=True).peak_bytes == 99
    plain = replace(cost, weight_bytes=0, seconds=None, token_seconds=None, peak_bytes=None, batch=1)
    assert plain == replace(costs, times=None).of("0[:1] 1[1:3] 1[4:]")


def test_weights_may_be_quantised() -> None:
    """Those of the blocks' linear layers; embedding, norms, stitching layers and head stay in the dtype."""
    anchors = [tiny_config("llama"), tiny_config("llama", large=True, tie_word_embeddings=False)]
    path, usage = "0[:2] 1[4:]", Usage(prompt=7, weight_bits=4.5)
    cost = measure_path_costs(anchors, usage=usage).of(path)
    inside = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24) + (2 * 48 * 64 + 2 * 48 * 32 + 3 * 48 * 40)
    assert cost.weight_bytes == 4 * (cost.parameters - inside) + inside * 4.5 / 8
    assert measure_path_costs(anchors, usage=USAGE).of(path).weight_bytes == 4 * cost.parameters
    whole = measure_costs(anchors[1], usage=usage)
    assert whole.weight_bytes == measure_path_costs(anchors, usage=usage).of("1[:]").weight_bytes


@pytest.mark.parametrize("kind", ["vit", "swin", "resnet"])
def test_image_classifiers_are_measured(kind: str) -> None:
    anchors = [model.float() for model in tiny_pair(kind)]
    costs = measure_path_costs(anchors, usage=Usage(batch=2))
    assert costs.times is not None
    assert [len(part.seconds) for part in costs.times.parts] == [len(one.block_macs) + 2 for one in costs.anchors]
    cost, whole = costs.of("1[:]"), measure_costs(anchors[1], usage=Usage(batch=2))
    assert cost.seconds is not None and cost.seconds > 0 and cost.token_seconds is None
    assert (cost.weight_bytes, cost.peak_bytes, cost.batch) == (whole.weight_bytes, whole.peak_bytes, 2)


def test_anchors_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config, made = tiny_config("llama"), []
    random = measured._random
    monkeypatch.setattr(measured, "_random", lambda *args: made.append(args) or random(*args))
    first = measure_path_costs([config], usage=USAGE).of("0[:]")
    assert measure_path_costs([config], usage=replace(USAGE, weight_bits=4)).of("0[:]").seconds == first.seconds
    assert len(made) == 1
    measure_path_costs([config], usage=replace(USAGE, prompt=8))
    measure_path_costs([tiny_config("llama", intermediate_size=25)], usage=USAGE)
    monkeypatch.setattr(measured, "library_versions", lambda: {"torch": "another"})
    measure_path_costs([config], usage=USAGE)
    assert len(made) == 4


def test_usages_that_cannot_be_are_refused() -> None:
    for wrong in ({"prompt": 0}, {"batch": 0}, {"weight_bits": 0.0}, {"weight_bits": 33}):
        with pytest.raises(ValueError, match=f"got {next(iter(wrong))}=.*expected"):
            Usage(**wrong)
    for device in ("meta", "nonsense", "ipu:1"):
        with pytest.raises(ValueError, match=f"got device='{device[:3]}.* not here or has no clock; expected cpu"):
            Usage(device=device)
    assert Usage(device="cpu:0").on.type == "cpu"


def test_a_prompt_fits_what_every_anchor_reads() -> None:
    shorter, longer = tiny_config("llama", max_position_embeddings=9), tiny_config("llama", large=True)
    usage = Usage(prompt=8)
    assert measure_path_costs([shorter, longer], usage=usage).of("0[:]").token_seconds > 0
    with pytest.raises(ValueError, match="got a usage with prompt=9 for a .*Config that reads up to 9 tokens"):
        measure_path_costs([shorter, longer], usage=replace(usage, prompt=9))
    with pytest.raises(ValueError, match="that reads up to 128 tokens; expected fewer"):
        measure_costs(longer, usage=replace(usage, prompt=128))


PAGED = """
import resource
import torch
from klas_hf.costs.timing import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        held = [torch.ones(2**20) for _ in range(12)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_freed_memory_is_used_again() -> None:
    """48 MiB, made and freed 20 times, are paged in every time at first: pages of 4 KiB, or of 64."""
    done = subprocess.run([sys.executable, "-c", PAGED], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = map(int, done.stdout.split())
    assert before > 20 * 48 * 2**20 // 2**16 > 20 * after
