"""The options that speak of exits: which they are, and what can be checked without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from depthmix.options.types import check_number

EXIT_OPTIONS = (
    *("exits", "exit_rank", "exit_weight", "exit_distillation", "exit_vocabulary"),
    "exit_learning_rate_factor",
)
"""Options of `MixtureConfig` that say nothing where there are no exits."""


def check_exit_options(options: Mapping[str, Any], *, said: Sequence[str]) -> None:
    """Check what is said of exits.

    Args:
        options: All of `EXIT_OPTIONS` by name.
        said: Those that differ from their default.

    Raises:
        ValueError: If a number is out of its range, or something is said of exits that there are
            not.
    """
    if options["exits"] is None:
        if said:
            raise ValueError(
                f"`{said[0]}` needs `exits`, the layers that get them, and there are none; name "
                "them, or leave it out."
            )
    else:
        check_exit_layers(options["exits"])
    norm_alone, none = "0 gives each exit a norm alone", "leave out `exits` to train without them"
    check_number("exit_rank", options["exit_rank"], at_least=0, otherwise=norm_alone)
    check_number("exit_weight", options["exit_weight"], above=0, otherwise=none)
    if not 0 <= options["exit_distillation"] <= 1:
        raise ValueError(
            f"`exit_distillation` must be from 0 to 1, got {options['exit_distillation']}; 0 "
            "learns from the labels alone, 1 from the model's own prediction alone."
        )
    every = "`None` takes all entries"
    check_number("exit_vocabulary", options["exit_vocabulary"], at_least=1, otherwise=every)
    check_rate_factor("exit_learning_rate_factor", options["exit_learning_rate_factor"])


def check_rate_factor(name: str, factor: float) -> None:
    """Check what multiplies a learning rate.

    Args:
        name: The option, for messages.
        factor: Its value.

    Raises:
        ValueError: If it is not above 0.
    """
    check_number(name, factor, above=0, otherwise="1 leaves the rate as it is")


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
