"""How a run begins or goes on: what it may replace in its folder, and what must be as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from depthmix.files.drafts import is_draft, sweep, write_whole
from depthmix.files.json import read_object
from depthmix.files.runs import RUN_CONFIG_NAME, read_run_settings
from depthmix.training.config import RunConfig, save_run_config, to_settings
from depthmix.training.trainers.checkpoints import check_checkpoint, list_checkpoints

BEGINNING_NAME = "beginning.json"
"""File of what a run found out before its first step, and keeps where it is resumed."""

OVERWRITTEN_NAME = ".overwritten"
"""File in a folder whose earlier run is being removed: what lies beside it counts for nothing."""

FREE_PREFIXES = (
    *("data.eval", "training.eval", "training.metric_for_", "training.greater_is_better"),
    *("training.output_dir", "training.run_name", "training.save_", "training.load_best_"),
    *("training.push_to_hub", "training.hub_", "training.report_to", "training.log"),
    *("training.disable_tqdm", "training.resume_from_checkpoint", "training.dataloader_"),
    # How a batch is divided, among devices too, and what that costs.
    *("training.per_device_", "training.gradient_accumulation_", "training.gradient_checkpointing"),
    "training.activation_checkpointing",
    *("training.torch_compile", "training.fsdp", "training.deepspeed", "training.ddp_"),
)
"""How the names of settings begin that do not change what is trained."""


@dataclass(frozen=True)
class Start:
    """How a run begins or goes on in its folder."""

    checkpoint: Path | None = None
    """Checkpoint to go on from; `None` to begin with the first step."""

    clears: bool = False
    """Whether all that lies in the folder is removed as the run begins."""

    skipped: tuple[Path, ...] = ()
    """Incomplete checkpoints, which are removed as the run begins."""

    notices: tuple[str, ...] = ()
    """What the user should know of it."""


def find_start(
    output_dir: Path,
    *,
    overwrite: bool,
    resume: bool,
    training: Mapping[str, Any] | None = None,
) -> Start:
    """Decide what becomes of a run that the output folder holds already; changes nothing.

    Args:
        output_dir: The folder.
        overwrite: Whether an earlier run may be replaced.
        resume: Whether it is to go on: from its newest whole checkpoint, or from its beginning
            where it was interrupted before there was any.
        training: The run's settings of that name.

    Returns:
        Where it begins.

    Raises:
        ValueError: If both flags are set, or the checkpoint lacks what the run needs.
        FileExistsError: If the folder holds files that may not be replaced, or no run to go on
            with.
    """
    if overwrite and resume:
        raise ValueError("`overwrite` and `resume` exclude each other; choose one.")
    entries = list(output_dir.iterdir()) if output_dir.is_dir() else []
    if (output_dir / OVERWRITTEN_NAME).exists():  # its run was being replaced
        notice = f"{output_dir} was being overwritten: the run begins with its first step."
        return Start(clears=True, notices=(notice,) if resume else ())
    entries = [path for path in entries if not is_draft(path)]
    if output_dir.exists() and not output_dir.is_dir():
        raise FileExistsError(
            f"`training.output_dir` must be a folder, and {output_dir} is a file; choose another."
        )
    is_run = (output_dir / RUN_CONFIG_NAME).is_file()
    if resume:
        if entries and not is_run:
            raise FileExistsError(
                f"`resume` needs a run, and {output_dir} holds other files and no "
                f"{RUN_CONFIG_NAME}; name the run's folder as `training.output_dir`."
            )
        return _find_checkpoint(output_dir, training or {})
    if overwrite and entries and not is_run:
        raise FileExistsError(
            f"`overwrite` only replaces an earlier run, and {output_dir} holds other files; choose "
            "another `training.output_dir`, or empty it yourself."
        )
    if not overwrite and entries:
        raise FileExistsError(
            f"`training.output_dir` must be a new folder, and {output_dir} already holds files; "
            "pass `resume=True` to go on, `overwrite=True` to start again, or choose another "
            "folder."
        )
    return Start(clears=overwrite)


def _find_checkpoint(output_dir: Path, training: Mapping[str, Any]) -> Start:
    """Find the newest whole checkpoint, and check that nothing of it is missing."""
    checkpoints = list_checkpoints(output_dir)
    checkpoint = checkpoints.whole[-1] if checkpoints.whole else None
    notices = [
        f"{path} is skipped, since the run was interrupted while it was written or removed."
        for path in checkpoints.incomplete
    ]
    if checkpoint is None:
        notices.append(
            f"{output_dir} holds no whole checkpoint: the run begins with its first step."
        )
    else:
        notices += check_checkpoint(
            checkpoint,
            save_only_model=bool(training.get("save_only_model")),
            fp16=bool(training.get("fp16")),
            load_best=bool(training.get("load_best_model_at_end")),
        )
        notices.append(f"The run goes on from {checkpoint}.")
    return Start(checkpoint, skipped=checkpoints.incomplete, notices=tuple(notices))


def begin(config: RunConfig, output_dir: Path, start: Start, facts: Mapping[str, Any]) -> None:
    """Write down how a run begins, once it is known that it can.

    Args:
        config: Its settings.
        output_dir: Its folder; made if missing.
        start: What `find_start` found.
        facts: What the run found out before its first step, in JSON's types.

    Raises:
        OSError: If the folder cannot be written.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    if start.clears:
        marker = output_dir / OVERWRITTEN_NAME
        marker.touch()  # from here on nothing beside it counts
        for path in list(output_dir.iterdir()):
            if path != marker:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        marker.unlink()
    sweep(output_dir)
    for path in start.skipped:
        shutil.rmtree(path)
    save_run_config(config, output_dir)
    write_whole(output_dir / BEGINNING_NAME, json.dumps(facts, indent=1) + "\n")


