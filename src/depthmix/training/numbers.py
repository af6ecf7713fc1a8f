"""Numbers of a training that transformers takes, and that no training can use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from depthmix.options.types import check_number

COUNTS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "eval_accumulation_steps",
    "max_length",
)
"""Options that must be 1 or more."""

POSITIVE = ("num_train_epochs", "logging_steps", "save_steps", "eval_steps", "adam_epsilon")
"""Options that must be above 0; of steps, a share is below 1."""

NOT_NEGATIVE = (
    *("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "eval_delay"),
    *("seed", "data_seed", "dataloader_num_workers", "neftune_noise_alpha"),
)
"""Options that must be 0 or more."""

SHARES = ("adam_beta1", "adam_beta2", "label_smoothing_factor")
"""Options that must be at least 0 and below 1."""


def check_training(training: Mapping[str, Any]) -> None:
    """Check numbers that would only fail after the first files are written, or train nothing.

    Args:
        training: Keyword arguments of `trl.SFTConfig`.

    Raises:
        ValueError: If a number is not finite, or out of bounds.
    """
    for name, value in training.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        option = f"training.{name}"
        if name in COUNTS:
            check_number(option, value, at_least=1)
        elif name in POSITIVE:
            check_number(option, value, above=0)
        elif name in NOT_NEGATIVE:
            check_number(option, value, at_least=0)
        elif name in SHARES:
            check_number(option, value, at_least=0, below=1)
        elif name == "max_steps" and value < 1 and value != -1:
            raise ValueError(
                f"`training.max_steps` must be at least 1, got {value}; leave it out to train for "
                "`training.num_train_epochs`."
            )
        elif not math.isfinite(value):
            raise ValueError(f"`{option}` must be a finite number, got {value}.")
