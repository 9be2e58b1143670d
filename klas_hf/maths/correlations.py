"""How well one series foretells another: Pearson's and Spearman's correlation, as scipy computes them."""

import warnings
from collections.abc import Sequence

from numpy.typing import NDArray

Series = Sequence[float] | NDArray


def pearson(x: Series, y: Series) -> float:
    """Linear correlation of two series of equal length, -1 to 1; nan where one of them is constant."""
    return _statistic("pearsonr", x, y)


def spearman(x: Series, y: Series) -> float:
    """Rank correlation of two series, ties sharing their mean rank; nan where one of them is constant."""
    return _statistic("spearmanr", x, y)


def _statistic(name: str, x: Series, y: Series) -> float:
    from scipy import stats  # half a second, which `import klas_hf` need not take

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return float(getattr(stats, name)(x, y).statistic)
