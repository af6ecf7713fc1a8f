"""Two runs that differ in the mixture alone, in two folders of one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from depthmix.training.config import RunConfig
from depthmix.training.folder import TrainResult
from depthmix.training.start import find_start
from depthmix.training.train import train


def train_beside(
    config: RunConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
    test_sets: Sequence[str] | None = None,
) -> tuple[TrainResult, TrainResult]:
    """Train with the mixture, then LoRA alone: same records, same seed, same settings.

    Of an output folder `runs/mine` the first run takes `runs/mine/mode`, the second
    `runs/mine/lora`. The pretrained model is measured once, with the first.

    Args:
        config: Settings of the run with the mixture; `output_dir` is the folder of both.
        overwrite: As for `train`, for both.
        resume: As for `train`, for each: one that has not begun begins.
        test_sets: As for `train`.

    Returns:
        The run with the mixture, and LoRA alone.

    Raises:
        ValueError: If the settings are of no run with a mixture, or both runs would be pushed to
            one place, or as `train` says.
        FileExistsError: If one of the folders holds a run, and neither flag says what to do;
            nothing is trained then.
        OSError: As for `train`.
    """
    if config.method != "mode":
        raise ValueError(
            '`method` must be "mode" where LoRA is trained beside it, got '
            f"{config.method!r}{_name_preset(config)}; leave it out, or train by `train` alone."
        )
    if config.training.get("hub_model_id") is not None:
        raise ValueError(
            "`training.hub_model_id` must be left out where two runs are trained, which it would "
            f"push to one place, got {config.training['hub_model_id']!r}; push them afterwards."
        )
    folder = Path(config.training["output_dir"])
    measured = config.evaluation and replace(config.evaluation, before=False)
    runs = [
        replace(config, training={**config.training, "output_dir": str(folder / "mode")}),
        replace(
            config,
            method="lora",
            training={**config.training, "output_dir": str(folder / "lora")},
            evaluation=measured,
        ),
    ]
    for run in runs:  # before the first takes its time
        place = Path(run.training["output_dir"])
        find_start(place, overwrite=overwrite, resume=resume, training=run.training)
    results = []
    for number, run in enumerate(runs, start=1):
        what = "with the mixture" if run.method == "mode" else "LoRA alone"
        print(f"Run {number} of 2, {what}: {run.training['output_dir']}.", file=sys.stderr)
        results.append(train(run, overwrite=overwrite, resume=resume, test_sets=test_sets))
    first, second = results
    return first, second


def _name_preset(config: RunConfig) -> str:
    """Say which preset made a run one without a mixture."""
    return "" if config.preset != "fast" else ' by `preset="fast"`'
