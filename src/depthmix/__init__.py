"""Mixture-of-Depths Ensemble (MoDE): the last layers of a language model vote, token by token."""

from depthmix.adapter import MoDEConfig, register
from depthmix.attachment import attach, detach
from depthmix.backbone import Backbone, find_backbone
from depthmix.config import MixtureConfig

register()

__all__ = [
    "Backbone",
    "MixtureConfig",
    "MoDEConfig",
    "attach",
    "detach",
    "find_backbone",
]
