"""The options that speak of exits: which they are, and what can be checked without a model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from depthmix.options.types import check_number

if TYPE_CHECKING:
    from depthmix.method.config import MixtureConfig

EXIT_OPTIONS = (
    *("exits", "exit_rank", "exit_weight", "exit_distillation", "exit_vocabulary"),
    "exit_learning_rate_factor",
)
"""Options of `MixtureConfig` that say nothing where there are no exits."""


def is_idle(config: MixtureConfig, name: str) -> bool:
    """Tell whether an option says nothing, so that files are as they were before there was one.

    Args:
        config: The mixture's options.
        name: One of them.
    """
    if name == "router_learning_rate_factor":
        return config.router_learning_rate_factor == 1
    return config.exits is None and name in EXIT_OPTIONS


def check_exit_options(config: MixtureConfig) -> None:
    """Check what is said of exits.

    Args:
        config: The mixture's options.

    Raises:
        ValueError: If a number is out of its range, or something is said of exits that there are
            not.
    """
    if config.exits is None:
        said = [n for n in EXIT_OPTIONS if getattr(config, n) != getattr(type(config), n)]
        if said:
            raise ValueError(
                f"`{said[0]}` needs `exits`, the layers that get them, and there are none; name "
                "them, or leave it out."
            )
    else:
        check_exit_layers(config.exits)
    norm_alone, none = "0 gives each exit a norm alone", "leave out `exits` to train without them"
    check_number("exit_rank", config.exit_rank, at_least=0, otherwise=norm_alone)
    check_number("exit_weight", config.exit_weight, above=0, otherwise=none)
    if not 0 <= config.exit_distillation <= 1:
        raise ValueError(
            f"`exit_distillation` must be from 0 to 1, got {config.exit_distillation}; 0 learns "
            "from the labels alone, 1 from the model's own prediction alone."
        )
    every = "`None` takes all entries"
    check_number("exit_vocabulary", config.exit_vocabulary, at_least=1, otherwise=every)
    for name in ("exit_learning_rate_factor", "router_learning_rate_factor"):
        as_it_is = "1 leaves the rate as it is"
        check_number(name, getattr(config, name), above=0, otherwise=as_it_is)


def check_exit_layers(
    layers: Sequence[int], *, num_hidden_layers: int | None = None, name: str = "exits"
) -> None:
    """Check where exits are to be.

    Args:
        layers: Numbers of layers.
        num_hidden_layers: Layers of the model; `None` where it is not known yet.
        name: The argument, for messages.

    Raises:
        ValueError: If there is none, they do not increase, or one is not below the final layer.
    """
    rising = all(low < high for low, high in pairwise(layers))
    too_high = num_hidden_layers is not None and layers and layers[-1] >= num_hidden_layers
    if not layers or not rising or layers[0] < 1 or too_high:
        bound = "" if num_hidden_layers is None else f" to {num_hidden_layers - 1}"
        raise ValueError(
            f"`{name}` must name layers below the final one, from 1{bound} and increasing, got "
            f"{list(layers)}."
        )
