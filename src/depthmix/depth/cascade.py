"""A cascade of exits, simulated on recorded texts: what it drafts, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from depthmix.decoding.draft_plan import DraftPlan
from depthmix.decoding.drafting import MEMORY, PRIOR
from depthmix.depth.confidences import Confidences
from depthmix.depth.costs import Costs


@dataclass(frozen=True, kw_only=True, eq=False)
class Cascades:
    """What several plans would do on each of some texts, beside the prompts' passes."""

    seconds: Float[np.ndarray, "plans texts"]
    """Time by the model of costs."""

    dense_seconds: Float[np.ndarray, " texts"]
    """Time of the model's own generation by the same costs."""

    num_tokens: Int[np.ndarray, " texts"]
    """Tokens that are generated after the first one, which the prompt's pass gives."""

    num_drafted: Int[np.ndarray, "plans texts"]
    """Tokens that exits drafted."""

    num_accepted: Int[np.ndarray, "plans texts"]
    """Drafts that the top agreed with; without verification, those that it would agree with."""

    num_rounds: Int[np.ndarray, "plans texts"]
    """Passes of the top."""

    layer_runs: Float[np.ndarray, "plans texts"]
    """Passes of layers, each over one position or several."""

    changed: Bool[np.ndarray, "plans texts"]
    """Whether the text would be another one; never with verification."""

    prompt_seconds: float
    """Time of a prompt's pass."""

    def speed_ups(self) -> Float[np.ndarray, " plans"]:
        """Give the time of dense generation over each plan's, of all texts with their prompts."""
        prompts = self.prompt_seconds * len(self.num_tokens)
        return (prompts + self.dense_seconds.sum()) / (prompts + self.seconds.sum(-1))


