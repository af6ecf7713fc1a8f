"""What exits learn from one batch: states of a frozen model, its own prediction, and the labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from depthmix.depth.capture_all import capture_all
from depthmix.loss.terms import label_positions
from depthmix.method.backbone import UNQUANTISED, Backbone
from depthmix.method.config import IGNORE_INDEX

Row = Mapping[str, Sequence[int]]
"""A sequence: `input_ids`, and `labels` if only some of its tokens are to be predicted."""


@dataclass(frozen=True)
class Lesson:
    """What exits learn from one batch: tokens that predict a label, and nothing of the others."""

    states: dict[int, Float[Tensor, "tokens hidden"]]
    """Residual stream below each exit, by layer."""

    answer: Float[Tensor, "tokens hidden"]
    """What the model itself hands to the head."""

    targets: Int[Tensor, " tokens"]
    """Token that comes next."""

    def split(self, num_tokens: int) -> Iterator[Lesson]:
        """Cut into pieces of at most `num_tokens` tokens."""
        for start in range(0, len(self.targets), num_tokens):
            piece = slice(start, start + num_tokens)
            states = {layer: state[piece] for layer, state in self.states.items()}
            yield Lesson(states, self.answer[piece], self.targets[piece])


def list_targets(row: Row) -> list[int]:
    """List the tokens that a sequence has to predict."""
    labels = row.get("labels", row["input_ids"])
    return [label for label in labels[1:] if label != IGNORE_INDEX]


def check_adapter_kind(model: nn.Module) -> None:
    """Refuse an adapter of which a pass through the decoder alone sees nothing.

    Raises:
        ValueError: If the active adapter puts tokens before the text, or acts from a token on.
    """
    if not isinstance(model, PeftModel):
        return
    for name in model.active_adapters:
        config = model.peft_config[name]
        if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
            raise ValueError(
                f"`model` must have an adapter that changes the decoder's own layers, and {name!r} "
                "changes what they are given (prompt learning, or an activated LoRA); use LoRA or "
                "another method without a prompt."
            )


@torch.no_grad()
def read_lesson(backbone: Backbone, batch: Sequence[Row], layers: Sequence[int]) -> Lesson:
    """Run the frozen model on some sequences, and keep what predicts a label.

    Args:
        backbone: The model's parts.
        batch: The sequences.
        layers: Numbers of the layers whose states are kept.

    Returns:
        The label tokens, on the device of the model's head.
    """
    ids = [torch.tensor(row["input_ids"], dtype=torch.long) for row in batch]
    labelled = [torch.tensor(row.get("labels", row["input_ids"])) for row in batch]
    labels = pad_sequence(labelled, batch_first=True, padding_value=IGNORE_INDEX)
    captured = capture_all(
        backbone,
        pad_sequence(ids, batch_first=True),
        attention_mask=pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        depths=layers,
    )
    places, targets = label_positions(labels)
    device = backbone.head_weight.device

    def take(state: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "tokens hidden"]:
        return state.flatten(0, 1)[places.to(state.device)].to(device)

    return Lesson(
        {layer: take(captured.states[layer]) for layer in layers},
        take(captured.answer),
        targets.to(device),
    )


def project_onto(
    backbone: Backbone,
    normed_states: Float[Tensor, "tokens hidden"],
    sampled: Int[Tensor, " sampled"] | None,
) -> Float[Tensor, "tokens sampled"]:
    """Give the logits of a part of the vocabulary, in float32.

    Args:
        backbone: The model's head, scale and soft cap.
        normed_states: What an exit or the final norm gives.
        sampled: Token ids; `None` for all of them by the head itself.
    """
    if sampled is None:
        dtype = backbone.head_dtype(normed_states.dtype)
        return backbone.cap(backbone.project(normed_states.to(dtype)).float())
    inner = getattr(backbone.decoder, "project_out", None)
    weights = inner.parameters() if isinstance(inner, nn.Module) else ()
    dtype = next((p.dtype for p in weights if p.dtype in UNQUANTISED), normed_states.dtype)
    taken = backbone.head_input(normed_states.to(dtype))
    bias = getattr(backbone.head, "bias", None)
    weight = backbone.head_weight.detach()[sampled].float()
    logits = F.linear(
        taken.float(), weight, None if bias is None else bias.detach()[sampled].float()
    )
    return backbone.cap(logits if backbone.logit_scale == 1 else logits * backbone.logit_scale)


def exit_loss(
    logits: Float[Tensor, "tokens sampled"],
    teacher_logits: Float[Tensor, "tokens sampled"],
    targets: Int[Tensor, " tokens"],
    *,
    distillation: float,
) -> Float[Tensor, " tokens"]:
    r"""Measure how far an exit is from the label and from the model's own prediction.

    Computes $(1 - \kappa)\,\mathrm{CE}(\ell, y) + \kappa\,\mathrm{CE}(\ell, P)$ for each token,
    where P is the softmax of the teacher's logits.

    Args:
        logits: The exit's.
        teacher_logits: The model's own, over the same part of the vocabulary.
        targets: Place of each label in that part.
        distillation: κ.

    Returns:
        Nats per token.
    """
    hard = F.cross_entropy(logits, targets, reduction="none")
    soft = F.cross_entropy(logits, teacher_logits.softmax(-1), reduction="none")
    return (1 - distillation) * hard + distillation * soft
