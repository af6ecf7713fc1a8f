"""Trainers that bring the whole objective to the optimiser and log what the mixture does."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTTrainer

from depthmix.attachment import find_mixture_norm
from depthmix.mixture import Mixture
from depthmix.objective import Step
from depthmix.redaction import hide_secrets

if TYPE_CHECKING:
    MixinBase = Trainer
else:
    MixinBase = object


class MoDETrainerMixin(MixinBase):
    """Brings MoDE's objective and its measurements to any `Trainer`.

    Put it before the trainer: `class MyTrainer(MoDETrainerMixin, SFTTrainer)`. A model without a
    mixture trains as it would without the mixin. A loss or gradient that is not finite stops the
    run before it can reach the weights, so the last checkpoint is a good one.

    Logged, per logging interval: `task_loss` (nats per label token, of what the mixture's
    `task_loss` names), `distillation_loss` (nats, reduced as the mixture's `reduction` says),
    `distillation_share` (its weighted part of the loss, 0 to 1), `distillation_weight_per_token`
    (what a nat of divergence at a token weighs against a nat of its cross-entropy),
    `routing_entropy` (nats) and, over the label tokens, `routing_weight/layer_<i>` (mean),
    `routing_variance/layer_<i>`, `routing_sparsity/layer_<i>` (share of tokens whose weight is
    below 1e-5) and, with `log_layer_losses`, `layer_loss/layer_<i>` (the layer's own cross-entropy
    in nats, mean). `SFTTrainer`'s own entropy and token accuracy are made by the pass that the
    objective replaces; they appear in evaluation only. With or without a mixture:
    `tokens_per_second` (input tokens of all processes, per second of training steps) and
    `memory_gib` (of the first process, in GiB: what the accelerator held at most so far, or on a
    CPU what the process holds now).

    Raises:
        RuntimeError: If one process is to drive several GPUs.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hide_secrets(self.args)
        self._steps: list[Step] = []
        self._pace = Pace()
        self.add_callback(self._pace)
        self.add_callback(FiniteGradients())
        norm = find_mixture_norm(self.model) if self.model is not None else None
        mixture = norm.active_mixture if norm is not None else None
        if mixture is None:
            return
        mixture.float()  # TRL makes every adapter bfloat16 over a quantised model
        if self.args.n_gpu > 1:
            raise RuntimeError(
                f"A mixture cannot be trained on {self.args.n_gpu} GPUs by one process; start "
                "one process per GPU with `accelerate launch`, or set CUDA_VISIBLE_DEVICES=0."
            )
        if mixture.top_k == 1 and mixture.config.num_routes > 1:
            warnings.warn(
                "`top_k=1` gives the router no gradient, since its only weight is one; train with "
                "more routes and set `top_k=1` afterwards, unless a fixed random router is meant.",
                stacklevel=2,
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss with `λ L_distill` in it exactly once.

        Where the loss is plain cross-entropy, the mixture's objective stands for the whole of it,
        on label positions alone. Any other loss of the host trainer gets the distillation term on
        top.
        """
        assert self.model is not None
        norm = find_mixture_norm(self.model)
        mixture = norm.active_mixture if norm is not None else None
        training = self.model.training
        if training:
            self._pace.count(inputs)
        if norm is None or mixture is None or not training:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss, outputs = result if isinstance(result, tuple) else (result, None)
        else:
            if num_items_in_batch is not None and self.model_accepts_loss_kwargs:
                inputs = {**inputs, "num_items_in_batch": num_items_in_batch}
            if self._is_cross_entropy(super().compute_loss):
                loss, outputs = self._mixture_loss(model, inputs)
            else:
                result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
                loss, outputs = result if isinstance(result, tuple) else (result, None)
            scale = self._num_ranks() if num_items_in_batch is not None else 1
            loss = loss + scale * self._missing_distillation(norm.objective.take(), mixture)
        if training and not torch.isfinite(loss):
            raise FloatingPointError(_diverged(f"loss became {float(loss)}", self.args))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the mixture's measurements beside the host trainer's."""
        if "loss" in logs:
            logs = {**logs, **self._pace.take(self.accelerator)}
            if self._steps:
                logs |= self._measurements()
        super().log(logs, start_time)

    def _is_cross_entropy(self, compute_loss: Callable[..., Any]) -> bool:
        """Tell whether the host trainer's loss is the cross-entropy of the labels and no more."""
        model: Any = self.model
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        return (
            getattr(compute_loss, "__func__", None)
            in (Trainer.compute_loss, SFTTrainer.compute_loss)
            and not getattr(parallelism, "sp_enabled", False)
            and self.label_smoother is None
            and self.compute_loss_func is None
            and getattr(self.args, "loss_type", "nll") == "nll"
            and not getattr(self, "aux_loss_enabled", False)
            and not getattr(model.config.get_text_config(), "output_router_logits", False)
        )

    def _mixture_loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Let the mixture's objective stand for the model's loss."""
        accumulated = "num_items_in_batch" in inputs
        if accumulated:
            num_batches = self.current_gradient_accumulation_steps * self._num_ranks()
            num_sequences = num_batches * len(next(iter(inputs.values())))
            inputs = {**inputs, "num_sequences_in_batch": num_sequences}
        outputs = model(**{**inputs, "mixture_loss": True, "use_cache": False})
        return outputs["loss"] * (self._num_ranks() if accumulated else 1), outputs

    def _num_ranks(self) -> int:
        """Ranks whose tokens the loss counts, whose averaging of gradients must be undone."""
        if not self.args.average_tokens_across_devices:
            return 1
        return self.accelerator.num_processes // self.get_tp_size()

    def _missing_distillation(self, step: Step | None, mixture: Mixture) -> Tensor | float:
        """Give the weighted distillation term where the host trainer's loss lacks it."""
        if step is None:
            if mixture.config.distillation_weight == 0:
                return 0.0
            raise RuntimeError(
                "The distillation loss needs `labels` in the model's forward pass, and this "
                "trainer keeps them back; drop `label_smoothing_factor` and `compute_loss_func`, "
                "or set `distillation_weight=0`."
            )
        self._steps.append(replace(step, missing=None))  # its graph must not outlive the step
        return 0.0 if step.missing is None else step.missing

    def _measurements(self) -> dict[str, float]:
        """Average over the label tokens since the last log, of all processes, and forget them.

        A process without any takes part with zeros, for the others wait for it.
        """
        steps, self._steps = self._steps, []
        last = steps[-1]
        totals = self._sum_up(
            step.num_tokens
            * torch.cat(
                [
                    torch.stack(
                        [
                            torch.ones_like(step.task_loss),
                            step.task_loss,
                            step.distillation_loss,
                            step.weight_per_token,
                            step.routing_entropy,
                        ]
                    ),
                    step.routing_weights,
                    step.routing_sparsity,
                    step.layer_losses,
                ]
            )
            for step in steps
        )
        num_tokens, num_routes = totals[0].clamp(min=1), len(last.late_layers)
        losses, weights, sparsity, layer_losses = (totals[1:] / num_tokens).split(
            [4, num_routes, num_routes, len(last.layer_losses)]
        )
        # Within steps and between them: float32 loses E[G²] - E[G]² where the weights hardly vary.
        spread = self._sum_up(
            step.num_tokens * (step.routing_variance + (step.routing_weights - weights).square())
            for step in steps
        )
        task, distillation, per_token, entropy = losses.tolist()
        weighted = last.distillation_weight * distillation
        by_layer = {
            "routing_weight": weights,
            "routing_variance": spread / num_tokens,
            "routing_sparsity": sparsity,
            "layer_loss": layer_losses,  # may be empty
        }
        return {
            "task_loss": task,
            "distillation_loss": distillation,
            "distillation_share": weighted / (task + weighted) if weighted else 0.0,
            "distillation_weight_per_token": per_token,
            "routing_entropy": entropy,
            **{
                f"{name}/layer_{layer}": value
                for name, values in by_layer.items()
                for layer, value in zip(last.late_layers, values.tolist(), strict=False)
            },
        }

    def _sum_up(self, rows: Iterable[Tensor]) -> Tensor:
        """Add up over steps and processes."""
        return self.accelerator.reduce(torch.stack(list(rows)).sum(0), reduction="sum")


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
            raise FloatingPointError(_diverged("gradients are not finite", args))


class MoDETrainer(MoDETrainerMixin, Trainer):
    """`transformers.Trainer` with MoDE's measurements in its log."""


class MoDESFTTrainer(MoDETrainerMixin, SFTTrainer):
    """`trl.SFTTrainer` with MoDE's whole objective, which the plain one would leave out."""


def _diverged(what: str, args: TrainingArguments) -> str:
    """Say what diverged, where the last good weights are, and what to try."""
    last = get_last_checkpoint(args.output_dir)
    kept = f"the last good checkpoint is {last}" if last else "no checkpoint was saved yet"
    return f"The {what}; {kept}. Lower `learning_rate`, or raise `warmup_steps`."
