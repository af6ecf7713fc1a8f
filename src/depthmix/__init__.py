"""Mixture-of-Depths Ensemble (MoDE): the last layers of a language model vote, token by token."""

from depthmix.adapter import register
from depthmix.adapter_config import MoDEConfig
from depthmix.architecture import find_backbone
from depthmix.attachment import attach, detach, set_top_k
from depthmix.backbone import Backbone
from depthmix.checkpoint import load
from depthmix.comparison.comparison import compare
from depthmix.comparison.scores import Comparison
from depthmix.config import MixtureConfig
from depthmix.decoding.lazy_depth import LazyDepth
from depthmix.decoding.self_speculation import SelfSpeculation
from depthmix.layer_choice import choose_late_layers
from depthmix.ledger import Ledger, parameter_ledger
from depthmix.lora_baseline import to_lora
from depthmix.probe import Probe, probe_layers
from depthmix.run_config import RunConfig, load_run_config
from depthmix.trainers import MoDESFTTrainer, MoDETrainer, MoDETrainerMixin
from depthmix.training import TrainResult, train

register()

__all__ = [
    "Backbone",
    "Comparison",
    "LazyDepth",
    "Ledger",
    "MixtureConfig",
    "MoDEConfig",
    "MoDESFTTrainer",
    "MoDETrainer",
    "MoDETrainerMixin",
    "Probe",
    "RunConfig",
    "SelfSpeculation",
    "TrainResult",
    "attach",
    "choose_late_layers",
    "compare",
    "detach",
    "find_backbone",
    "load",
    "load_run_config",
    "parameter_ledger",
    "probe_layers",
    "set_top_k",
    "to_lora",
    "train",
]
