"""What exits propose: a token for each row, and whether they are sure enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from depthmix.decoding.draft_plan import DraftPlan
from depthmix.decoding.predictors import Predictor
from depthmix.method.backbone import UNQUANTISED, Backbone

MEMORY = 0.95
"""What a draft that was judged counts for, when the next one is."""

PRIOR = 4.0
"""Drafts, all of them right, that a row is trusted by at its beginning."""


@dataclass(frozen=True)
class Draft:
    """What an exit proposes for all rows."""

    layer: int

    tokens: Int[Tensor, " batch"]

    confidences: Float[Tensor, " batch"]
    """Probability of each token among those that may be drafted."""

    logits: Float[Tensor, "batch drafted"]
    """Over the tokens that may be drafted."""


class DraftHead:
    """The model's head on the few tokens that may be drafted.

    Args:
        backbone: The model's parts.
        vocabulary: Token ids that may be drafted, increasing; `None` for all.
    """

    def __init__(self, backbone: Backbone, vocabulary: tuple[int, ...] | None) -> None:
        self.backbone = backbone
        self.vocabulary = vocabulary
        self.read()

    def read(self) -> None:
        """Take the rows of the head as it is now: it may have been trained, moved or cast."""
        head: Any = self.backbone.head
        weight = getattr(head, "weight", None)
        device = weight.device if isinstance(weight, Tensor) else self.backbone.model.device
        self.tokens = self._weight = self._bias = None
        if self.vocabulary is None:
            return
        self.tokens = torch.tensor(self.vocabulary, device=device)
        if type(head) is nn.Linear and head.weight.dtype in UNQUANTISED:
            self._weight = head.weight.detach()[self.tokens]
            self._bias = None if head.bias is None else head.bias.detach()[self.tokens]

    def __call__(self, states: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch drafted"]:
        """Give the logits of the tokens that may be drafted, in float32.

        Args:
            states: What the head takes, N_i(h_i).
        """
        backbone = self.backbone
        states = states.to(backbone.head_weight.device)
        states = states.to(backbone.head_dtype(states.dtype))
        if self._weight is None:
            logits = backbone.unembed(states)
            return (logits if self.tokens is None else logits[..., self.tokens]).float()
        logits = F.linear(backbone.head_input(states), self._weight, self._bias)
        return backbone.cap(logits.float() * backbone.logit_scale)

    def name(self, places: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Turn places among the tokens that may be drafted into token ids."""
        return places if self.tokens is None else self.tokens[places]

    def spread(self, logits: Float[Tensor, "batch drafted"]) -> Float[Tensor, "batch vocab"]:
        """Give logits over all tokens, −∞ where a token may not be drafted."""
        if self.tokens is None:
            return logits
        spread = logits.new_full((len(logits), self.backbone.vocab_size), -torch.inf)
        spread[:, self.tokens] = logits
        return spread


class Drafter:
    """Decides at an exit whether all rows' next tokens are drafted there.

    A row's confidence is the exit's probability, times how right the drafts of this row have been
    so far against how sure they were: on a text that the exits do not know, drafting stops. Every
    row must be sure, since rows go up together, and a row whose draft is wrong waits for the others
    until the top has run.

    Args:
        backbone: The model's parts.
        exits: What predicts at the plan's exits.
        plan: When it drafts.
        verify: Whether the top verifies drafts. Without it nothing is pending, and no row is known
            to be right or wrong.
    """

    def __init__(
        self, backbone: Backbone, exits: Predictor, plan: DraftPlan, *, verify: bool
    ) -> None:
        self.plan, self.verify = plan, verify
        self.head = DraftHead(backbone, plan.vocabulary)
        self._exits = exits
        self._thresholds = dict(zip(plan.exits, plan.thresholds, strict=True))
        self._joint = self._trust = torch.empty(0)
        self._sure: list[float] = []
        self._right: list[float] = []

    def begin(self, batch_size: int) -> None:
        """Make ready for rows of which nothing is known yet."""
        self.head.read()
        self._sure = [PRIOR] * batch_size
        self._right = [PRIOR] * batch_size

    def begin_round(self, device: torch.device) -> None:
        """Forget what was pending."""
        self._joint = self._trust = torch.tensor(self.trust, device=device)

    @property
    def trust(self) -> list[float]:
        """How right each row's drafts have been against how sure they were, at most 1."""
        pairs = zip(self._right, self._sure, strict=True)
        return [min(right / sure, 1.0) for right, sure in pairs]

    def draft(
        self,
        layer: int,
        hidden_states: Float[Tensor, "batch hidden"],
        active: Bool[Tensor, " batch"],
    ) -> Draft | None:
        """Let the exit at a layer draft, if it is sure.

        Args:
            layer: One of the plan's exits.
            hidden_states: Residual stream that the layer leaves at each row's newest token.
            active: Rows for which a draft is of use; one at least.

        Returns:
            The draft, or `None` where the tokens have to go deeper.
        """
        logits = self.head(self._exits(layer, hidden_states))
        confidences, places = logits.softmax(-1).max(-1)
        joint = self._joint.to(confidences.device) * confidences
        judged = torch.stack([confidences * self._trust.to(confidences.device), joint])
        sure, pending = judged.masked_fill(~active.to(judged.device), 1.0).amin(-1).tolist()
        if sure < self._thresholds[layer]:
            return None
        if self.verify and pending < self.plan.joint_threshold:
            return None
        self._joint = joint
        return Draft(layer, self.head.name(places), confidences, logits)

    def judge(self, row: int, confidences: list[float], *, num_right: int) -> None:
        """Learn from a row's drafts, of which those after the first wrong one say nothing.

        Args:
            row: Its place in the batch.
            confidences: Probability that each draft was given, earliest first.
            num_right: Drafts from the first on that the top agrees with.
        """
        for place, sure in enumerate(confidences[: num_right + 1]):
            self._sure[row] = MEMORY * self._sure[row] + (1 - MEMORY) * PRIOR + sure
            self._right[row] = (
                MEMORY * self._right[row] + (1 - MEMORY) * PRIOR + float(place < num_right)
            )
