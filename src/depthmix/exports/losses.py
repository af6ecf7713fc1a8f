"""What an export without the mixture loses against the run, on given records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from depthmix.adapters.readout import reading_out
from depthmix.data.records import load_records
from depthmix.data.spec import Template
from depthmix.data.tokens import to_token_sequences
from depthmix.depth.lesson import Row, list_targets
from depthmix.method.config import IGNORE_INDEX
from depthmix.method.norm import active_mixture
from depthmix.models.loading import load_tokenizer
from depthmix.models.spec import ModelSpec
from depthmix.models.template import recall_template

MAX_LENGTH = 1024
"""Tokens of a record that are read, from its start."""


@dataclass(frozen=True, kw_only=True)
class ExportLoss:
    """What one depth by itself gives up; `str` makes a line of it."""

    num_records: int
    """Records that were read."""

    num_tokens: int
    """Tokens of their completions."""

    run_loss: float
    """The run's cross-entropy on them, nats per token."""

    own_loss: float
    """The export's."""

    run_accuracy: float
    """Share of these tokens that the run says first, 0 to 1."""

    own_accuracy: float
    """Share of them that the export says first."""

    agreement: float
    """Share of them on which both say the same first."""

    def __str__(self) -> str:
        lost = self.own_loss - self.run_loss
        return (
            f"Lost on {self.num_records:,} records ({self.num_tokens:,} tokens): {lost:+.4f} nats "
            f"a token ({self.own_loss:.4f} where the run has {self.run_loss:.4f}); the next token "
            f"is right in {self.own_accuracy:.1%} ({self.run_accuracy:.1%}), and the same as the "
            f"run's in {self.agreement:.1%}."
        )


@contextmanager
def answering_alone(model: nn.Module, layer: int, *, by_pretrained_norm: bool) -> Iterator[None]:
    """Let one late layer of a run answer for a while, as its export is to do.

    Args:
        model: The run.
        layer: One of its late layers, or the final one of a run without a mixture.
        by_pretrained_norm: Through the pretrained final norm, also where the layer has its own.
    """
    mixture = active_mixture(model)
    own = None
    if mixture is not None and by_pretrained_norm and str(layer) in mixture.norms:
        own = mixture.norms.pop(str(layer))
    try:
        with reading_out(model, layer):
            yield
    finally:
        if mixture is not None and own is not None:
            mixture.norms[str(layer)] = own


def read_rows(spec: ModelSpec, data: str, *, template: Template | None, limit: int) -> list[Row]:
    """Read records as tokens, as the run's own training had them.

    Args:
        spec: The run.
        data: A file or a data set, as `data.eval` takes it.
        template: How records become text; `None` takes the run's own.
        limit: Records that are read at most, from the start.

    Returns:
        Rows with something to predict in each.

    Raises:
        ValueError: If a record does not fit, or nothing is left to predict.
        OSError: If there are no such records.
    """
    tokenizer, recalled = load_tokenizer(spec), recall_template(spec, template)
    rows = to_token_sequences(
        load_records(data, limit=limit),
        recalled.template,
        tokenizer,
        max_length=MAX_LENGTH,
        variables=recalled.variables,
    )
    kept: list[Row] = [row for row in rows if list_targets(row)]
    if not kept:
        raise ValueError(
            f"`data` must hold records with something to predict in their first {MAX_LENGTH:,} "
            f"tokens, and none of {len(rows)} in {data} has; name other records."
        )
    return kept


@torch.no_grad()
def measure_loss(
    model: nn.Module, rows: Sequence[Row], layer: int, *, by_pretrained_norm: bool
) -> ExportLoss:
    """Read records by a run as it predicts, and by one of its layers alone.

    Args:
        model: The run.
        rows: From `read_rows`.
        layer: The layer that is to answer alone.
        by_pretrained_norm: As for `answering_alone`.

    Returns:
        What is lost.
    """
    sums, num_tokens = torch.zeros(5, dtype=torch.float64), 0
    for row in rows:
        labels = torch.tensor([row.get("labels", row["input_ids"])])[0, 1:]
        counted = labels != IGNORE_INDEX
        labels = labels[counted]
        run = _predict(model, row)[counted]
        with answering_alone(model, layer, by_pretrained_norm=by_pretrained_norm):
            own = _predict(model, row)[counted]
        first, second = run.argmax(-1), own.argmax(-1)
        found = [
            *(-one.gather(-1, labels[:, None]).sum() for one in (run, own)),
            *((one == labels).sum() for one in (first, second)),
            (first == second).sum(),
        ]
        sums += torch.stack([one.double() for one in found])
        num_tokens += len(labels)
    means = (sums / num_tokens).tolist()
    return ExportLoss(
        num_records=len(rows),
        num_tokens=num_tokens,
        run_loss=means[0],
        own_loss=means[1],
        run_accuracy=means[2],
        own_accuracy=means[3],
        agreement=means[4],
    )


def _predict(model: nn.Module, row: Row) -> Tensor:
    """Give the log-probabilities of each next token, (T - 1, vocab), on the CPU."""
    device = next(model.parameters()).device
    input_ids = torch.tensor([row["input_ids"]], device=device)
    logits = model(input_ids=input_ids, use_cache=False).logits
    return logits[0, :-1].float().log_softmax(-1).cpu()
