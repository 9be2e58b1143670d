"""Runs a script where `import klas_hf` fails as if it were not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BLOCK = """
import importlib.abc, sys

class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "klas_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
"""


def run(script: str, *args: str, cache: Path, **settings: str) -> Any:
    """What a script prints as JSON in its last line; its modules and downloads lie in `cache`."""
    places = {"HF_HOME": str(cache), "HF_MODULES_CACHE": str(cache / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", BLOCK + script, *args],
        env=os.environ | places | settings,
        cwd=cache,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
