"""Trainers that bring the whole objective to the optimiser and log what the mixture does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTTrainer

from depthmix.attachment import find_mixture_norm
from depthmix.objective import Step

if TYPE_CHECKING:
    MixinBase = Trainer
else:
    MixinBase = object


class MoDETrainerMixin(MixinBase):
    """Brings MoDE's objective and its measurements to any `Trainer`.

    Put it before the trainer: `class MyTrainer(MoDETrainerMixin, SFTTrainer)`. A model without a
    mixture trains as it would without the mixin. A loss or gradient that is not finite stops the
    run before it can reach the weights, so the last checkpoint is a good one.

    Logged beside the trainer's own values, per logging interval: `task_loss` (nats per label
    token), `distillation_loss` (nats, reduced as the mixture's `reduction` says),
    `distillation_share` (its weighted part of the loss, 0 to 1), `distillation_weight_per_token`
    (what a nat of divergence at a token weighs against a nat of its cross-entropy),
    `routing_entropy` (nats) and `routing_weight/layer_<i>` (mean over label tokens).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._steps: list[Step] = []
        self.add_callback(FiniteGradients())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the host trainer's loss, with `λ L_distill` in it exactly once."""
        norm = find_mixture_norm(self.model)
        mixture = norm.active_mixture if norm is not None else None
        training = self.model.training
        if training and mixture is not None and num_items_in_batch is not None:
            # SFTTrainer keeps the count for itself; the objective's hook needs it.
            inputs = {**inputs, "num_items_in_batch": num_items_in_batch}
        result = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if not training:
            return result
        loss, outputs = result if return_outputs else (result, None)
        if norm is not None and mixture is not None:
            loss = self._add_distillation(
                loss, norm.objective.take(), mixture.config.distillation_weight, num_items_in_batch
            )
        if not torch.isfinite(loss):
            raise FloatingPointError(_diverged("loss", float(loss), self))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the mixture's measurements beside the host trainer's."""
        if self._steps and "loss" in logs:
            logs = {**logs, **self._measurements()}
        super().log(logs, start_time)

    def _add_distillation(
        self,
        loss: Tensor,
        step: Step | None,
        weight: float,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        """Add the distillation term where the host trainer made its loss without it."""
        if step is None:
            if weight == 0:
                return loss
            raise RuntimeError(
                "The distillation loss needs `labels` in the model's forward pass, and this "
                "trainer keeps them back; drop `label_smoothing_factor` and `compute_loss_func`, "
                "or set `distillation_weight=0`."
            )
        self._steps.append(step)
        if step.distilled or weight == 0:
            return loss
        term = weight * step.loss.distillation
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            term = term * self.accelerator.num_processes  # as the trainers scale the task loss
        return loss + term.to(loss.device)

    def _measurements(self) -> dict[str, float]:
        """Average the steps since the last log, over all processes, and forget them."""
        steps, self._steps = self._steps, []
        rows = [
            torch.stack(
                [step.task_loss, step.distillation_loss, step.routing_entropy, *step.routing_weights]
            )
            for step in steps
        ]
        values = self.accelerator.reduce(torch.stack(rows).mean(0), reduction="mean").tolist()
        task, distillation, entropy, *weights = values
        weighted = steps[-1].distillation_weight * distillation
        per_token = sum(step.loss.weight_per_token for step in steps) / len(steps)
        return {
            "task_loss": task,
            "distillation_loss": distillation,
            "distillation_share": weighted / (task + weighted) if weighted else 0.0,
            "distillation_weight_per_token": per_token,
            "routing_entropy": entropy,
            **{
                f"routing_weight/layer_{layer}": weight
                for layer, weight in zip(steps[-1].late_layers, weights, strict=True)
            },
        }


class FiniteGradients(TrainerCallback):
    """Stops a run whose gradients are not finite before the optimiser takes them."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check every gradient; loss scaling for float16 handles infinities by itself."""
        if args.fp16:
            return
        for name, parameter in kwargs["model"].named_parameters():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                raise FloatingPointError(_diverged(f"gradient of {name}", float("nan"), None, args))


class MoDETrainer(MoDETrainerMixin, Trainer):
    """`transformers.Trainer` with MoDE's measurements in its log."""


class MoDESFTTrainer(MoDETrainerMixin, SFTTrainer):
    """`trl.SFTTrainer` with MoDE's whole objective, which the plain one would leave out."""


def _diverged(what: str, value: float, trainer: Trainer | None, args: Any = None) -> str:
    """Say what diverged, where the last good weights are, and what to try."""
    args = trainer.args if trainer is not None else args
    last = get_last_checkpoint(args.output_dir)
    kept = f"the last good checkpoint is {last}" if last else "no checkpoint was saved yet"
    return f"The {what} became {value}; {kept}. Lower `learning_rate`, or raise `warmup_steps`."
