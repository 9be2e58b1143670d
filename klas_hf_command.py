"""Entry point of `klas-hf`. While it is loaded, `import klas_hf` leaves transformers and torch out.

Registering stitched models with the Auto classes takes seconds; help, errors and commands without a model need none.
"""

import sys


def main() -> None:
    """Run the command line's words, and exit with the command's code."""
    from klas_hf.cli import main as run

    sys.exit(run())


if __name__ == "__main__":
    sys.modules["klas_hf_command"] = sys.modules["__main__"]
    main()
