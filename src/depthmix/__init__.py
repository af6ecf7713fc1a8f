"""Mixture-of-Depths Ensemble (MoDE): the last layers of a language model vote, token by token.

Every name is imported when it is asked for, but for what makes PEFT know the method: that must be
done before anyone opens an adapter, and is done at once.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from depthmix.adapters.attach import attach, detach
    from depthmix.adapters.baseline import to_lora
    from depthmix.adapters.checkpoint import load
    from depthmix.adapters.config import MoDEConfig
    from depthmix.adapters.exit_files import load_exits
    from depthmix.adapters.ledger import Ledger, parameter_ledger
    from depthmix.comparison.answers import Answer, did_it_help
    from depthmix.comparison.comparison import compare
    from depthmix.comparison.scores import Comparison
    from depthmix.decoding.draft_plan import DraftPlan
    from depthmix.decoding.fast_generation import FastGeneration
    from depthmix.decoding.lazy_depth import LazyDepth
    from depthmix.depth.layer_choice import choose_late_layers
    from depthmix.depth.probe import Probe, probe_layers
    from depthmix.evaluation.bench import Benchmark, bench
    from depthmix.evaluation.harness import evaluate
    from depthmix.evaluation.plan import EvaluationPlan
    from depthmix.exports.export import Export, export
    from depthmix.method.architecture import find_backbone
    from depthmix.method.backbone import Backbone
    from depthmix.method.config import MixtureConfig
    from depthmix.method.norm import set_top_k
    from depthmix.models.calibrating import Calibration, calibrate
    from depthmix.models.exits import AddedExits, add_exits
    from depthmix.models.loading import load_model, load_tokenizer
    from depthmix.models.spec import ModelSpec
    from depthmix.models.subjects import look
    from depthmix.training.config import RunConfig, load_run_config
    from depthmix.training.folder import TrainResult
    from depthmix.training.train import train
    from depthmix.training.trainers.mixin import MoDESFTTrainer, MoDETrainer, MoDETrainerMixin

_PLACES = {
    "AddedExits": "depthmix.models.exits",
    "Answer": "depthmix.comparison.answers",
    "Backbone": "depthmix.method.backbone",
    "Benchmark": "depthmix.evaluation.bench",
    "Calibration": "depthmix.models.calibrating",
    "Comparison": "depthmix.comparison.scores",
    "DraftPlan": "depthmix.decoding.draft_plan",
    "EvaluationPlan": "depthmix.evaluation.plan",
    "Export": "depthmix.exports.export",
    "FastGeneration": "depthmix.decoding.fast_generation",
    "LazyDepth": "depthmix.decoding.lazy_depth",
    "Ledger": "depthmix.adapters.ledger",
    "MixtureConfig": "depthmix.method.config",
    "MoDEConfig": "depthmix.adapters.config",
    "MoDESFTTrainer": "depthmix.training.trainers.mixin",
    "MoDETrainer": "depthmix.training.trainers.mixin",
    "MoDETrainerMixin": "depthmix.training.trainers.mixin",
    "ModelSpec": "depthmix.models.spec",
    "Probe": "depthmix.depth.probe",
    "RunConfig": "depthmix.training.config",
    "TrainResult": "depthmix.training.folder",
    "add_exits": "depthmix.models.exits",
    "attach": "depthmix.adapters.attach",
    "bench": "depthmix.evaluation.bench",
    "calibrate": "depthmix.models.calibrating",
    "choose_late_layers": "depthmix.depth.layer_choice",
    "compare": "depthmix.comparison.comparison",
    "detach": "depthmix.adapters.attach",
    "did_it_help": "depthmix.comparison.answers",
    "evaluate": "depthmix.evaluation.harness",
    "export": "depthmix.exports.export",
    "find_backbone": "depthmix.method.architecture",
    "load": "depthmix.adapters.checkpoint",
    "load_exits": "depthmix.adapters.exit_files",
    "load_model": "depthmix.models.loading",
    "load_run_config": "depthmix.training.config",
    "load_tokenizer": "depthmix.models.loading",
    "look": "depthmix.models.subjects",
    "parameter_ledger": "depthmix.adapters.ledger",
    "probe_layers": "depthmix.depth.probe",
    "set_top_k": "depthmix.method.norm",
    "to_lora": "depthmix.adapters.baseline",
    "train": "depthmix.training.train",
}
"""Where each name is."""

__all__ = [
    "AddedExits",
    "Answer",
    "Backbone",
    "Benchmark",
    "Calibration",
    "Comparison",
    "DraftPlan",
    "EvaluationPlan",
    "Export",
    "FastGeneration",
    "LazyDepth",
    "Ledger",
    "MixtureConfig",
    "MoDEConfig",
    "MoDESFTTrainer",
    "MoDETrainer",
    "MoDETrainerMixin",
    "ModelSpec",
    "Probe",
    "RunConfig",
    "TrainResult",
    "add_exits",
    "attach",
    "bench",
    "calibrate",
    "choose_late_layers",
    "compare",
    "detach",
    "did_it_help",
    "evaluate",
    "export",
    "find_backbone",
    "load",
    "load_exits",
    "load_model",
    "load_run_config",
    "load_tokenizer",
    "look",
    "parameter_ledger",
    "probe_layers",
    "set_top_k",
    "to_lora",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a name's module when the name is asked for first."""
    if name not in _PLACES:
        raise AttributeError(f"module 'depthmix' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_PLACES[name]), name)
    return value


def __dir__() -> list[str]:
    """List the public names, also those that are not imported yet."""
    return sorted({*globals(), *__all__})


if "depthmix_cli.process" not in sys.modules:  # the command does it when it needs a model
    import_module("depthmix.adapters")
