"""What the tests of bad images share."""

from typing import Any

import pytest

from klas_hf import StitchedForImageClassification


@pytest.fixture
def no_vision_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the model was loaded before the input was checked")

    monkeypatch.setattr(StitchedForImageClassification, "from_pretrained", fail)
