"""The large anchor quantised, which the study of every size has beside the paths."""

import pytest
import torch
from experiments.beside import quantised
from tiny_study import family


def test_quantised_weights_have_few_values_near_what_they_were() -> None:
    pytest.importorskip("torchao")
    model, seen = family().anchors[1], []
    layers = {name: one for name, one in model.named_modules() if "proj" in name}

    def look(small: torch.nn.Module) -> float:
        seen.append({name: small.get_submodule(name).weight.dequantize() for name in layers})
        for name, parameter in small.named_parameters():
            assert "proj" in name or torch.equal(parameter, model.get_parameter(name))
        return 0.0

    found = quantised(model, look)
    inside, every = sum(one.weight.numel() for one in layers.values()), model.num_parameters()
    for of_bits, (name, bits) in zip(seen, (("int8", 8), ("int4", 4)), strict=True):
        size = 2 * (every - inside)
        for layer, new in of_bits.items():
            old = layers[layer].weight.detach()
            groups = (old, new) if bits == 8 else (old.reshape(-1, 32), new.reshape(-1, 32))
            step = groups[0].abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 0.5)
            assert ((groups[0] - groups[1]).abs() <= 1.01 * step).all()
            assert (groups[0] - groups[1]).abs().mean() < 0.3 * step.mean()
            assert all(len(row.unique()) <= 2**bits for row in groups[1])
            size += old.numel() * bits // 8 + 2 * len(step)
        assert found[name]["bytes"] == pytest.approx(size / (2 * every))
