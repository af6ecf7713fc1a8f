"""How messages speak of the objective's terms beside the task loss, and of what does without."""

from __future__ import annotations

from dataclasses import dataclass

from depthmix.method.config import MixtureConfig


@dataclass(frozen=True)
class TermNames:
    """Words for the terms that a mixture's options ask for."""

    loss: str
    """The terms, such as `distillation loss`."""

    demand: str
    """What must hold where they have no place, such as `` `distillation_weight` must be 0``."""

    remedy: str
    """What to do then, such as ``set `distillation_weight=0` ``."""


def name_terms(config: MixtureConfig) -> TermNames:
    """Find the words.

    Args:
        config: The mixture's options, which `has_term`.
    """
    if config.exits is None:
        return TermNames(
            "distillation loss",
            "`distillation_weight` must be 0",
            "set `distillation_weight=0`",
        )
    if not config.distils:
        return TermNames("exits' loss", "`exits` must be left out", "leave out `exits`")
    return TermNames(
        "distillation loss (and the exits')",
        "`distillation_weight` must be 0, and `exits` left out,",
        "set `distillation_weight=0` and leave out `exits`",
    )
