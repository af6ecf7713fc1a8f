"""Learning rates of their own for a mixture's exits and its router."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer

from depthmix.method.mixture import Mixture
from depthmix.method.norm import active_mixture

if TYPE_CHECKING:
    MixinBase = Trainer
else:
    MixinBase = object


class PartLearningRates(MixinBase):
    """Gives exits and router their learning rates, as groups of the optimiser that a trainer makes.

    Without `exit_learning_rate_factor` and `router_learning_rate_factor` the optimiser is the host
    trainer's.
    """

    _has_part_rates: bool = False

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Let the host trainer make its optimiser, and part its groups."""
        is_given = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        factors = self._list_factors()
        if factors and not is_given:
            for option, (part, factor) in factors.items():
                scale_learning_rate(optimizer, part, factor, option=option)
            self._has_part_rates = True
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Take the host trainer's step, unless its optimiser knows nothing of the rates."""
        factors = {} if self._has_part_rates else self._list_factors()
        if factors:
            raise ValueError(
                f"`{next(iter(factors))}` must be 1 where the trainer does not make the optimizer, "
                "as with `optimizers` or one from DeepSpeed's settings; leave it out, and give "
                "that optimizer a group of parameters with a rate of its own."
            )
        return super().training_step(*args, **kwargs)

    def _list_factors(self) -> dict[str, tuple[nn.Module, float]]:
        """List the parts whose rates differ, with their factors, by the option that says so."""
        mixture = active_mixture(self.model) if self.model is not None else None
        return {} if mixture is None else list_factors(mixture)


def list_factors(mixture: Mixture) -> dict[str, tuple[nn.Module, float]]:
    """List the parts of a mixture whose learning rates differ from the others'.

    Args:
        mixture: The mixture.

    Returns:
        Each part with the factor of its rate, by the option that gives it.
    """
    config = mixture.config
    parts = {
        "exit_learning_rate_factor": (mixture.exits, config.exit_learning_rate_factor),
        "router_learning_rate_factor": (mixture.router, config.router_learning_rate_factor),
    }
    return {n: (part, f) for n, (part, f) in parts.items() if part is not None and f != 1}


def scale_learning_rate(
    optimizer: torch.optim.Optimizer, part: nn.Module, factor: float, *, option: str
) -> None:
    """Give the parameters of one part groups of their own in an optimiser, with another rate.

    Args:
        optimizer: It has taken no step, and has no schedule; its groups are changed.
        part: The part.
        factor: What the rate of each group is multiplied by.
        option: Where the factor comes from, for messages.

    Raises:
        ValueError: If the optimiser holds none of the part's parameters.
    """
    own = {id(parameter) for parameter in part.parameters()}
    found = False
    for group in list(optimizer.param_groups):
        rest = [parameter for parameter in group["params"] if id(parameter) not in own]
        taken = [parameter for parameter in group["params"] if id(parameter) in own]
        found = found or bool(taken)
        if taken and rest:
            group["params"] = rest
            optimizer.add_param_group({**group, "params": taken, "lr": factor * group["lr"]})
        elif taken:
            group["lr"] = factor * group["lr"]
    if not found:
        raise ValueError(
            f"`{option}` must be 1 where the optimizer does not hold the parameters that it is "
            "for, since they are frozen or not the model's own any more; leave it out."
        )
