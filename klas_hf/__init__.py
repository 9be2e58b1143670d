"""klas_hf: stitched models for the Hugging Face ecosystem, chosen by KL divergence between probes (KLAS, ICLR 2026).

    anchors ─► probes ─► scores ─► selection ─► stitching ─► training ─► curve

Public names load on first use, so `import klas_hf` costs little more than `import transformers`; importing it
registers stitched models with the Auto classes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from klas_hf.models import StitchedConfig, StitchedForCausalLM, StitchedModel

if TYPE_CHECKING:
    from klas_hf.costs import Cost, measure_costs, measure_stitch_costs
    from klas_hf.curves import TradeoffCurve, common_interval, correlation_report, plot_curves
    from klas_hf.evaluation import Measurement, evaluate_anchor, evaluate_loss, evaluate_stitches, generate_greedily
    from klas_hf.probes import ProbeConfig, ProbeNet
    from klas_hf.rows import ResultRow, RowFile, format_table
    from klas_hf.scores import StitchScores
    from klas_hf.scoring import score_stitches
    from klas_hf.selection import (
        StitchSelection,
        esta_stitches,
        match_stitches,
        min_kl_stitches,
        random_stitches,
        select_stitches,
    )
    from klas_hf.stitches import Stitch, StitchCosts
    from klas_hf.training import TrainingConfig, TrainingDiverged, TrainingResult, train_probes, train_stitches

_PLACES = {
    "klas_hf.costs": ("Cost", "measure_costs", "measure_stitch_costs"),
    "klas_hf.curves": ("TradeoffCurve", "common_interval", "correlation_report", "plot_curves"),
    "klas_hf.evaluation": ("Measurement", "evaluate_anchor", "evaluate_loss", "evaluate_stitches", "generate_greedily"),
    "klas_hf.probes": ("ProbeConfig", "ProbeNet"),
    "klas_hf.rows": ("ResultRow", "RowFile", "format_table"),
    "klas_hf.scores": ("StitchScores",),
    "klas_hf.scoring": ("score_stitches",),
    "klas_hf.selection": (
        "StitchSelection",
        "esta_stitches",
        "match_stitches",
        "min_kl_stitches",
        "random_stitches",
        "select_stitches",
    ),
    "klas_hf.stitches": ("Stitch", "StitchCosts"),
    "klas_hf.training": ("TrainingConfig", "TrainingDiverged", "TrainingResult", "train_probes", "train_stitches"),
}
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}

__all__ = ["StitchedConfig", "StitchedForCausalLM", "StitchedModel", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'klas_hf' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
