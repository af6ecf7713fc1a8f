"""What a trainer takes across an interruption beside what `transformers.Trainer` does."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from depthmix.loss.measurements import Part, Step

INTERVAL_NAME = "logging_interval_{rank}.pt"
"""File in a checkpoint: what a process has measured and not logged yet."""

SUMS = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_total_train_tokens")
"""The host trainer's sums over steps, which it would begin anew."""


class Resumption(TrainerCallback):
    """Makes a run that is resumed log what it would have logged, and end where it would have ended.

    `transformers.Trainer` forgets at a checkpoint what it has not logged yet, so that the first
    entry after it is a mean over fewer steps; it loses the evaluation and the entry at the end of
    an epoch where a checkpoint of the epoch's last step is resumed; and it finds the best
    checkpoint by the path that it had when it was written.

    Args:
        trainer: The `MoDETrainerMixin` that it is added to.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.checkpoint: Path | None = None
        """Folder from which the trainer is to go on."""
        self.is_whole = True
        """Whether the trainer's sums are those of all steps from the first one on."""
        self._held = (False, False)

    def save(self, folder: Path) -> None:
        """Write what is not logged yet into a checkpoint."""
        trainer = self.trainer
        content: dict[str, Any] = {name: getattr(trainer, name, None) for name in SUMS}
        for name, kept in (("steps", trainer._steps), ("parts", trainer._parts)):
            content[name] = [
                {one.name: getattr(entry, one.name) for one in fields(entry)} for entry in kept
            ]
        measured = getattr(trainer, "_metrics", {}).get("train", {})
        content["metrics"] = {name: list(values) for name, values in measured.items()}
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(content, folder / INTERVAL_NAME.format(rank=trainer.args.process_index))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up what the checkpoint holds."""
        self.is_whole = self.checkpoint is None
        if self.checkpoint is None:
            return
        trainer = self.trainer
        best = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
        if state.best_global_step and best.is_dir():
            state.best_model_checkpoint = str(best)
        path = self.checkpoint / INTERVAL_NAME.format(rank=args.process_index)
        if not path.is_file():
            return
        content = torch.load(path, map_location=args.device, weights_only=True)
        for name in SUMS:
            if content[name] is not None:
                setattr(trainer, name, content[name])
        trainer._steps = [Step(**step) for step in content["steps"]]
        trainer._parts = [Part(**part) for part in content["parts"]]
        for name, values in content["metrics"].items():
            trainer._metrics["train"][name] = values
        self.is_whole = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put off evaluation and checkpoint of an epoch's last step until the epoch has ended."""
        if control.should_training_stop or float(state.epoch).is_integer():
            self._held = (control.should_evaluate, control.should_save)
            control.should_evaluate = control.should_save = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Do what was put off."""
        evaluate, save = self._held
        self._held = (False, False)
        control.should_evaluate |= evaluate
        control.should_save |= save
