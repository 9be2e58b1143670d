"""The package as a user meets it: public names, lazy imports, README's commands."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import klas_hf

ROOT = Path(__file__).parents[1]


def test_every_public_name_is_there_and_documented() -> None:
    for name in klas_hf.__all__:
        assert getattr(klas_hf, name).__doc__, name
    try:
        klas_hf.no_such_name  # noqa: B018
    except AttributeError as error:
        assert "no_such_name" in str(error)
    else:
        raise AssertionError("an unknown name was found")


def test_the_version_is_that_of_the_installation() -> None:
    assert klas_hf.__version__ == version("klas_hf")


def test_importing_loads_nothing_heavy_and_registers_the_auto_classes() -> None:
    code = (
        "import sys, klas_hf\n"
        "from transformers import AutoConfig\n"
        "assert type(AutoConfig.for_model('stitched')).__name__ == 'StitchedConfig'\n"
        "print(sorted({'matplotlib', 'peft', 'datasets', 'rouge_score'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_readme_opens_with_commands_that_exist() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert "pip install -e . -c constraints.txt && accelerate launch recipes/quickstart.py" in lines
    assert 'pip install -e ".[test]" -c constraints.txt && pytest' in lines
    for word in (ROOT / "README.md").read_text(encoding="utf-8").split():
        if word.startswith("recipes/"):
            assert (ROOT / word.strip("`.,;")).exists(), word
