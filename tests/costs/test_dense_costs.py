"""Costs of dense models: paths', counted in one forward of each anchor, against those of the stitched models."""

import pytest
import torch
from tiny_dense import tiny_dense, tiny_dense_pair
from torch.utils.flop_counter import FlopCounterMode

from klas_hf import Stitch, StitchedModel, measure_costs, measure_path_costs, measure_stitch_costs

PATHS = ["0[:4] 1[5:]", "1[:1] 0[1:3] 1[3:]"]


@pytest.mark.filterwarnings("ignore:the stitching layer is random")
@pytest.mark.parametrize(
    ("head", "kinds"),
    [
        ("upernet", ("resnet", "swin")),
        pytest.param("mask2former", ("swin", "swin"), marks=pytest.mark.slow),
        pytest.param("upernet", ("convnext", "resnet"), marks=pytest.mark.slow),
    ],
)
def test_paths_cost_what_their_models_do(head: str, kinds: tuple[str, str]) -> None:
    anchors = tiny_dense_pair(head, *kinds)
    costs = measure_path_costs(anchors, image_size=64)
    for path in PATHS:
        model = StitchedModel.from_path(anchors, path, image_size=64)
        counted = measure_costs(model, image_size=64)
        assert costs.of(path) == counted
        assert counted.parameters == model.num_parameters()
    whole = measure_costs(StitchedModel.from_path(anchors, "1[:]", image_size=64), image_size=64)
    assert costs.of("1[:]") == whole
    pairs = measure_stitch_costs(*anchors, image_size=64)
    assert pairs.of(Stitch(4, 5)) == (costs.of("0[:4] 1[5:]").macs, costs.of("0[:4] 1[5:]").parameters)
    assert pairs.possible[1, 3]
    assert not pairs.possible[1, 5]


def test_macs_are_those_of_a_forward() -> None:
    model = tiny_dense("mask2former")
    model.set_attn_implementation("eager")  # torch does not count the CPU's own kernel
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(1, 3, 64, 96))
    cost = measure_costs(model, image_size=(64, 96))
    assert (cost.macs, cost.image_height, cost.image_width) == (counter.get_total_flops() // 2, 64, 96)


def test_anchors_of_other_kinds_are_refused() -> None:
    from tiny_vision import tiny_classifier

    dense, classifier = tiny_dense("upernet"), tiny_classifier("swin")
    with pytest.raises(ValueError, match="a dense model and an image classifier"):
        measure_stitch_costs(dense, classifier)
    with pytest.raises(ValueError, match="a dense model and an image classifier"):
        measure_path_costs([dense, classifier])
