"""The training objective, as pure functions: `L = L_task + λ L_distill`, written plainly."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from depthmix.loss.exit_terms import ExitSums, ExitTokens, ask_exits, plain_exit_sums
from depthmix.method.backbone import Backbone
from depthmix.method.config import IGNORE_INDEX, MixtureConfig
from depthmix.method.mixture import Routes, mix

Divergence = Literal["reverse_kl", "forward_kl", "jsd"]
"""Names of the divergences."""


@dataclass(frozen=True)
class LabelTokens:
    """The tokens of a pass that predict a label, one row each, and nothing of the others."""

    states: tuple[Float[Tensor, "tokens hidden"], ...]
    """Normed states `N_i(h_i)`, one per late layer, earliest first."""

    weights: Float[Tensor, "tokens routes"]
    """Routing weights `G`."""

    targets: Int[Tensor, " tokens"]
    """Label of each token."""

    num_distilled: int
    """The first this many tokens are distilled, the others are not."""

    exits: ExitTokens | None = None
    """What the exits make of the same tokens; `None` where no exit is trained."""

    def answered_by(self, route: int) -> LabelTokens:
        """Give all weight to one route, so that the ensemble is its prediction; distil nothing.

        Args:
            route: Its place among the late layers.
        """
        alone = torch.zeros_like(self.weights)
        alone[:, route] = 1
        # The router stays in the graph with gradients of zero: `DistributedDataParallel` may stop
        # at parameters that have none.
        weights = alone + 0 * self.weights
        return replace(self, weights=weights, num_distilled=0, exits=None)

    def split(self, num_tokens: int) -> list[LabelTokens]:
        """Cut into pieces of at most `num_tokens` tokens; one empty piece where there are none."""
        starts = range(0, max(len(self.targets), 1), num_tokens)
        return [
            LabelTokens(
                tuple(state[start : start + num_tokens] for state in self.states),
                self.weights[start : start + num_tokens],
                self.targets[start : start + num_tokens],
                min(max(self.num_distilled - start, 0), num_tokens),
                self.exits and self.exits.take(slice(start, start + num_tokens)),
            )
            for start in starts
        ]


@dataclass(frozen=True)
class LossSums:
    """Both terms of the objective, summed over label tokens."""

    task: Float[Tensor, ""]
    """Cross-entropy of the ensemble in nats."""

    distillation: Float[Tensor, ""]
    """Divergence of the late layers from the final one in nats, over the distilled tokens."""

    exits: ExitSums | None = None
    """What the exits lose; `None` where no exit is trained."""


def divergence(
    log_probs: Float[Tensor, "*batch vocab"],
    teacher_log_probs: Float[Tensor, "*batch vocab"],
    kind: Divergence = "reverse_kl",
) -> Float[Tensor, "*batch"]:
    r"""Measure how far a late layer's prediction is from the final layer's.

    `reverse_kl` computes $\sum_v P_i (\log P_i - \log P_n)$, student first as the paper writes it
    (`F.kl_div(log_probs, teacher_probs)` computes the other direction); `forward_kl` computes
    $\sum_v P_n (\log P_n - \log P_i)$; `jsd` averages both layers' KL to their mean.

    Args:
        log_probs: Log-probabilities of the late layer, `log P_i`.
        teacher_log_probs: Log-probabilities of the final layer, `log P_n`.
        kind: Which divergence.

    Returns:
        Divergence in nats, 0 or more; `jsd` is at most ln 2.
    """
    if kind == "reverse_kl":
        return (log_probs.exp() * (log_probs - teacher_log_probs)).sum(-1)
    if kind == "forward_kl":
        return (teacher_log_probs.exp() * (teacher_log_probs - log_probs)).sum(-1)
    mean = torch.logaddexp(log_probs, teacher_log_probs) - math.log(2)
    student = (log_probs.exp() * (log_probs - mean)).sum(-1)
    teacher = (teacher_log_probs.exp() * (teacher_log_probs - mean)).sum(-1)
    return (student + teacher) / 2


def label_positions(
    labels: Int[Tensor, "batch seq"], *, shifted: bool = False
) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"]]:
    """Find the positions whose next token counts in the loss.

    Args:
        labels: Token ids, `IGNORE_INDEX` where a token does not count.
        shifted: Whether `labels[:, t]` is already the token after position t, as in `shift_labels`.

    Returns:
        Places of the positions that predict a label, in the flattened batch, and those labels.
    """
    if not shifted:
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    labels = labels.flatten()
    places = (labels != IGNORE_INDEX).nonzero()[:, 0]  # waits for the device, once a pass
    return places, labels[places]


def select_tokens(
    routes: Routes,
    labels: Int[Tensor, "batch seq"],
    *,
    backbone: Backbone,
    shifted: bool = False,
    exit_distillation: float | None = None,
) -> LabelTokens:
    """Take the tokens that predict a label, draw those that are distilled, and ask the exits.

    With `distillation_token_share` below 1 the distilled ones are drawn without replacement from
    torch's default generator.

    Args:
        routes: Normed states and routing weights of the forward pass.
        labels: Token ids, `IGNORE_INDEX` where a token does not count.
        backbone: The model's head.
        shifted: Whether the labels are already shifted by one.
        exit_distillation: Stands for the option of that name, where it is given.

    Returns:
        The tokens where the head is, the distilled ones first.
    """
    mixture, config = routes.mixture, routes.mixture.config
    device = backbone.head_weight.device
    places, targets = label_positions(labels.to(routes.weights.device), shifted=shifted)
    num_tokens, num_distilled = len(places), 0
    if config.distils:
        num_distilled = math.ceil(config.distillation_token_share * num_tokens)
    if 0 < num_distilled < num_tokens:
        order = torch.randperm(num_tokens, device=places.device)
        places, targets = places[order], targets[order]
    exits = None
    if mixture.exits is not None and routes.exit_states:
        exits = ask_exits(
            mixture.exits,
            {i: state.flatten(0, 1)[places] for i, state in routes.exit_states.items()},
            targets.to(device),
            vocab_size=backbone.vocab_size,
            num_drawn=config.exit_vocabulary,
            distillation=config.exit_distillation
            if exit_distillation is None
            else exit_distillation,
        )
    return LabelTokens(
        tuple(state.flatten(0, 1)[places].to(device) for state in routes.states),
        routes.weights.flatten(0, 1)[places].to(device),
        targets.to(device),
        num_distilled,
        exits,
    )


def plain_sums(tokens: LabelTokens, backbone: Backbone, config: MixtureConfig) -> LossSums:
    r"""Sum both terms plainly, with every logit in memory at once.

    The task loss is the cross-entropy of the ensemble $\ell = \sum_i G_i \ell_i$, the distillation
    loss $\sum_{i<n} D(P_i, P_n)$ (paper, section 3) with the teacher $P_n$ detached. Tokens that
    are not distilled take one head product, $\phi(\sum_i G_i N_i(h_i))$, which is the same logits.
    With `distillation_top_m`, $P_i$ and $P_n$ are renormalised on the ensemble's M likeliest
    entries. What exits lose comes from `plain_exit_sums`. `fused_sums` is the fast version of this
    reference.

    Args:
        tokens: The label tokens.
        backbone: The model's head, scale and soft cap.
        config: The mixture's options.

    Returns:
        Sums over tokens in nats, float32 or wider.
    """
    distilled = slice(tokens.num_distilled)
    rest = slice(tokens.num_distilled, None)
    wide = torch.promote_types(tokens.weights.dtype, torch.float32)
    dtype = backbone.head_dtype(tokens.states[-1].dtype)
    states = tuple(state.to(dtype) for state in tokens.states)
    parts = tuple(backbone.project(state[distilled]).to(wide) for state in states)
    ensemble = mix(parts, tokens.weights[distilled])  # (n, V)
    mixed = mix(tuple(state[rest] for state in states), tokens.weights[rest])
    logits = torch.cat([ensemble, backbone.project(mixed.to(dtype)).to(wide)])  # (N, V)
    predictions = backbone.cap(logits)
    task = F.cross_entropy(predictions, tokens.targets, reduction="sum")
    if config.distillation_top_m is not None:
        num_kept = min(config.distillation_top_m, logits.shape[-1])
        kept = ensemble.detach().topk(num_kept).indices  # (n, M)
        parts = tuple(part.gather(-1, kept) for part in parts)
    *late, final = [backbone.cap(part).log_softmax(-1) for part in parts]
    distances = [divergence(student, final.detach(), config.divergence).sum() for student in late]
    exits = None
    if tokens.exits is not None:
        exits = plain_exit_sums(tokens.exits, predictions, backbone)
    return LossSums(task, sum(distances, torch.zeros_like(task)), exits)
