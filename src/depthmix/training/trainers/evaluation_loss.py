"""An evaluation's means over its label tokens, however they are divided into batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from depthmix.method.config import IGNORE_INDEX

if TYPE_CHECKING:
    MixinBase = Trainer
else:
    MixinBase = object


class TokenMeans:
    """Adds up an evaluation's loss, batch by batch.

    transformers averages the batches' own means, each weighed by its rows, and TRL does so with
    entropy and accuracy: the numbers then depend on the batch size wherever the rows' numbers of
    label tokens differ.
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._counts: list[Tensor] = []

    def __bool__(self) -> bool:
        return bool(self._counts)

    def add(
        self, loss: Float[Tensor, ""], num_tokens: Int[Tensor, ""], num_averaged: Tensor
    ) -> None:
        """Add one batch of this process.

        Args:
            loss: Sum of the batch's losses over `num_averaged`, in nats.
            num_tokens: Label tokens of the batch; without any it counts nothing.
            num_averaged: What the sum was divided by.
        """
        total = (loss * num_averaged).float()
        self._sums.append(torch.where(num_tokens > 0, total, torch.zeros_like(total)))
        self._counts.append(num_tokens)

    def reduce(
        self, reduce: Callable[[Tensor], Tensor]
    ) -> tuple[float | None, Int[Tensor, " batches"]]:
        """Average over all batches of all processes.

        Args:
            reduce: Adds up a tensor over processes.

        Returns:
            The mean loss in nats per label token, `None` without a token, and the label tokens of
            each batch.
        """
        counts = reduce(torch.stack(self._counts))
        total = reduce(torch.stack(self._sums).sum())
        num_tokens = int(counts.sum())
        return float(total) / num_tokens if num_tokens else None, counts


def without_repeats(
    labels: Int[Tensor, "batch seq"], *, rank: int, num_rows: int
) -> Int[Tensor, "batch seq"]:
    """Ignore the rows that only fill up the last batch of several processes.

    Args:
        labels: This process's rows.
        rank: The process's place among those that share the batch.
        num_rows: Rows of the batch over all processes that are in the data.

    Returns:
        The labels, `IGNORE_INDEX` in every row from `num_rows` on.
    """
    rows = torch.arange(len(labels), device=labels.device) + rank * len(labels)
    return labels.masked_fill((rows >= num_rows)[:, None], IGNORE_INDEX)


class TokenMeanEvaluation(MixinBase):
    """Makes the evaluation of any `Trainer` a mean over label tokens, where its loss is one.

    Losses of another kind, and losses made by `compute_loss_func`, stay the host trainer's.
    """

    _scored: TokenMeans | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the host trainer's loss, and keep it where it is an evaluation's."""
        inputs, labels = self._to_be_scored(inputs)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if labels is not None:
            loss = result[0] if isinstance(result, tuple) else result
            self._score(loss, labels, num_items_in_batch)
        return result

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate, with means over label tokens where the host trainer averages batches."""
        self._scored = scored = TokenMeans()
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self._scored = None
        if not scored:
            return output
        loss, counts = scored.reduce(self._sum_up)
        key = f"{metric_key_prefix}_loss"
        if loss is not None and output.metrics is not None and key in output.metrics:
            output.metrics[key] = loss
        own = getattr(self, "_metrics", {}).get("eval", {})  # where `SFTTrainer` has its own
        for name in ("entropy", "mean_token_accuracy"):
            if loss is not None and len(own.get(name, ())) == len(counts):
                by_batch = torch.tensor(own[name], dtype=torch.float64) * counts.cpu()
                own[name] = [float(by_batch.sum() / counts.sum())]
        return output

    def _find_host(self, method: str) -> type:
        """Find the class whose method it is, the first behind the mixins."""
        order = type(self).__mro__
        behind = order[order.index(TokenMeanEvaluation) + 1 :]
        return next(base for base in behind if method in vars(base))

    @property
    def _has_plain_loss(self) -> bool:
        """Whether `Trainer` or `SFTTrainer` themselves make the loss."""
        return self._find_host("compute_loss") in (Trainer, SFTTrainer)

    def _to_be_scored(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        """Give the labels of an evaluation's batch whose loss is a mean over their tokens.

        On several processes the last batch is filled up with rows that were there already; their
        labels are ignored, but for batches without padding, whose rows cannot be told apart.
        """
        labels = inputs.get("labels")
        if (
            self._scored is None
            or not isinstance(labels, Tensor)
            or labels.dim() != 2
            or not self._has_plain_loss
            or self.compute_loss_func is not None
            or not (
                isinstance(self, SFTTrainer)
                or getattr(self.model, "loss_function", None) is ForCausalLMLoss
            )
        ):
            return inputs, None
        state, ranks = self.accelerator.gradient_state, self.accelerator.num_processes
        filled = ranks > 1 and state.end_of_dataloader and state.remainder > 0
        if filled and self.get_tp_size() == 1 and "position_ids" not in inputs:
            rank = self.accelerator.process_index
            labels = without_repeats(labels, rank=rank, num_rows=state.remainder)
        return {**inputs, "labels": labels}, labels

    def _score(self, loss: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> None:
        """Add a batch's loss to the evaluation's, as a sum over its label tokens."""
        assert self._scored is not None
        num_tokens = (labels[:, 1:] != IGNORE_INDEX).sum()
        num_averaged = num_tokens
        if num_items_in_batch is not None and self.model_accepts_loss_kwargs:
            num_averaged = (
                torch.as_tensor(num_items_in_batch, device=loss.device) / self._num_ranks()
            )
        self._scored.add(loss.detach(), num_tokens, num_averaged)

    def _num_ranks(self) -> int:
        """Ranks whose tokens the loss counts, whose averaging of gradients must be undone."""
        if not self.args.average_tokens_across_devices:
            return 1
        return self.accelerator.num_processes // self.get_tp_size()

    def _sum_up(self, values: Tensor) -> Tensor:
        """Add up over processes."""
        return self.accelerator.reduce(values, reduction="sum")
