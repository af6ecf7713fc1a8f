"""Exits put on a finished model: the trunk frozen, one pass of states, no gradient through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from depthmix.depth.lesson import (
    Lesson,
    Row,
    check_adapter_kind,
    exit_loss,
    list_targets,
    project_onto,
    read_lesson,
)
from depthmix.loss.linear_head import is_plain
from depthmix.method.architecture import evaluating
from depthmix.method.backbone import Backbone
from depthmix.method.exits import Exits, check_exit_layers
from depthmix.method.fingerprint import Fingerprint
from depthmix.method.parts import find_parts, new_exits
from depthmix.options.types import check_number

WARMUP_STEPS = 4
"""Steps in which the learning rate rises; after them it falls to zero in a straight line."""

POOLED_BATCHES = 8
"""Batches whose rows are sorted by length together."""

CHUNK_LOGITS = 2**24
"""Logits of one exit that are in memory at once: 64 MiB, and a handful of buffers of that size."""


def train_exits(
    model: nn.Module,
    sequences: Sequence[Row],
    *,
    layers: Sequence[int],
    rank: int = 64,
    num_steps: int = 60,
    batch_size: int = 16,
    learning_rate: float = 3e-3,
    distillation: float = 0.5,
    num_negatives: int = 2048,
    seed: int = 0,
    final_norm: str | None = None,
    decoder_layers: str | None = None,
    on_step: Callable[[int, dict[int, float]], None] | None = None,
) -> Exits:
    r"""Train exits on a model that stays as it is, to the bit.

    Minimises $\sum_i (1 - \kappa)\,\mathrm{CE}(\ell_i, y) + \kappa\,\mathrm{CE}(\ell_i, P)$ in
    nats, the mean over label tokens, where $\ell_i$ are the logits of exit i and P is the model's
    own prediction (the mixture's, where there is one), not differentiated. Both are taken over a
    part of the vocabulary: the labels of the batch, `num_negatives` of all labels and as many of
    all tokens, drawn at each step. A head without a plain weight, such as a quantised one, gives
    all tokens.

    The trunk runs once per batch and without a gradient; AdamW without weight decay, a rate that
    rises for `WARMUP_STEPS` steps and then falls to zero. Random numbers are its own.

    Args:
        model: A finished decoder-only language model on the device where it is to run, with
            adapters and a mixture or without.
        sequences: Rows with `input_ids`, and `labels` (`IGNORE_INDEX` where a token does not count)
            if only some of the tokens are to be predicted; without them, all but the first are.
        layers: Numbers of the layers, increasing, each below the final one.
        rank: Rank of each exit's translator; 0 trains norms alone.
        num_steps: Steps of the optimiser.
        batch_size: Records per step, as tokens.
        learning_rate: Its highest value.
        distillation: κ, 0 to 1: how much of the loss is the model's own prediction.
        num_negatives: Tokens that are drawn of each kind; as many as the vocabulary has give all.
        seed: Of the translators' start, of the order of sequences and of what is drawn.
        final_norm: Full name of the final norm of a model without a mixture, where it cannot be
            found by itself.
        decoder_layers: Full name of its `ModuleList` of layers, likewise.
        on_step: Called after each step with its number, from 1, and the loss of each exit in nats.

    Returns:
        The exits, frozen, in float32, on the device of the final norm.

    Raises:
        ValueError: If an option does not fit, no token is to be predicted, or the adapter changes
            more than the decoder's own layers.
        TypeError: If it is no decoder-only language model.
        FloatingPointError: If a loss is not finite.
    """
    check_number("rank", rank, at_least=0)
    check_number("num_steps", num_steps, at_least=1)
    check_number("batch_size", batch_size, at_least=1)
    check_number("learning_rate", learning_rate, above=0)
    check_number("num_negatives", num_negatives, at_least=1)
    check_number("distillation", distillation, at_least=0)
    if distillation > 1:
        raise ValueError(
            f"`distillation` must be at most 1, which leaves the labels out, got {distillation}."
        )
    check_adapter_kind(model)
    backbone, norm = find_parts(model, final_norm=final_norm, decoder_layers=decoder_layers)
    check_exit_layers(layers, num_hidden_layers=backbone.num_hidden_layers, name="layers")
    rows = [row for row in sequences if list_targets(row)]
    if not rows:
        raise ValueError(
            f"`sequences` must hold tokens to predict, and the {len(sequences)} given hold none; "
            "a sequence needs two tokens at least, and labels other than -100 if it has any."
        )
    seen = torch.tensor(sorted({int(t) for row in rows for t in list_targets(row)}))
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # all that are seeded
        torch.manual_seed(seed)
        exits = new_exits(backbone, norm, tuple(layers), rank=rank)
        exits.made_for = Fingerprint.take(backbone)
    parameters = list(exits.parameters())
    if not parameters:
        return exits.eval()  # a norm without weights, and no translator
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, num_steps))
    lengths = [len(row["input_ids"]) for row in rows]
    batches = draw_batches(lengths, batch_size, generator)
    with evaluating(backbone.model):
        for step in range(1, num_steps + 1):
            lesson = read_lesson(backbone, [rows[i] for i in next(batches)], exits.layers)
            sampled = _draw_vocabulary(
                lesson.targets.cpu(), seen, backbone.vocab_size, num_negatives, generator
            )
            with torch.enable_grad():
                losses = _descend(exits, lesson, backbone, sampled, distillation=distillation)
            if not all(map(torch.isfinite, losses.values())):
                raise FloatingPointError(
                    f"The exits' loss at step {step} is not finite; lower `learning_rate`, which "
                    f"is {learning_rate:g}, or load the model in float32."
                )
            optimizer.step()
            schedule.step()
            if on_step is not None:
                on_step(step, {layer: float(loss) for layer, loss in losses.items()})
    for parameter in parameters:
        parameter.grad = None
    return exits.eval().requires_grad_(False)


def _descend(
    exits: Exits,
    lesson: Lesson,
    backbone: Backbone,
    sampled: Int[Tensor, " sampled"],
    *,
    distillation: float,
) -> dict[int, Float[Tensor, ""]]:
    """Give the exits' parameters the gradient of a batch, and say each exit's loss.

    Only they get one, whatever else of the model asks for gradients.
    """
    device, num_tokens = backbone.head_weight.device, len(lesson.targets)
    chosen, width = None, backbone.vocab_size
    if is_plain(backbone.head):
        chosen, width = sampled.to(device), len(sampled)
        lesson = replace(lesson, targets=torch.searchsorted(chosen, lesson.targets))
    for parameter in exits.parameters():
        parameter.grad = torch.zeros_like(parameter)
    means = {layer: torch.zeros((), device=device) for layer in exits.layers}
    for piece in lesson.split(max(CHUNK_LOGITS // width, 1)):
        with torch.no_grad():
            teacher = project_onto(backbone, piece.answer, chosen)
        for layer in exits.layers:
            own = list(exits.by_layer[str(layer)].parameters())
            normed = exits(layer, piece.states[layer].to(own[0].device)).to(device)
            logits = project_onto(backbone, normed, chosen)
            losses = exit_loss(logits, teacher, piece.targets, distillation=distillation)
            loss = losses.sum() / num_tokens
            for parameter, gradient in zip(own, torch.autograd.grad(loss, own), strict=True):
                assert parameter.grad is not None  # zeros at first
                parameter.grad += gradient
            means[layer] += loss.detach()
    return means


def draw_batches(
    lengths: Sequence[int], batch_size: int, generator: torch.Generator
) -> Iterator[list[int]]:
    """Draw rows without end, each once before any comes again, like with like in a batch.

    The rows of `POOLED_BATCHES` batches are sorted by length, so that little is padded; the batches
    come in a random order. The last batch of a round may be smaller.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows per batch.
        generator: Of the order.

    Yields:
        Numbers of rows.
    """
    size = POOLED_BATCHES * batch_size
    while True:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        pools = [order[start : start + size] for start in range(0, len(order), size)]
        batches = [
            ranked[start : start + batch_size]
            for ranked in (sorted(pool, key=lengths.__getitem__) for pool in pools)
            for start in range(0, len(ranked), batch_size)
        ]
        for place in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[place]


def _draw_vocabulary(
    targets: Int[Tensor, " tokens"],
    seen: Int[Tensor, " labels"],
    vocab_size: int,
    num_negatives: int,
    generator: torch.Generator,
) -> Int[Tensor, " sampled"]:
    """Draw the part of the vocabulary over which a step predicts, in increasing order."""
    labels = seen[torch.randperm(len(seen), generator=generator)[:num_negatives]]
    others = torch.randperm(vocab_size, generator=generator)[:num_negatives]
    return torch.cat([targets, labels, others]).unique()


def _rate(step: int, num_steps: int) -> float:
    """Give the share of the learning rate for a step, from 0."""
    rise = min(1.0, (step + 1) / WARMUP_STEPS)
    fall = 1.0 - max(0, step - WARMUP_STEPS) / max(num_steps - WARMUP_STEPS, 1)
    return rise * fall
