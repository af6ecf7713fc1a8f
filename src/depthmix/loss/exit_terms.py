"""What exits lose on a batch, as a pure function; the tokens and entries that their loss is on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.tensor import DTensor

from depthmix.method.backbone import Backbone
from depthmix.method.exits import Exits

NUM_SALTS = 8
"""Weights of the exits that a draw depends on; a step of the optimiser moves any of them."""


@dataclass(frozen=True)
class ExitTokens:
    """What exits make of the tokens of a pass that predict a label."""

    states: tuple[Float[Tensor, "tokens hidden"], ...]
    """What each exit says the head takes, lowest exit first."""

    targets: Int[Tensor, " tokens"]
    """Each token's label, as its place in `vocabulary`."""

    vocabulary: Int[Tensor, " entries"] | None
    """Entries of the vocabulary that the loss tells apart; `None` for all of them."""

    distillation: float
    """κ: share of the loss that is the cross-entropy with the model's own prediction."""

    def take(self, tokens: slice) -> ExitTokens:
        """Take some of the tokens."""
        states = tuple(state[tokens] for state in self.states)
        return replace(self, states=states, targets=self.targets[tokens])


@dataclass(frozen=True)
class ExitSums:
    """What exits lose, summed over label tokens."""

    loss: Float[Tensor, ""]
    """Their loss in nats, mean over the exits."""

    nll: Float[Tensor, " exits"]
    """Cross-entropy of each exit with the labels in nats, detached."""

    agreed: Float[Tensor, " exits"]
    """Tokens of which each exit's likeliest entry is the model's own, detached."""

    @staticmethod
    def add(parts: list[ExitSums]) -> ExitSums:
        """Add up over pieces of a batch."""
        return ExitSums(
            torch.stack([part.loss for part in parts]).sum(),
            torch.stack([part.nll for part in parts]).sum(0),
            torch.stack([part.agreed for part in parts]).sum(0),
        )


def ask_exits(
    exits: Exits,
    hidden_states: Mapping[int, Float[Tensor, "tokens hidden"]],
    targets: Int[Tensor, " tokens"],
    *,
    vocab_size: int,
    num_drawn: int | None,
    distillation: float,
) -> ExitTokens:
    """Let exits say what the head takes for some tokens, and draw the entries of their loss.

    Args:
        exits: The exits.
        hidden_states: Residual stream at each exit's layer, of the label tokens.
        targets: Label of each token, where the model's head is.
        vocab_size: Entries of the vocabulary.
        num_drawn: Entries that are drawn beside the labels; `None` takes all of the vocabulary.
        distillation: κ, from 0 to 1.

    Returns:
        The tokens as the exits see them, on the device of `targets`.
    """
    states = tuple(exits(layer, hidden_states[layer]) for layer in exits.layers)
    states = tuple(state.to(targets.device) for state in states)
    if num_drawn is None or num_drawn >= vocab_size:
        return ExitTokens(states, targets, None, distillation)
    salt = next(iter(exits.parameters()), targets.new_zeros(0))
    vocabulary = draw_entries(targets, num_drawn=num_drawn, vocab_size=vocab_size, salt=salt)
    places = torch.searchsorted(vocabulary, targets)
    return ExitTokens(states, places, vocabulary, distillation)


@torch.compiler.disable
def draw_entries(
    targets: Int[Tensor, " tokens"], *, num_drawn: int, vocab_size: int, salt: Tensor
) -> Int[Tensor, " entries"]:
    """Draw entries of the vocabulary beside a pass's labels, without torch's own generators.

    The draw is a function of the labels and of weights that each step moves: another one at each
    pass, the same one where a run is resumed or repeated, and nobody else's random numbers change.

    Args:
        targets: Labels.
        num_drawn: Entries to draw, with replacement.
        vocab_size: Entries of the vocabulary.
        salt: A tensor of weights.

    Returns:
        The labels and what was drawn, increasing and each once.
    """
    labels = targets.cpu()
    own = (salt.to_local() if isinstance(salt, DTensor) else salt).detach().flatten()
    content = [labels, own[:NUM_SALTS].double().cpu()]
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in content)).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    drawn = torch.randint(vocab_size, (num_drawn,), generator=generator)
    return torch.cat([labels, drawn]).unique().to(targets.device)


def plain_exit_sums(
    tokens: ExitTokens, ensemble: Float[Tensor, "tokens vocab"], backbone: Backbone
) -> ExitSums:
    r"""Sum what exits lose plainly, with every logit in memory at once.

    Computes the mean over exits of $(1 - \kappa)\,\mathrm{CE}(P_e, y) + \kappa\,\mathrm{CE}(P_e,
    P)$ with the exit's prediction $P_e = \mathrm{softmax}(\phi(\ldots))$ and the model's own, $P$,
    which is detached; both are renormalised on the entries that the loss is on. `fused_exit_sums`
    is the fast version of this reference.

    Args:
        tokens: The label tokens, as the exits see them.
        ensemble: The model's own logits for them, capped, float32 or wider.
        backbone: The model's head, scale and soft cap.

    Returns:
        Sums over tokens, in the dtype of `ensemble`.
    """

    def choose(logits: Float[Tensor, "tokens vocab"]) -> Float[Tensor, "tokens entries"]:
        return logits if tokens.vocabulary is None else logits[:, tokens.vocabulary]

    teacher = choose(ensemble.detach()).softmax(-1)
    losses, nll, agreed = [], [], []
    for state in tokens.states:
        own = backbone.project(state.to(backbone.head_dtype(state.dtype))).to(ensemble.dtype)
        log_probs = choose(backbone.cap(own)).log_softmax(-1)
        of_labels = F.nll_loss(log_probs, tokens.targets, reduction="sum")
        of_teacher = -(teacher * log_probs).sum()
        losses.append((1 - tokens.distillation) * of_labels + tokens.distillation * of_teacher)
        nll.append(of_labels.detach())
        agreed.append(count_agreed(log_probs, teacher))
    return ExitSums(torch.stack(losses).mean(), torch.stack(nll), torch.stack(agreed))


def count_agreed(
    student: Float[Tensor, "tokens *exits entries"], teacher: Float[Tensor, "tokens entries"]
) -> Float[Tensor, "*exits"]:
    """Count the tokens of which both have the same likeliest entry.

    Args:
        student: Logits or log-probabilities of one exit, or of several.
        teacher: Of the model, or its probabilities.
    """
    best = teacher.argmax(-1).reshape(-1, *[1] * (student.dim() - 2))
    return (student.argmax(-1) == best).sum(0).to(teacher.dtype)