def simulate(
    recorded: Confidences,
    plans: Sequence[DraftPlan],
    costs: Costs,
    *,
    num_hidden_layers: int,
    verify: bool = True,
) -> Cascades:
    """Run the cascade of several plans over recorded texts, all of them at once.

    A token drafts at its first exit whose confidence, times the row's trust, reaches the threshold,
    provided that the product of trust and all pending confidences stays at `joint_threshold` or
    above and fewer than `max_drafts` tokens are pending; the layers above are put off. A token that
    runs a segment of layers takes along the pending positions that have not been through it. One
    that no exit drafts comes to the top, and with it all that is pending: the head verifies them
    together, and from the first disagreement on they are thrown away. The end of a text is not
    drafted ahead of anything, and ends a round. Trust is how right the text's drafts have been
    against how sure they were, as in `Drafter`.

    Without verification a confidence has to reach its exit's threshold, and that is all.

    What exits would say after a wrong draft is not known: it counts as what they say in the text.
    That drafting pauses where it does not pay (`Pace`) is left out.

    Args:
        recorded: What exits say of each token, from `record_confidences`.
        plans: Plans to try, with `exits` among the recorded layers. Their vocabulary is that of
            the recording.
        costs: Times of the model's parts.
        num_hidden_layers: Layers of the model.
        verify: Let the top verify; otherwise drafts stand, and the top only catches up.

    Returns:
        What each plan does on each text.
    """
    num_texts, num_exits = len(recorded.lengths), len(recorded.layers)
    edges = [0, *recorded.layers, num_hidden_layers]
    segments = np.diff(edges)
    most = max(plan.max_drafts for plan in plans) + 1 if verify else int(recorded.lengths.max())
    at_once = np.arange(1, most + 1)
    layer_seconds = np.concatenate([[0.0], costs.layer_seconds(at_once)])
    head_seconds = np.concatenate([[0.0], costs.head_seconds(at_once)])
    size = costs.vocabulary_sizes[-1] if recorded.vocabulary is None else len(recorded.vocabulary)
    exit_seconds = costs.exit_seconds(size)
    # A lane is a plan on a text. An exit that a plan leaves out has a threshold beyond reach.
    thresholds = np.full((num_exits, len(plans)), 2.0)
    for number, plan in enumerate(plans):
        for layer, threshold in zip(plan.exits, plan.thresholds, strict=True):
            thresholds[recorded.layers.index(layer), number] = threshold
    thresholds = np.repeat(thresholds, num_texts, axis=1)
    joint = np.repeat([plan.joint_threshold for plan in plans], num_texts)
    limit = np.repeat([plan.max_drafts for plan in plans], num_texts)
    text = np.tile(np.arange(num_texts), len(plans))
    ends = np.tile(recorded.lengths, len(plans))
    num_lanes = len(text)

    place = np.ones(num_lanes, dtype=int)  # the token that is to be predicted
    first = place.copy()  # the first one of the round
    waiting = np.zeros((num_exits + 2, num_lanes), dtype=int)  # positions below each segment
    product, trust = np.ones(num_lanes), np.ones(num_lanes)
    sure_sum, right_sum = np.full(num_lanes, PRIOR), np.full(num_lanes, PRIOR)
    good = np.zeros(num_lanes, dtype=int)  # drafts of the round before the first wrong one
    failed = np.zeros(num_lanes, dtype=bool)
    seconds, runs = np.zeros(num_lanes), np.zeros(num_lanes)
    drafted, accepted, rounds = (np.zeros(num_lanes, dtype=int) for _ in range(3))
    changed = np.zeros(num_lanes, dtype=bool)
    lanes = np.flatnonzero(place < ends)
    while lanes.size:
        at, of = place[lanes], text[lanes]
        pending = at - first[lanes]
        is_last = at == ends[lanes] - 1
        asks = np.ones(len(lanes), dtype=bool)
        if verify:  # a draft at the end of what is asked for would never be looked at
            asks = (pending < limit[lanes]) & ~(is_last & ~recorded.ended[of])
        going = lanes
        for number in range(num_exits + 1):
            together = 1 + waiting[number, going]
            seconds[going] += segments[number] * layer_seconds[together]
            runs[going] += segments[number]
            waiting[number, going] = 0
            if number == num_exits:
                break
            asked = asks & (thresholds[number, going] <= 1)
            seconds[going] += asked * exit_seconds
            sure = recorded.confidence[number, of, at].astype(float)
            joined = product[going] * sure
            drafts = asked & (sure * trust[going] >= thresholds[number, going])
            if verify:
                drafts &= joined >= joint[going]
                asks &= ~drafts  # the text's end is followed by nothing
                drafts &= ~is_last
            waiting[number + 1, going] += together - ~drafts  # those that stay below
            here, sure = going[drafts], sure[drafts]
            right = recorded.agrees[number, of[drafts], at[drafts]]
            drafted[here] += 1
            place[here] += 1
            if verify:
                product[here] = joined[drafts]
                judged = ~failed[here]
                known = here[judged]
                sure_sum[known] = MEMORY * sure_sum[known] + (1 - MEMORY) * PRIOR + sure[judged]
                right_sum[known] = MEMORY * right_sum[known] + (1 - MEMORY) * PRIOR + right[judged]
                good[here] += right & judged
                failed[here] |= ~right
            else:
                accepted[here] += right
                changed[here] |= ~right
            stays = ~drafts
            going, at, of = going[stays], at[stays], of[stays]
            asks, is_last = asks[stays], is_last[stays]
        # What has come to the top.
        together = 1 + at - first[going]
        seconds[going] += head_seconds[together] if verify else head_seconds[1]
        rounds[going] += 1
        accepted[going] += good[going]
        place[going] = first[going] + good[going] + 1 if verify else place[going] + 1
        first[going] = place[going]
        trust[going] = np.minimum(right_sum[going] / sure_sum[going], 1.0)
        product[going], good[going], failed[going] = trust[going], 0, False
        lanes = lanes[place[lanes] < ends[lanes]]
    num_tokens = np.maximum(recorded.lengths - 1, 0)
    table = (len(plans), num_texts)
    return Cascades(
        seconds=seconds.reshape(table) + num_tokens * costs.step,
        dense_seconds=num_tokens * costs.dense_seconds(1, num_hidden_layers),
        num_tokens=num_tokens,
        num_drafted=drafted.reshape(table),
        num_accepted=accepted.reshape(table),
        num_rounds=rounds.reshape(table),
        layer_runs=runs.reshape(table),
        changed=changed.reshape(table),
        prompt_seconds=costs.prompt,
    )
