"""The three ways of a training pass: its loss replaced, with terms on top, or left alone."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from depthmix.loss.batch import MixtureLoss, mixture_loss
from depthmix.loss.measurements import Step, measure
from depthmix.loss.term_names import name_terms
from depthmix.method.backbone import Backbone
from depthmix.method.config import MixtureConfig
from depthmix.method.mixture import Routes

NO_LABELS = (
    "The {loss} is left out of a training pass without `labels`, as with "
    "`label_smoothing_factor`, `compute_loss_func` or a trainer that keeps them for its own loss; "
    "give them to the model, or {remedy}."
)
"""Why terms are left out of a pass that has no label tokens to take them over."""

LOG_PROBS = (
    "This trainer leaves the {loss} out, because it makes its own loss from "
    "log-probabilities; put `MoDETrainerMixin` before it, as in `class "
    "MyTrainer(MoDETrainerMixin, DPOTrainer)` (`MoDESFTTrainer` is that for `SFTTrainer`), or "
    "{remedy}."
)
"""Why terms are left out of a pass through TRL's fused head."""


@dataclass(frozen=True, kw_only=True)
class Way(ABC):
    """What becomes of the loss of one training pass; chosen when the pass begins."""

    backbone: Backbone
    """The model's head, scale and soft cap."""

    labels: Tensor | None
    """Token ids, `IGNORE_INDEX` where a token does not count; None for a pass without labels."""

    shifted: bool
    """Whether the labels are already shifted by one."""

    num_items_in_batch: Tensor | int | None
    """Label tokens of the whole accumulated batch, where the pass knows them."""

    steps: list[Step | None] | None
    """Where a trainer collects what its passes measure; None where nobody collects."""

    @abstractmethod
    def finish(self, output: Any, routes: Routes | None) -> Any:
        """Put the loss where the caller looks for it.

        Args:
            output: What the model made of the pass.
            routes: What the mixture made of it; None where it took no part.

        Returns:
            The model's output, or what stands for it.
        """

    def _compute_loss(self, routes: Routes, labels: Tensor, **options: Any) -> MixtureLoss:
        return mixture_loss(
            routes,
            self.backbone,
            labels,
            num_items_in_batch=self.num_items_in_batch,
            shifted=self.shifted,
            **options,
        )

    def _collect(self, routes: Routes, loss: MixtureLoss, *, missing: Tensor | None) -> None:
        if self.steps is not None:
            is_share = self.num_items_in_batch is not None
            self.steps.append(measure(routes, loss, missing=missing, is_share=is_share))


@dataclass(frozen=True, kw_only=True)
class ReplacedLoss(Way):
    """The mixture's objective stands for the whole loss, and no logits are built."""

    num_sequences_in_batch: int | None
    """Sequences of the whole accumulated batch."""

    as_tuple: bool
    """Whether the caller wants a tuple."""

    def finish(self, output: Any, routes: Routes | None) -> Any:
        """Give the objective for the loss, and no logits."""
        if routes is None or self.labels is None:
            raise RuntimeError(
                "`mixture_loss=True` needs `labels`, a mixture that is active, training mode and "
                "gradients; leave it out of any other pass."
            )
        loss = self._compute_loss(
            routes, self.labels, num_sequences_in_batch=self.num_sequences_in_batch
        )
        self._collect(routes, loss, missing=None)
        output = type(output)(**{**output, "loss": loss.total, "logits": None})
        return output.to_tuple() if self.as_tuple else output


@dataclass(frozen=True, kw_only=True)
class AddedTerm(Way):
    """The model keeps its loss and logits, and the other terms come on top."""

    labels: Tensor

    def finish(self, output: Any, routes: Routes | None) -> Any:
        """Add the terms to the loss, or hand them to the trainer that collects them.

        Exits learn from the model's own prediction alone: another loss may have labels that are
        not what is to be said, such as the answers that DPO's rejects.
        """
        if routes is None:
            return output
        _check_task_loss(routes.mixture.config)
        loss = self._compute_loss(routes, self.labels, exit_distillation=1.0)
        term = loss.total - loss.task
        self._collect(routes, loss, missing=term)
        if self.steps is not None:
            return output
        if isinstance(output, tuple):
            return (output[0] + term, *output[1:])
        output["loss"] = output["loss"] + term
        return output


@dataclass(frozen=True, kw_only=True)
class TrainersLoss(Way):
    """The trainer makes the loss from what the model gives, and other terms have no place in it."""

    def finish(self, output: Any, routes: Routes | None) -> Any:
        """Leave the output alone, and say what is missing."""
        if routes is None:
            return output
        _check_task_loss(routes.mixture.config)
        if self.steps is not None:
            self.steps.append(None)
        elif routes.mixture.config.has_term:
            names = name_terms(routes.mixture.config)
            message = NO_LABELS if self.labels is None else LOG_PROBS
            warnings.warn(message.format(loss=names.loss, remedy=names.remedy), stacklevel=2)
        return output


def _check_task_loss(config: MixtureConfig) -> None:
    """Refuse another task loss than the ensemble's, which is the only one that a model has."""
    if config.task_loss != "ensemble":
        raise ValueError(
            "`task_loss` must be 'ensemble' where a training pass keeps its own loss or "
            f"logits, got {config.task_loss!r}; train with `labels` and plain "
            "cross-entropy, by `MoDESFTTrainer` instead of TRL's own, without label smoothing, "
            "a loss function or expert routers' loss."
        )
