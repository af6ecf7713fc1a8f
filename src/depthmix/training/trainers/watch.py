"""What watches a training: how fast it goes, and that its gradients are finite."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from depthmix.training.trainers.checkpoints import find_last_checkpoint


class Pace(TrainerCallback):
    """Counts the input tokens of training steps, and the seconds that the steps take."""

    def __init__(self) -> None:
        self._num_tokens: Tensor | int = 0
        self._seconds = 0.0
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it; checking the loss has waited for the device."""
        self._seconds += time.perf_counter() - self._began

    def count(self, inputs: Mapping[str, Any]) -> None:
        """Count the tokens of one batch, without its padding."""
        mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
        if mask is not None:
            self._num_tokens = self._num_tokens + mask.sum()
        elif ids is not None:
            self._num_tokens = self._num_tokens + ids.numel()

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Give what was measured since the last time, and start anew."""
        counted = torch.as_tensor(self._num_tokens, dtype=torch.float32, device=accelerator.device)
        num_tokens = accelerator.reduce(counted, reduction="sum").item()
        seconds, self._seconds, self._num_tokens = self._seconds, 0.0, 0
        rate = {"tokens_per_second": num_tokens / seconds} if num_tokens and seconds else {}
        if accelerator.device.type in ("cpu", "mps"):
            memory = psutil.Process().memory_info().rss
        else:
            device_module = torch.get_device_module(accelerator.device)
            memory = device_module.max_memory_allocated(accelerator.device)
        return {**rate, "memory_gib": memory / 2**30}


class FiniteGradients(TrainerCallback):
    """Stops a run whose gradients are not finite before the optimiser takes them."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check every gradient; loss scaling for float16 handles infinities by itself."""
        if args.fp16:
            return
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        # Clipping has spread an infinite norm over all of them: which one was first is lost.
        if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            raise FloatingPointError(say_diverged("gradients are not finite", args))


def say_diverged(what: str, args: TrainingArguments) -> str:
    """Say what diverged, where the last good weights are, and what to try."""
    last = find_last_checkpoint(Path(str(args.output_dir)))
    kept = f"the last good checkpoint is {last}" if last else "no checkpoint was saved yet"
    return f"The {what}; {kept}. Lower `learning_rate`, or raise `warmup_steps`."
