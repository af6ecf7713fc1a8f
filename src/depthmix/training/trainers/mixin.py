"""Trainers that bring the whole objective to the optimiser and log what the mixture does."""

from __future__ import annotations

import warnings
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from trl import SFTTrainer

from depthmix.adapters.calls import without_old_name
from depthmix.libraries.releases import says_it_is_scaled
from depthmix.loss.measurements import Part, Step, log_entries
from depthmix.loss.term_names import name_terms
from depthmix.method.config import MixtureConfig
from depthmix.method.mixture import Mixture
from depthmix.method.norm import active_mixture, find_mixture_norm
from depthmix.options.secrets import hide_secrets
from depthmix.training.trainers.checkpoints import find_last_checkpoint
from depthmix.training.trainers.evaluation_loss import TokenMeanEvaluation
from depthmix.training.trainers.learning_rates import PartLearningRates
from depthmix.training.trainers.reference import check_reference, check_reference_options
from depthmix.training.trainers.resumption import Resumption
from depthmix.training.trainers.watch import FiniteGradients, Pace, say_diverged


class MoDETrainerMixin(PartLearningRates, TokenMeanEvaluation):
    """Brings MoDE's objective and its measurements to any `Trainer`.

    Put it before the trainer: `class MyTrainer(MoDETrainerMixin, DPOTrainer)`. Where the trainer's
    loss is the cross-entropy of the labels, the mixture's objective stands for it; any other loss
    (DPO's, KTO's, GRPO's, RLOO's) gets the distillation term on top, over the tokens whose
    log-probabilities the trainer asks for, if it passes them to the model as `labels`. One that
    does not (ORPO, CPO, GKD) trains a mixture with `distillation_weight=0`. A model without a
    mixture trains as it would without the mixin. A loss or gradient that is not finite stops the
    run before it can reach the weights, so the last checkpoint is a good one. A run that goes on
    from a checkpoint logs what it would have logged without the interruption, and trains no step
    beyond its last.

    Logged, per logging interval: `task_loss` (nats per label token, of what the mixture's
    `task_loss` names; under another loss than cross-entropy only a measurement),
    `distillation_loss` (nats, reduced as the mixture's `reduction` says), `distillation_share` (the
    weighted term beside the whole loss that is minimised, 0 to 1; where the rest of it may be
    negative, its magnitude counts), `distillation_weight_per_token` (what a nat of divergence at a
    token weighs against a nat of its cross-entropy), `routing_entropy` (nats) and, over the label
    tokens, `routing_weight/layer_<i>` (mean), `routing_variance/layer_<i>`,
    `routing_sparsity/layer_<i>` (share of tokens whose weight is below 1e-5) and, with
    `log_layer_losses`, `layer_loss/layer_<i>` (the layer's own cross-entropy in nats, mean). Of
    exits that are trained along: `exit_loss/layer_<i>` (the exit's cross-entropy in nats, mean) and
    `exit_agreement/layer_<i>` (share of tokens of which its likeliest entry is the model's own),
    both among the entries that their loss is on.
    `SFTTrainer`'s own entropy and token accuracy are made by the pass that the objective replaces;
    they appear in evaluation only. With or without a mixture: `tokens_per_second` (input tokens of
    all processes, per second of training steps, where the batches have them) and `memory_gib` (of
    the first process, in GiB: what the accelerator held at most so far, or on a CPU what the
    process holds now).

    An evaluation loss that is a cross-entropy of labels is the mean over all label tokens, and so
    are `SFTTrainer`'s entropy and token accuracy: they do not depend on the evaluation's batches.

    Raises:
        TypeError: If a class names the mixin after the trainer.
        ValueError: If TRL would take something else than the base for the reference of an attached
            mixture.
        RuntimeError: If one process is to drive several GPUs.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(MoDETrainerMixin):
            host = next(base for base in cls.__bases__ if issubclass(base, Trainer)).__name__
            raise TypeError(
                f"`MoDETrainerMixin` must come before the trainer, which would never call it; "
                f"write `class {cls.__name__}(MoDETrainerMixin, {host})`."
            )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = signature(super().__init__).bind_partial(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}  # where a class between hands them on
        check_reference_options(given)
        with without_old_name():
            super().__init__(*args, **kwargs)
        hide_secrets(self.args)
        if given.get("ref_model") is None:
            check_reference(self.model, getattr(self, "ref_model", None), self._host)
        self._steps: list[Step] = []
        self._parts: list[Part] = []
        self._asked = False
        self._pace = Pace()
        self.add_callback(self._pace)
        self.add_callback(FiniteGradients())
        self._resumption = Resumption(self)
        self.add_callback(self._resumption)
        mixture = active_mixture(self.model) if self.model is not None else None
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

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train, from a checkpoint where one is given: a folder, or True for the newest one."""
        if resume_from_checkpoint is True:
            found = find_last_checkpoint(Path(str(self.args.output_dir)))
            resume_from_checkpoint = str(found) if found is not None else True
        if isinstance(resume_from_checkpoint, str):
            self._resumption.checkpoint = Path(resume_from_checkpoint)
        else:
            self._resumption.checkpoint = None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Leave out an epoch that begins after the last step, of which one would be trained."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        """Also save what else a process needs to go on."""
        super()._save_rng_state(output_dir)
        self._resumption.save(Path(output_dir))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss with the objective's other terms in it exactly once.

        Where the loss is plain cross-entropy, the mixture's objective stands for the whole of it,
        on label positions alone. Any other loss of the host trainer gets the other terms on top.
        """
        assert self.model is not None
        norm = find_mixture_norm(self.model)
        mixture = norm.active_mixture if norm is not None else None
        training = self.model.training
        self._asked = True
        if training:
            self._pace.count(inputs)
        host = super().compute_loss
        if norm is None or mixture is None or not training:
            result = host(model, inputs, return_outputs, num_items_in_batch)
            loss, outputs = result if isinstance(result, tuple) else (result, None)
        else:
            counted = num_items_in_batch is not None and self.model_accepts_loss_kwargs
            if counted and self._has_plain_loss:
                inputs = {**inputs, "num_items_in_batch": num_items_in_batch}
            with norm.objective.collecting() as steps:
                if self._is_cross_entropy():
                    loss, outputs = self._mixture_loss(model, inputs)
                else:
                    result = host(model, inputs, return_outputs, num_items_in_batch)
                    loss, outputs = result if isinstance(result, tuple) else (result, None)
            loss = self._with_terms(loss, steps, mixture, num_items_in_batch)
        if training and not torch.isfinite(loss):
            raise FloatingPointError(say_diverged(f"loss became {float(loss.detach())}", self.args))
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Take the host trainer's step, and refuse one that has no place for other terms."""
        self._asked = False
        loss = super().training_step(*args, **kwargs)
        mixture = active_mixture(self.model) if self.model is not None else None
        if mixture is not None and mixture.config.has_term and not self._asked:
            host, names = self._find_host("training_step").__name__, name_terms(mixture.config)
            raise RuntimeError(
                f"{names.demand} in {host}, which makes its loss without `compute_loss`, where the "
                f"{names.loss} joins; {names.remedy}."
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the mixture's measurements beside the host trainer's."""
        if "train_loss" in logs and self._resumption.is_whole:
            # In place: `Trainer` returns the same metrics, and means only what this call has seen.
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        if "loss" in logs:
            logs = {**logs, **self._pace.take(self.accelerator)}
            if self._steps:
                logs |= log_entries(self._steps, self._parts, self._sum_up)
                self._steps, self._parts = [], []
        super().log(logs, start_time)

    def _is_cross_entropy(self) -> bool:
        """Tell whether the host trainer's loss is the cross-entropy of the labels and no more."""
        model: Any = self.model
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        return (
            self._has_plain_loss
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

    def _with_terms(
        self,
        loss: Tensor,
        steps: list[Step | None],
        mixture: Mixture,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        """Add the weighted terms where the host trainer's loss lacks them, and keep them.

        They are scaled as the host trainer scales its loss: to a share of the accumulated batch,
        or to a micro-batch's mean that `Trainer` divides by the number of them afterwards.
        """
        labelled = [step for step in steps if step is not None]
        missing = [step.missing for step in labelled if step.missing is not None]
        config = mixture.config
        if config.has_term and (not labelled or len(labelled) < len(steps)):
            raise RuntimeError(self._why_no_term(config, steps))
        if config.has_term and len(missing) > 1:
            names = name_terms(config)
            raise RuntimeError(
                f"{names.demand} where one loss takes {len(missing)} passes with labels, as "
                f"{self._host}'s does, for each has its own mean; {names.remedy}."
            )
        if not labelled:
            return loss
        is_share, scale = labelled[0].is_share, 1.0
        if is_share:
            scale *= self._num_ranks()
        if is_share != self._is_scaled(num_items_in_batch):
            scale *= self.current_gradient_accumulation_steps ** (1 if is_share else -1)
        if missing and config.has_term:
            loss = loss + scale * missing[0].to(loss.device)
        weighted = scale * labelled[0].weighted
        self._steps += [replace(step, missing=None) for step in labelled]  # nor may graphs outlive
        self._parts.append(Part(weighted, loss.detach().to(weighted.device) - weighted))
        return loss

    def _is_scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Tell whether `Trainer` takes the loss as a share of the accumulated batch already."""
        stated = says_it_is_scaled(self)
        if stated is not None:
            return stated
        counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return counted or self.compute_loss_func is not None

    @property
    def _host(self) -> str:
        """The name of the class whose loss it is."""
        return self._find_host("compute_loss").__name__

    def _why_no_term(self, config: MixtureConfig, steps: list[Step | None]) -> str:
        """Say why there is no term to add."""
        plain, names = self._has_plain_loss, name_terms(config)
        if plain and self.label_smoother is not None:
            cause, remedy = "`label_smoothing_factor` keeps them back", "leave that out"
        elif plain and self.compute_loss_func is not None:
            cause, remedy = "`compute_loss_func` keeps them back", "leave that out"
        elif steps:
            cause, remedy = f"{self._host} calls the model without them", "pass them"
        else:
            cause, remedy = f"{self._host} never calls the whole model in training", "let it"
        return (
            f"The {names.loss} needs `labels` in the model's forward pass, and {cause}; "
            f"{remedy}, or {names.remedy}."
        )


class MoDETrainer(MoDETrainerMixin, Trainer):
    """`transformers.Trainer` with MoDE's measurements in its log."""


class MoDESFTTrainer(MoDETrainerMixin, SFTTrainer):
    """`trl.SFTTrainer` with MoDE's whole objective; the plain one leaves the distillation out."""
