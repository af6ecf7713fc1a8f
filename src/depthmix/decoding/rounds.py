"""Rounds of drafting: passes that draft until one reaches the top, which judges all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig

from depthmix.decoding.drafting import Draft, Drafter
from depthmix.decoding.endings import find_endings
from depthmix.decoding.layer_stack import LayerStack
from depthmix.decoding.lookahead import Guess, Lookahead
from depthmix.decoding.pace import Pace

LOOP_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "logits_to_keep")
"""What the decoding loop passes that is made anew for tokens ahead of it."""


class Rounds:
    """One call's rounds, each of which lets every row go on by drafts and by the top's own token.

    Args:
        stack: The layers.
        drafter: What their exits draft.
        pace: Whether drafting pays.
        lookahead: What each row has processed ahead of the decoding loop.
        input_ids: The call's prompts.
        config: How it decodes.
        num_drafted: Is counted up by the exit of each draft.
    """

    def __init__(
        self,
        stack: LayerStack,
        drafter: Drafter,
        pace: Pace,
        lookahead: Lookahead,
        *,
        input_ids: Int[Tensor, "batch seq"],
        config: GenerationConfig,
        num_drafted: Counter[int],
    ) -> None:
        self.lookahead, self.num_drafted = lookahead, num_drafted
        self.padding_token, self.endings = find_endings(config, input_ids.device)
        self._stack, self._drafter, self._pace = stack, drafter, pace
        self._next = input_ids.new_zeros(len(input_ids))

    def read_ahead(
        self,
        forward: Callable[..., Any],
        tokens: Int[Tensor, " batch"],
        padding: Int[Tensor, "batch columns"] | None,
        call: dict[str, Any],
    ) -> None:
        """Let each row go on with drafts, and keep what the model would choose too.

        Args:
            forward: The model's pass.
            tokens: The loop's newest ones, for rows that have not guessed them; others are ahead.
            padding: The loop's mask, where it pads.
            call: What the loop passed for them.

        Raises:
            ValueError: If something of what the loop passed cannot be foreseen.
        """
        options = {name: value for name, value in call.items() if name not in LOOP_ARGUMENTS}
        unknown = sorted(name for name, value in options.items() if isinstance(value, Tensor))
        if unknown:
            raise ValueError(
                f"Fast generation cannot foresee `{unknown[0]}` of tokens that it drafts; leave "
                "it out, or call the model's own `generate`."
            )
        ahead, device = self.lookahead, tokens.device
        ahead.align()
        offset = torch.tensor(ahead.offsets, device=device)
        room = torch.tensor(ahead.room, device=device)
        longest, most = max(ahead.lengths), int(room.max())
        width = min(self._drafter.plan.max_drafts + 1, most) if self._pace.drafts else 1
        # Rows with less room process tokens for nothing, at their last position.
        last = (room - 1).clamp(min=0)[:, None]
        positions = call["position_ids"] + offset[:, None]
        positions = positions + torch.arange(width, device=device).minimum(last)  # (B, width)
        seen = ahead.padding(padding, num_new=width, device=device)
        stack = self._stack
        stack.begin_round(seen)
        self._drafter.begin_round(device)

        current = torch.where(offset == 0, tokens, self._next)
        proposed, drafts, logits = [current], [], None
        for step in range(width):
            active = (step < room) & torch.isin(current, self.endings, invert=True)
            # A draft at the end of the room would never be looked at.
            stack.begin_pass(active if step + 1 < width and bool(active.any()) else None)
            output = forward(
                input_ids=current[:, None],
                position_ids=positions[..., step : step + 1],
                attention_mask=None if seen is None else seen[:, : longest + step + 1],
                **options,
            )
            drafted = stack.draft
            if drafted is None:
                logits = stack.read_top(output.logits)
                break
            ended = torch.isin(current, self.endings)
            drafts.append(drafted)
            current = drafted.tokens.to(device).masked_fill(ended, self.padding_token)
            going_on = (step + 1 < room) & torch.isin(current, self.endings, invert=True)
            if not bool(going_on.any()):  # nothing comes after the ends of all rows
                logits = stack.catch_up()
                break
            proposed.append(current)
        assert logits is not None  # the last step drafts nothing
        self._keep(torch.stack(proposed, dim=1), logits, room, drafts)

    def _keep(
        self,
        proposed: Int[Tensor, "batch width"],
        logits: Float[Tensor, "batch width vocab"],
        room: Int[Tensor, " batch"],
        drafts: Sequence[Draft],
    ) -> None:
        """Keep the tokens of each row up to the first that the model would not choose."""
        expected = self._choose(proposed, logits)  # (B, width)
        agreed = (proposed[:, 1:] == expected[:, :-1]).cumprod(dim=1).sum(dim=1) + 1
        num_kept = agreed.minimum(room)
        following = expected.take_along_dim((num_kept - 1).clamp(min=0)[:, None], dim=1)[:, 0]
        self._next = torch.where(num_kept > 0, following, self._next)
        # Neither what pads a row after its end nor what is beyond its room was drafted.
        counts = torch.arange(proposed.shape[1], device=room.device) < room[:, None]
        counts[:, 1:] &= torch.isin(proposed[:, :-1], self.endings, invert=True)
        tokens, kept, counting = proposed.tolist(), num_kept.tolist(), counts.tolist()
        confidences = [draft.confidences.tolist() for draft in drafts]
        for row, count in enumerate(kept):
            judged = [
                confidences[i - 1][row] for i in range(1, len(tokens[row])) if counting[row][i]
            ]
            self._drafter.judge(row, judged, num_right=max(count - 1, 0))
            for draft, counts_here in zip(drafts, counting[row][1:], strict=False):
                self.num_drafted[draft.layer] += counts_here
            guesses = [
                Guess(
                    token=tokens[row][i],
                    # A view would keep the logits of all rows.
                    logits=logits[row, i].clone(),
                    exit=drafts[i - 1].layer if i and counting[row][i] else None,
                )
                for i in range(count)
            ]
            self.lookahead.add(row, guesses, num_processed=len(tokens[row]))
        in_use = [count for count in kept if count]
        self._pace.end_round(sum(in_use) / max(len(in_use), 1))

    def _choose(
        self, tokens: Int[Tensor, "batch seq"], logits: Float[Tensor, "batch seq vocab"]
    ) -> Int[Tensor, "batch seq"]:
        """Guess what follows tokens: padding where a row has ended, else the likeliest token."""
        best = logits.argmax(-1)
        return best.masked_fill(torch.isin(tokens, self.endings), self.padding_token)
