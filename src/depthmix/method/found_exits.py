"""The exits that a model brings along: those that were trained together with its mixture."""

from __future__ import annotations

from torch import nn

from depthmix.method.exits import Exits
from depthmix.method.norm import active_mixture


def find_exits(model: nn.Module) -> Exits | None:
    """Find the exits that were trained together with a model.

    They are the active mixture's (`MixtureConfig.exits`). Those that were put on a finished model
    are no part of it: they lie in a folder of their own.

    Args:
        model: Any model, wrapped or not.

    Returns:
        Its exits, which it still owns; `None` where the active mixture has none, there is no
        mixture, or the adapter that brings them is disabled, since they were trained to say what
        the adapted model says.
    """
    mixture = active_mixture(model)
    return None if mixture is None else mixture.exits
