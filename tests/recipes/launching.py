"""A recipe run as a script in this process: to import torch in another takes longer than most of them."""

import runpy
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


def launch(recipe: str, *options: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [recipe, *options])
        runpy.run_path(str(RECIPES / recipe), run_name="__main__")