class OnBegin(TrainerCallback):
    """Lets the main process do something when a training begins, and the others wait for it."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Do it."""
        if state.is_world_process_zero:
            self.action()
        PartialState().wait_for_everyone()


def read_beginning(output_dir: Path) -> dict[str, Any]:
    """Read the facts that `begin` wrote; none where an earlier version began the run.

    Args:
        output_dir: Folder of the run.

    Raises:
        ValueError: If the file is damaged.
    """
    path = output_dir / BEGINNING_NAME
    way_out = "put it back, or start the run again by `overwrite`"
    return read_object(path, way_out=way_out) if path.is_file() else {}


def check_new(config: RunConfig) -> Path:
    """Refuse settings that no training can have, before anything is read.

    Args:
        config: The run's settings.

    Returns:
        Its folder.

    Raises:
        ValueError: If the model has an adapter or another revision than the mixture says, or the
            folder or the checkpoint is named in the wrong place.
    """
    if config.model.adapter is not None:
        raise ValueError(
            "`model.adapter` must be left out in training, which makes a new adapter; go on with "
            "an unfinished run by `resume=True`, or merge the adapter into its model first."
        )
    if "output_dir" not in config.training:
        raise ValueError(
            "`training` must hold `output_dir`, the folder of the run; `load_run_config` fills it."
        )
    if config.mode.get("revision") not in (None, config.model.revision):
        raise ValueError(
            f"`mode.revision` must be left out, got {config.mode['revision']!r}: it is that of the "
            "model under the adapter, which `model.revision` names."
        )
    if config.training.get("resume_from_checkpoint") is not None:
        raise ValueError(
            "`training.resume_from_checkpoint` must be left out, got "
            f"{config.training['resume_from_checkpoint']!r}; `resume` goes on from the newest "
            "checkpoint in `training.output_dir`."
        )
    return Path(config.training["output_dir"])


def check_resumed(config: RunConfig, output_dir: Path) -> None:
    """Refuse to go on with a run under other settings than those it began with.

    What is only logged, saved or evaluated may change, and how a batch is divided.

    Args:
        config: The settings it is to go on with.
        output_dir: Folder of the run.

    Raises:
        ValueError: If a setting differs that the first part of the training had otherwise.
    """
    path = output_dir / RUN_CONFIG_NAME
    if not path.is_file():
        return
    began, now = (
        dict(_list_settings(settings))
        for settings in (read_run_settings(path), to_settings(config))
    )
    for name in {**began, **now}:
        if began.get(name) != now.get(name):
            raise ValueError(
                f"`{name}` must be {began.get(name)!r} to go on with the run in {output_dir}, "
                f"which began with it, got {now.get(name)!r}; leave it so, or start the other run "
                "in a folder of its own."
            )


def _list_settings(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Name the settings that determine a training."""
    yield "method", settings.get("method")
    if settings.get("preset") == "fast":  # holds out records
        yield "preset", "fast"
    for section in ("model", "data", "mode", "training"):
        for option, value in settings.get(section, {}).items():
            name = f"{section}.{option}"
            if not name.startswith(FREE_PREFIXES):
                yield name, sorted(value) if option == "without" else value


@contextmanager
def removed_if_refused(directory: Path) -> Iterator[None]:
    """Leave no empty folder behind when the run is refused before it begins."""
    existed = directory.exists()
    try:
        yield
    except Exception:
        if not existed and directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
        raise
