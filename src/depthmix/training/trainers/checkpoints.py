"""The checkpoints of a run: which of them are whole, and which one a run goes on from."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from depthmix.files.drafts import remove_whole

ADAPTER_NAMES = ("adapter_config.json", "adapter_model.safetensors")
"""Files of the weights."""

SHARDED = ("pytorch_model_fsdp*", "optimizer_*", "optimizer.bin", "global_step*", "latest")
"""What FSDP and DeepSpeed write instead of the trainer's files; they check theirs themselves."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in a run's folder."""

    whole: tuple[Path, ...]
    """Those to whose end the trainer came, by step."""

    incomplete: tuple[Path, ...]
    """Those in whose writing it was interrupted, by step."""


def list_checkpoints(folder: Path) -> Checkpoints:
    """Look for checkpoints.

    The trainer writes its state last into a checkpoint, so one without it, or with a part of it,
    is incomplete.

    Args:
        folder: Folder of the run; may be missing.

    Returns:
        The checkpoints.
    """
    numbered = []
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if folder.is_dir() else ():
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if match and path.is_dir():
            numbered.append((int(match[1]), path))
    whole = [
        path for step, path in sorted(numbered) if _read_state(path).get("global_step") == step
    ]
    left = tuple(path for _, path in sorted(numbered) if path not in whole)
    return Checkpoints(tuple(whole), left)


def find_last_checkpoint(folder: Path) -> Path | None:
    """Find the newest checkpoint that is whole; None if there is none."""
    whole = list_checkpoints(folder).whole
    return whole[-1] if whole else None


def check_checkpoint(
    checkpoint: Path, *, save_only_model: bool, fp16: bool = False, load_best: bool = False
) -> Iterator[str]:
    """Check that a run can go on from a checkpoint as if it had never stopped.

    Args:
        checkpoint: The folder; its trainer's state is whole.
        save_only_model: Whether the run was told to save nothing but the model.
        fp16: Whether the run scales its loss.
        load_best: Whether the run ends at the best of its checkpoints.

    Yields:
        What is to be said of it: sentences.

    Raises:
        ValueError: If a file that is needed is missing or damaged.
    """
    if any(any(checkpoint.glob(pattern)) for pattern in SHARDED):
        return
    best = _read_state(checkpoint).get("best_global_step")
    if load_best and best:
        best_folder = checkpoint.with_name(f"{PREFIX_CHECKPOINT_DIR}-{best}")
        for name in ADAPTER_NAMES:
            _check(
                best_folder, name, "the best weights so far, at which the run may end, are there"
            )
    for name in ADAPTER_NAMES:
        _check(checkpoint, name, "it holds the weights")
    random_state = _name_random_state()
    if not (checkpoint / random_state).is_file() and any(checkpoint.glob("rng_state*.pth")):
        yield (
            f"{checkpoint} is of another number of processes: their random numbers, such as those "
            "of dropout, begin anew."
        )
        random_state = None
    names = [OPTIMIZER_NAME, SCHEDULER_NAME, random_state]
    names += [SCALER_NAME] if fp16 and torch.cuda.is_available() else []
    missing = [name for name in names if name and not (checkpoint / name).is_file()]
    if save_only_model and missing:
        yield (
            f"{checkpoint} has no {', '.join(missing)}, because `training.save_only_model` is set: "
            "optimizer, schedule and random numbers begin anew, and the run will end at other "
            "weights than without the interruption."
        )
    for name in names:
        if name and not (save_only_model and name in missing):
            _check(checkpoint, name, "without it the run would end at other weights")


class CheckpointLimit(TrainerCallback):
    """Keeps the newest checkpoints of a run, and the best, as `save_total_limit` says.

    As `transformers.Trainer` does, but that an interruption leaves no half of a checkpoint.

    Args:
        limit: Checkpoints to keep; at least the newest one and the best are.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the oldest ones."""
        if not args.should_save:
            return
        every = list_checkpoints(Path(args.output_dir)).whole
        kept = {every[-1].name} if every else set()
        if state.best_model_checkpoint is not None:
            kept.add(Path(state.best_model_checkpoint).name)
        surplus = len(every) - max(self.limit, len(kept))
        old = [path for path in every if path.name not in kept]
        for path in old[: max(0, surplus)]:
            remove_whole(path)


def keep_best(folder: Path, best: Path) -> None:
    """Remove all checkpoints of a finished run but the best."""
    for path in list_checkpoints(folder).whole:
        if path.name != best.name:
            remove_whole(path)


def _check(checkpoint: Path, name: str, why: str) -> None:
    """Refuse a file that is missing or cannot be read to its end."""
    path = checkpoint / name
    if not path.is_file():
        reason = f"{name} is missing"
    else:
        try:
            _read_through(path)
            return
        except (ValueError, OSError, EOFError, RuntimeError, SafetensorError) as error:
            reason = f"{name} is damaged ({' '.join(str(error).split()) or type(error).__name__})"
        except Exception as error:  # unpickling what is no pickle may raise anything
            reason = f"{name} is damaged ({type(error).__name__})"
    earlier = [
        path for path in list_checkpoints(checkpoint.parent).whole if path.name != checkpoint.name
    ]
    place = earlier[-1].name if earlier else "the beginning"
    raise ValueError(
        f"`resume` needs {name} in {checkpoint}, since {why}, and {reason}; put it back, remove "
        f"the folder {checkpoint} to go on from {place}, or start the run again by `overwrite`."
    )


def _read_through(path: Path) -> None:
    """Read a file of a checkpoint to its end."""
    if path.suffix == ".json":
        if not isinstance(json.loads(path.read_text("utf-8")), dict):
            raise ValueError("it holds no settings")
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            if not file.keys():
                raise ValueError("it holds no weights")
    else:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
            if bad is not None:
                raise ValueError(f"checksum of {bad}")
        with safe_globals():
            torch.load(path, map_location="cpu", weights_only=True)


def _name_random_state() -> str:
    """Name the file of this process's random numbers."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return "rng_state.pth"
    return f"rng_state_{os.environ.get('RANK', '0')}.pth"


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """Read the trainer's state; empty where it is missing or cut."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text("utf-8"))
    except (ValueError, OSError):
        return {}
    return state if isinstance(state, dict) else {}
