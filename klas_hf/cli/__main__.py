"""`python -m klas_hf.cli`, which `accelerate launch -m` runs too."""

import sys

from klas_hf.cli import main

if __name__ == "__main__":
    sys.exit(main())
