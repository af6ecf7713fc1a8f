"""A probe: how well each layer of a pretrained model predicts by itself, before any training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from depthmix.depth.capture_all import capture_all
from depthmix.files.html import to_html
from depthmix.loss.terms import divergence, label_positions
from depthmix.method.architecture import evaluating, find_backbone
from depthmix.method.backbone import Backbone
from depthmix.method.config import IGNORE_INDEX
from depthmix.method.norm import find_mixture_norm

CHUNK_LOGITS = 2**24
"""Logits of one layer that are in memory at once: 64 MiB, and a handful of buffers of that size."""


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens, and how sure it is."""

    mean: float
    """Mean over all tokens."""

    error: float | None
    """Standard error of `mean`, over sequences; `None` for a single one."""


@dataclass(frozen=True, kw_only=True)
class LayerReading:
    """What one layer predicts through the pretrained norm and head (the logit lens)."""

    layer: int
    """Number of the layer, from 1 to `num_hidden_layers`."""

    jsd: Estimate
    """Jensen-Shannon divergence to the final layer's prediction, nats per token, at most ln 2."""

    nll: Estimate
    """Cross-entropy of the next token, nats per token."""

    agreement: Estimate
    """Share of tokens whose likeliest prediction is the final layer's, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What every layer predicts on the same tokens; `str` makes a printable table."""

    layers: tuple[LayerReading, ...]
    """One reading per layer, the first layer first and the final one last."""

    num_tokens: int
    """Tokens that were predicted."""

    num_sequences: int
    """Sequences that hold them."""

    @property
    def rows(self) -> tuple[tuple[str, str, str, str], ...]:
        """A printable table: header, then a row for each layer."""
        return (
            ("layer", "JSD to the final", "nll", "agreement, %"),
            *(
                (
                    str(reading.layer),
                    _show(reading.jsd, digits=3),
                    _show(reading.nll, digits=2),
                    _show(reading.agreement, digits=1, scale=100.0),
                )
                for reading in self.layers
            ),
        )

    def __str__(self) -> str:
        lines = [f"{a:<7}{b:>18}{c:>18}{d:>18}" for a, b, c, d in self.rows]
        return "\n".join([*lines, self._note])

    def _repr_html_(self) -> str:
        """Show the table in a notebook."""
        return to_html(self.rows[0], self.rows[1:], notes=[self._note])

    @property
    def _note(self) -> str:
        return (
            f"Nats per token, ± one standard error; {self.num_tokens:,} tokens of "
            f"{self.num_sequences:,} sequences."
        )


