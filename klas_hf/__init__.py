"""klas_hf: stitched models for the Hugging Face ecosystem, chosen by KL divergence between probes (KLAS, ICLR 2026).

    anchors ─► probes ─► scores ─► selection ─► stitching ─► training ─► curve

Public names load on first use, so `import klas_hf` costs little more than `import transformers`; importing it
registers stitched models with the Auto classes.
"""

import sys
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from klas_hf.actions import ACTIONS

if TYPE_CHECKING:
    from klas_hf.cli.examination import examine_anchors
    from klas_hf.cli.findings import Examination, Finding
    from klas_hf.costs import Cost, PathCosts, Usage, measure_costs, measure_path_costs, measure_stitch_costs
    from klas_hf.curves.tradeoff import TradeoffCurve, common_interval, correlation_report, plot_curves
    from klas_hf.errors import TrainingDiverged
    from klas_hf.evaluation import (
        Measurement,
        evaluate,
        evaluate_anchor,
        evaluate_stitches,
        evaluate_supernet,
        generate_greedily,
    )
    from klas_hf.hub import model_card, publish
    from klas_hf.hub.delta import merge_delta, save_delta
    from klas_hf.kan import KANConfig, KANForImageClassification, KANForManyTasks, compress_kan, head_bytes
    from klas_hf.models import (
        StitchedBackbone,
        StitchedConfig,
        StitchedForCausalLM,
        StitchedForImageClassification,
        StitchedModel,
        StitchedVisionConfig,
    )
    from klas_hf.models.configuration_supernet import StitchedSupernetConfig
    from klas_hf.paths import Path, Slice, Stitch
    from klas_hf.probes import ImageProbeConfig, ImageProbeNet, ProbeConfig, ProbeNet
    from klas_hf.probes.training import train_probes
    from klas_hf.rows import ResultRow, RowFile
    from klas_hf.scores.compared import ImageScoring
    from klas_hf.scores.driver import score_stitches
    from klas_hf.scores.functional_settings import FunctionalScoring
    from klas_hf.scores.path_scores import PathScores
    from klas_hf.scores.values import StitchScores
    from klas_hf.selection.anchor_distances import select_anchors
    from klas_hf.selection.anchors import AnchorSelection
    from klas_hf.selection.choice import PathSelection, StitchSelection, merge_selections
    from klas_hf.selection.klas import best_stitches, match_stitches, select_stitches, shortlist_stitches
    from klas_hf.selection.plan import SearchConfig
    from klas_hf.selection.pruning import (
        gromov_paths,
        linear_patch_paths,
        replaceme_paths,
        shortgpt_paths,
        tail_paths,
        uniform_paths,
    )
    from klas_hf.selection.rivals import esta_stitches, min_kl_stitches, random_stitches
    from klas_hf.selection.search import search_paths
    from klas_hf.selection.snnet import snnet_groups, snnet_stitches
    from klas_hf.stitch_costs import StitchCosts
    from klas_hf.stitching import (
        StitchedSupernet,
        StitchedSupernetForCausalLM,
        StitchedSupernetForImageClassification,
    )
    from klas_hf.stitching.prefixes import PrefixCache
    from klas_hf.tables import format_table
    from klas_hf.training import (
        Augmentation,
        HealingResult,
        TrainingConfig,
        TrainingResult,
        heal,
        heal_best,
        healing_config,
        recalibrate_batch_norm,
        remember_answers,
        train_stitches,
    )

_PLACES = {
    "klas_hf.cli.examination": ("examine_anchors",),
    "klas_hf.cli.findings": ("Examination", "Finding"),
    "klas_hf.costs": ("Cost", "PathCosts", "Usage", "measure_costs", "measure_path_costs", "measure_stitch_costs"),
    "klas_hf.curves.tradeoff": ("TradeoffCurve", "common_interval", "correlation_report", "plot_curves"),
    "klas_hf.errors": ("TrainingDiverged",),
    "klas_hf.evaluation": (
        "Measurement",
        "evaluate",
        "evaluate_anchor",
        "evaluate_stitches",
        "evaluate_supernet",
        "generate_greedily",
    ),
    "klas_hf.hub": ("model_card", "publish"),
    "klas_hf.hub.delta": ("merge_delta", "save_delta"),
    "klas_hf.kan": ("KANConfig", "KANForImageClassification", "KANForManyTasks", "compress_kan", "head_bytes"),
    "klas_hf.models": (
        "StitchedBackbone",
        "StitchedConfig",
        "StitchedForCausalLM",
        "StitchedForImageClassification",
        "StitchedModel",
        "StitchedVisionConfig",
    ),
    "klas_hf.models.configuration_supernet": ("StitchedSupernetConfig",),
    "klas_hf.paths": ("Path", "Slice", "Stitch"),
    "klas_hf.probes": ("ImageProbeConfig", "ImageProbeNet", "ProbeConfig", "ProbeNet"),
    "klas_hf.probes.training": ("train_probes",),
    "klas_hf.rows": ("ResultRow", "RowFile"),
    "klas_hf.scores.driver": ("score_stitches",),
    "klas_hf.scores.functional_settings": ("FunctionalScoring",),
    "klas_hf.scores.path_scores": ("PathScores",),
    "klas_hf.scores.compared": ("ImageScoring",),
    "klas_hf.scores.values": ("StitchScores",),
    "klas_hf.selection.anchor_distances": ("select_anchors",),
    "klas_hf.selection.anchors": ("AnchorSelection",),
    "klas_hf.selection.choice": ("PathSelection", "StitchSelection", "merge_selections"),
    "klas_hf.selection.klas": ("best_stitches", "match_stitches", "select_stitches", "shortlist_stitches"),
    "klas_hf.selection.pruning": (
        "gromov_paths",
        "linear_patch_paths",
        "replaceme_paths",
        "shortgpt_paths",
        "tail_paths",
        "uniform_paths",
    ),
    "klas_hf.selection.rivals": ("esta_stitches", "min_kl_stitches", "random_stitches"),
    "klas_hf.selection.plan": ("SearchConfig",),
    "klas_hf.selection.search": ("search_paths",),
    "klas_hf.selection.snnet": ("snnet_groups", "snnet_stitches"),
    "klas_hf.stitch_costs": ("StitchCosts",),
    "klas_hf.stitching": (
        "StitchedSupernet",
        "StitchedSupernetForCausalLM",
        "StitchedSupernetForImageClassification",
    ),
    "klas_hf.stitching.prefixes": ("PrefixCache",),
    "klas_hf.tables": ("format_table",),
    "klas_hf.training": (
        "Augmentation",
        "HealingResult",
        "TrainingConfig",
        "TrainingResult",
        "heal",
        "heal_best",
        "healing_config",
        "recalibrate_batch_norm",
        "remember_answers",
        "train_stitches",
    ),
}
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}

__all__ = sorted(_MODULE_OF)

# What lower rooms do through higher ones: name of the function → its module, imported when it is called.
_ACTIONS = {
    "assemble_path": "klas_hf.stitching.assembly",
    "compress_tasks": "klas_hf.kan.compression",
    "load_delta": "klas_hf.hub.delta",
    "publish": "klas_hf.hub",
    "stitch_anchors": "klas_hf.stitching.assembly",
}


def _call(module: str, name: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(import_module(module), name)(*args, **kwargs)


ACTIONS.update({name: partial(_call, module, name) for name, module in _ACTIONS.items()})

if "klas_hf_command" not in sys.modules:  # a command that touches models has them registered when it loads them
    import_module("klas_hf.kan")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("klas_hf")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'klas_hf' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return ["__version__", *__all__]
