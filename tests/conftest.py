"""Every test runs offline, on one thread, from the same seed."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported; set it to 0 to run the hub tests
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
