"""klas_hf: stitched models for the Hugging Face ecosystem, chosen by KL divergence between probes (KLAS, ICLR 2026).

    anchors ─► probes ─► scores ─► selection ─► stitching ─► training ─► curve

Public names load on first use, so `import klas_hf` costs little more than `import transformers`; importing it
registers stitched models with the Auto classes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from klas_hf.models import (
    StitchedBackbone,
    StitchedConfig,
    StitchedForCausalLM,
    StitchedForImageClassification,
    StitchedModel,
    StitchedVisionConfig,
)

if TYPE_CHECKING:
    from klas_hf.anchor_selection import AnchorSelection
    from klas_hf.cli.examination import examine_anchors
    from klas_hf.cli.findings import Examination, Finding
    from klas_hf.costs import Cost, measure_costs, measure_stitch_costs
    from klas_hf.curves import TradeoffCurve, common_interval, correlation_report, plot_curves
    from klas_hf.evaluation import (
        Measurement,
        evaluate_accuracy,
        evaluate_anchor,
        evaluate_loss,
        evaluate_stitches,
        evaluate_supernet,
        generate_greedily,
    )
    from klas_hf.hub import model_card, publish
    from klas_hf.hub.delta import merge_delta, save_delta
    from klas_hf.probes import ImageProbeConfig, ImageProbeNet, ProbeConfig, ProbeNet
    from klas_hf.rows import ResultRow, RowFile, format_table
    from klas_hf.scores import StitchScores
    from klas_hf.scoring import FunctionalScoring, ImageScoring, score_stitches, select_anchors
    from klas_hf.selection import (
        StitchSelection,
        best_stitches,
        esta_stitches,
        match_stitches,
        merge_selections,
        min_kl_stitches,
        random_stitches,
        select_stitches,
        shortlist_stitches,
    )
    from klas_hf.snnet import snnet_groups, snnet_stitches
    from klas_hf.stitches import Stitch, StitchCosts
    from klas_hf.supernet import (
        StitchedSupernet,
        StitchedSupernetConfig,
        StitchedSupernetForCausalLM,
        StitchedSupernetForImageClassification,
    )
    from klas_hf.training import (
        ImageTrainingConfig,
        TrainingConfig,
        TrainingDiverged,
        TrainingResult,
        recalibrate_batch_norm,
        train_probes,
        train_stitches,
    )

_PLACES = {
    "klas_hf.anchor_selection": ("AnchorSelection",),
    "klas_hf.cli.examination": ("examine_anchors",),
    "klas_hf.cli.findings": ("Examination", "Finding"),
    "klas_hf.costs": ("Cost", "measure_costs", "measure_stitch_costs"),
    "klas_hf.curves": ("TradeoffCurve", "common_interval", "correlation_report", "plot_curves"),
    "klas_hf.evaluation": (
        "Measurement",
        "evaluate_accuracy",
        "evaluate_anchor",
        "evaluate_loss",
        "evaluate_stitches",
        "evaluate_supernet",
        "generate_greedily",
    ),
    "klas_hf.hub": ("model_card", "publish"),
    "klas_hf.hub.delta": ("merge_delta", "save_delta"),
    "klas_hf.probes": ("ImageProbeConfig", "ImageProbeNet", "ProbeConfig", "ProbeNet"),
    "klas_hf.rows": ("ResultRow", "RowFile", "format_table"),
    "klas_hf.scores": ("StitchScores",),
    "klas_hf.scoring": ("FunctionalScoring", "ImageScoring", "score_stitches", "select_anchors"),
    "klas_hf.selection": (
        "StitchSelection",
        "best_stitches",
        "esta_stitches",
        "match_stitches",
        "merge_selections",
        "min_kl_stitches",
        "random_stitches",
        "select_stitches",
        "shortlist_stitches",
    ),
    "klas_hf.snnet": ("snnet_groups", "snnet_stitches"),
    "klas_hf.stitches": ("Stitch", "StitchCosts"),
    "klas_hf.supernet": (
        "StitchedSupernet",
        "StitchedSupernetConfig",
        "StitchedSupernetForCausalLM",
        "StitchedSupernetForImageClassification",
    ),
    "klas_hf.training": (
        "ImageTrainingConfig",
        "TrainingConfig",
        "TrainingDiverged",
        "TrainingResult",
        "recalibrate_batch_norm",
        "train_probes",
        "train_stitches",
    ),
}
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [
    "StitchedBackbone",
    "StitchedConfig",
    "StitchedForCausalLM",
    "StitchedForImageClassification",
    "StitchedModel",
    "StitchedVisionConfig",
    *sorted(_MODULE_OF),
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'klas_hf' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
