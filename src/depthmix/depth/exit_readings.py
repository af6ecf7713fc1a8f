"""How sure exits are on held-out texts, and how often the model itself says the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from depthmix.depth.lesson import Row, check_adapter_kind, list_targets, project_onto, read_lesson
from depthmix.method.architecture import evaluating
from depthmix.method.exits import Exits
from depthmix.method.parts import find_parts

CHUNK_LOGITS = 2**24
"""Logits of one exit that are in memory at once: 64 MiB, and a handful of buffers of that size."""


@dataclass(frozen=True, kw_only=True)
class ExitReadings:
    """What exits predict on some tokens."""

    layers: tuple[int, ...]
    """Numbers of their layers, increasing."""

    confidences: Float[Tensor, "tokens exits"]
    """Probability of each exit's likeliest token, 0 to 1."""

    agreements: Bool[Tensor, "tokens exits"]
    """Whether that is also the model's own likeliest token."""


@torch.no_grad()
def read_exits(
    model: nn.Module,
    exits: Exits,
    sequences: Sequence[Row],
    *,
    batch_size: int = 16,
    final_norm: str | None = None,
    decoder_layers: str | None = None,
) -> ExitReadings:
    """Let exits and the model itself predict the label tokens of held-out texts.

    Args:
        model: The model that the exits were trained on.
        exits: The exits.
        sequences: Rows as `train_exits` takes them, which were not trained on.
        batch_size: Sequences that are run together.
        final_norm: As for `train_exits`.
        decoder_layers: As for `train_exits`.

    Returns:
        One entry per label token and exit, over the whole vocabulary, on the CPU.

    Raises:
        ValueError: If no token is to be predicted.
        TypeError: If it is no decoder-only language model.
    """
    check_adapter_kind(model)
    backbone, _ = find_parts(model, final_norm=final_norm, decoder_layers=decoder_layers)
    rows = [row for row in sequences if list_targets(row)]
    if not rows:
        raise ValueError(
            f"`sequences` must hold tokens to predict, and the {len(sequences)} held out hold "
            "none; a sequence needs two tokens at least, and labels other than -100 if it has any."
        )
    rows.sort(key=lambda row: len(row["input_ids"]))  # like with like in a batch
    confidences, agreements = [], []
    with evaluating(backbone.model):
        for start in range(0, len(rows), batch_size):
            lesson = read_lesson(backbone, rows[start : start + batch_size], exits.layers)
            for piece in lesson.split(max(CHUNK_LOGITS // backbone.vocab_size, 1)):
                own = project_onto(backbone, piece.answer, None).argmax(-1)
                best = []
                for layer in exits.layers:
                    place = next(iter(exits.parameters()), own).device
                    normed = exits(layer, piece.states[layer].to(place)).to(own.device)
                    best.append(project_onto(backbone, normed, None).softmax(-1).max(-1))
                confidences.append(torch.stack([one.values for one in best], -1).cpu())
                agreements.append(torch.stack([one.indices == own for one in best], -1).cpu())
    return ExitReadings(
        layers=exits.layers, confidences=torch.cat(confidences), agreements=torch.cat(agreements)
    )