@torch.no_grad()
def probe_layers(
    model: nn.Module,
    sequences: Sequence[Mapping[str, Sequence[int]]],
    *,
    batch_size: int = 8,
    final_norm: str | None = None,
    decoder_layers: str | None = None,
) -> Probe:
    r"""Read out every layer of a model through its pretrained norm and head, and compare.

    Layer i predicts $P_i = \mathrm{softmax}\,\phi(N_p(h_i))$ (the logit lens). All layers are read
    in one forward pass per batch; logits are built layer by layer on pieces of the tokens, with
    softmax and divergence in float32. A standard error is that of a ratio of sums over sequences,
    whose tokens are not independent of each other.

    Args:
        model: A decoder-only language model without a mixture, on the device where it is to run;
            plain adapters count as part of it.
        sequences: Rows with `input_ids`, and `labels` (`IGNORE_INDEX` where a token does not count)
            if only some of the tokens are to be predicted; without them, all but the first are.
        batch_size: Sequences that are run together.
        final_norm: Full name of the final norm, where it cannot be found by itself.
        decoder_layers: Full name of the `ModuleList` of layers, where it cannot be found by itself.

    Returns:
        The readings.

    Raises:
        ValueError: If no token is to be predicted, the model has a mixture, or a part of it cannot
            be found.
        TypeError: If it is no decoder-only language model.
    """
    if find_mixture_norm(model) is not None:
        raise ValueError(
            "`model` must be the pretrained model without a mixture, whose layers have no norms of "
            "their own yet; call `detach(model)` or `unload()` first."
        )
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    backbone = find_backbone(model, final_norm=final_norm, decoder_layers=decoder_layers)
    counts = torch.zeros(len(sequences), dtype=torch.float64)
    sums = torch.zeros(backbone.num_hidden_layers, 3, len(sequences), dtype=torch.float64)
    lengths = [len(sequence["input_ids"]) for sequence in sequences]
    order = sorted(range(len(sequences)), key=lengths.__getitem__)  # like with like in a batch
    order = [row for row in order if lengths[row] > 1]
    with evaluating(backbone.model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            for owners, measures in _read_batch(backbone, [sequences[row] for row in rows]):
                places = torch.tensor(rows)[owners]
                sums.index_add_(2, places, measures)
                counts.index_add_(0, places, torch.ones_like(measures[0, 0]))
    if not counts.any():
        raise ValueError(
            f"`sequences` must hold tokens to predict, and the {len(sequences)} given hold none; "
            "a sequence needs two tokens at least, and labels other than -100 if it has any."
        )
    return _summarise(sums, counts)


def _read_batch(
    backbone: Backbone, batch: Sequence[Mapping[str, Sequence[int]]]
) -> Iterator[tuple[Int[Tensor, " tokens"], Float[Tensor, "layers measures tokens"]]]:
    """Give the three measures of each layer on some tokens, and whose tokens they are."""
    rows = [torch.tensor(row["input_ids"], dtype=torch.long) for row in batch]
    labelled = [torch.tensor(row.get("labels", row["input_ids"])) for row in batch]
    input_ids = pad_sequence(rows, batch_first=True)
    labels = pad_sequence(labelled, batch_first=True, padding_value=IGNORE_INDEX)
    attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    states = capture_all(backbone, input_ids, attention_mask=attention_mask).states
    num_together = max(CHUNK_LOGITS // backbone.vocab_size, 1)
    pieces = (indices.split(num_together) for indices in label_positions(labels))
    for places, targets in zip(*pieces, strict=True):
        final = _log_probs(backbone, states[backbone.num_hidden_layers], places)
        measures = [
            _measure(_log_probs(backbone, state, places), final, targets.to(final.device))
            for _, state in sorted(states.items())
        ]
        yield places // input_ids.size(1), torch.stack(measures).cpu().double()


def _log_probs(
    backbone: Backbone, state: Float[Tensor, "batch seq hidden"], places: Int[Tensor, " tokens"]
) -> Float[Tensor, "tokens vocab"]:
    """Predict from a residual stream at places of the flattened batch, in float32."""
    normed = backbone.final_norm(state.flatten(0, 1)[places.to(state.device)])
    logits = backbone.project(normed.to(backbone.head_weight.device))
    return backbone.cap(logits.float()).log_softmax(-1)


def _measure(
    log_probs: Float[Tensor, "tokens vocab"],
    final: Float[Tensor, "tokens vocab"],
    targets: Int[Tensor, " tokens"],
) -> Float[Tensor, "measures tokens"]:
    """Compare a layer's prediction with the final layer's and with what came."""
    return torch.stack(
        [
            divergence(log_probs, final, "jsd").clamp_min(0),
            F.nll_loss(log_probs, targets, reduction="none"),
            (log_probs.argmax(-1) == final.argmax(-1)).to(final.dtype),
        ]
    )


def _summarise(
    sums: Float[Tensor, "layers measures sequences"], counts: Float[Tensor, " sequences"]
) -> Probe:
    """Turn sums per sequence into means over tokens with their errors."""
    num_tokens, num_sequences = counts.sum(), int((counts > 0).sum())
    means = sums.sum(-1) / num_tokens
    residuals = sums - means[..., None] * counts
    errors = residuals.square().sum(-1).sqrt() / num_tokens
    if num_sequences > 1:
        errors *= math.sqrt(num_sequences / (num_sequences - 1))
    readings = []
    for layer, (mean, error) in enumerate(zip(means.tolist(), errors.tolist(), strict=True), 1):
        jsd, nll, agreement = (
            Estimate(value, spread if num_sequences > 1 else None)
            for value, spread in zip(mean, error, strict=True)
        )
        readings.append(LayerReading(layer=layer, jsd=jsd, nll=nll, agreement=agreement))
    return Probe(layers=tuple(readings), num_tokens=int(num_tokens), num_sequences=num_sequences)


def _show(estimate: Estimate, *, digits: int, scale: float = 1.0) -> str:
    """Write a mean and its error."""
    shown = f"{scale * estimate.mean:.{digits}f}"
    if estimate.error is None:
        return shown
    return f"{shown} ± {scale * estimate.error:.{digits}f}"
