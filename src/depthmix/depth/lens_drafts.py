"""Which exit would draft each token of a text, and whether the model would accept it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from depthmix.decoding.draft_plan import DraftPlan
from depthmix.depth.lesson import project_onto
from depthmix.depth.token_texts import token_texts
from depthmix.method.backbone import Backbone
from depthmix.method.exits import Exits

BLOCK_TOKENS = 256
"""Tokens whose logits are in memory at once."""


@dataclass(frozen=True, kw_only=True)
class Drafts:
    """What would be drafted after each token of a text, one entry per token.

    Each is the first exit's that is sure by itself. That drafting stops after several, or pauses
    where it does not pay, is left out.
    """

    layers: tuple[int | None, ...]
    """Layer of the exit that drafts; `None` where none is sure."""

    tokens: tuple[str, ...]
    """What it drafts, as text; empty where none is sure."""

    accepted: tuple[bool, ...]
    """Whether that is the model's own likeliest token."""


@torch.no_grad()
def read_drafts(
    backbone: Backbone,
    exits: Exits,
    plan: DraftPlan,
    states: Mapping[int, Float[Tensor, "1 seq hidden"]],
    answer: Float[Tensor, "1 seq hidden"],
    tokenizer: PreTrainedTokenizerBase,
) -> Drafts:
    """Let exits draft after every token of a text, by a plan.

    Args:
        backbone: The model's parts.
        exits: Its exits.
        plan: Which of them draft, from which probability on and among which tokens.
        states: Residual streams by depth, those of the plan's exits among them.
        answer: What the model itself hands to its head.
        tokenizer: Its tokenizer.

    Returns:
        The drafts.
    """
    device = backbone.head_weight.device
    known = None if plan.vocabulary is None else torch.tensor(plan.vocabulary, device=device)
    length = answer.shape[1]
    layers, tokens = torch.zeros(length, dtype=torch.long), torch.zeros(length, dtype=torch.long)
    own = torch.zeros(length, dtype=torch.long)
    for start in range(0, length, BLOCK_TOKENS):
        part = slice(start, start + BLOCK_TOKENS)
        own[part] = backbone.unembed(answer[0, part].to(device)).argmax(-1).cpu()
        for layer, threshold in reversed([*zip(plan.exits, plan.thresholds, strict=True)]):
            normed = exits(layer, states[layer][0, part]).to(device)
            best = project_onto(backbone, normed, known).softmax(-1).max(-1)
            chosen = best.indices if known is None else known[best.indices]
            sure = (best.values >= threshold).cpu()
            layers[part] = torch.where(sure, layer, layers[part])
            tokens[part] = torch.where(sure, chosen.cpu(), tokens[part])
    drafted = layers > 0
    texts = token_texts(tokenizer, tokens.tolist())
    return Drafts(
        layers=tuple(layer or None for layer in layers.tolist()),
        tokens=tuple(
            text if is_draft else "" for text, is_draft in zip(texts, drafted.tolist(), strict=True)
        ),
        accepted=tuple((drafted & (tokens == own)).tolist()),
    )
