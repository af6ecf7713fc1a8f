"""Fast generation against slow and obvious ways to say the same: what is drafted, and when."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from decoding import decode, make_model, prompts
from depthmix import DraftPlan, FastGeneration
from depthmix.decoding import drafting, pace
from depthmix.decoding.drafting import Drafter
from depthmix.decoding.pace import Pace
from depthmix.method.parts import find_parts, new_exits
from models import random_ids, tiny_model

PLANS = {
    "layers": st.sampled_from([(1,), (2,), (1, 3), (1, 2, 3)]),
    "thresholds": st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]), min_size=3, max_size=3),
    "vocabulary": st.sampled_from([None, (5,), tuple(range(0, 61, 2))]),
    "seed": st.integers(0, 2**31),
}


def random_exits(model, layers=(1, 2, 3), *, seed=0):
    """Exits that predict something, each something else, and now and then surely."""
    torch.manual_seed(seed)
    exits = new_exits(*find_parts(model), tuple(layers), rank=3)
    for parameter in exits.parameters():
        torch.nn.init.normal_(parameter)
    return exits


class Slow:
    """A model that is asked for one token at a time, by a pass over all of them."""

    def __init__(self, model, exits, plan):
        self.model, self.exits, self.plan = model, exits, plan
        self.backbone = find_parts(model)[0]

    @torch.no_grad()
    def look(self, ids, mask):
        """Give each exit's best token and its confidence, and the top's token, for each row."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        states = {}
        hooks = [
            layer.register_forward_hook(
                lambda _module, _args, output, number=number: states.update(
                    {number: output[0] if isinstance(output, tuple) else output}
                )
            )
            for number, layer in enumerate(self.backbone.layers, start=1)
        ]
        output = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        )
        for hook in hooks:
            hook.remove()
        said = {}
        for layer in self.plan.exits:
            logits = self.backbone.unembed(self.exits(layer, states[layer][:, -1]).double())
            known = torch.full_like(logits, -torch.inf)
            among = list(self.plan.vocabulary or range(logits.shape[-1]))
            known[:, among] = logits[:, among]
            sure, best = known.float().softmax(-1).max(-1)
            said[layer] = best, sure
        return said, output.logits[:, -1].argmax(-1)


def generate_unverified(slow, inputs, *, num_tokens, end):
    """Take each token from the first exit of which every row is sure, or from the top."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    ended = torch.zeros(len(ids), dtype=torch.bool)
    origins = [[] for _ in ids]
    for step in range(num_tokens):
        said, token = slow.look(ids, mask)
        origin = 4
        for layer, threshold in zip(slow.plan.exits, slow.plan.thresholds, strict=True):
            best, sure = said[layer]
            assume(not bool(((sure - threshold).abs() < 1e-5).any()))
            if step and bool((sure[~ended] >= threshold).all()):
                token, origin = best, layer
                break
        for row, is_over in enumerate(ended.tolist()):
            origins[row] += [] if is_over else [origin]
        token = token.masked_fill(ended, 0)
        ended = ended | (token == end)
        ids = torch.cat([ids, token[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(token)[:, None]], dim=1)
        if bool(ended.all()):
            break
    return ids, origins


@settings(max_examples=20)
@given(
    model_type=st.sampled_from(["llama", "mistral", "gpt2", "opt", "cohere"]),
    mixes=st.booleans(),
    batch=st.integers(1, 3),
    length=st.integers(1, 6),
    padded=st.booleans(),
    chunk=st.sampled_from([None, 1, 2]),
    end=st.sampled_from([None, 7, 20]),
    **PLANS,
)
def test_without_verification_the_first_sure_exit_has_the_last_word(
    model_type, mixes, batch, length, padded, chunk, end, layers, thresholds, vocabulary, seed
):
    model = make_model(model_type) if mixes else tiny_model(model_type).double()
    plan = DraftPlan(
        exits=layers,
        thresholds=tuple(thresholds[: len(layers)]),
        joint_threshold=1.0,  # counts for nothing
        max_drafts=1,
        vocabulary=vocabulary,
    )
    exits = random_exits(model, seed=seed % 50)
    inputs = prompts(batch, length, padded=padded, seed=seed)
    expected, origins = generate_unverified(
        Slow(model, exits, plan), inputs, num_tokens=8, end=-1 if end is None else end
    )
    fast = FastGeneration(model, exits, plan, verify=False)
    options = {"max_new_tokens": 8, "eos_token_id": end, "prefill_chunk_size": chunk}
    found = decode(fast, inputs, return_dict_in_generate=True, **options)
    assert torch.equal(found.sequences, expected)
    assert fast.origins == origins
    drafted = sum(layer < 4 for row in origins for layer in row)
    assert fast.num_drafted.total() == fast.num_accepted.total() == drafted
    # What comes back holds the keys and values that the model has of this text.
    whole = torch.cat([inputs["attention_mask"], torch.ones_like(expected[:, length:])], dim=1)
    dense = model(
        input_ids=expected[:, :-1],
        attention_mask=whole[:, :-1],
        position_ids=(whole.cumsum(-1) - 1).clamp(min=0)[:, :-1],
        use_cache=True,
    ).past_key_values
    for ours, truth in zip(found.past_key_values.layers, dense.layers, strict=True):
        width = min(ours.keys.shape[2], truth.keys.shape[2], expected.shape[1] - length)
        torch.testing.assert_close(ours.keys[:, :, -width:], truth.keys[:, :, -width:])
        torch.testing.assert_close(ours.values[:, :, -width:], truth.values[:, :, -width:])


def generate_verified(slow, ids, *, num_tokens, end):
    """Draft, verify, and take back, for one row, with a pass over everything at each step."""
    text, plan = ids[0].tolist(), slow.plan
    prompt = len(text)

    def look(tokens):
        said, token = slow.look(torch.tensor([tokens]), torch.ones(1, len(tokens), dtype=int))
        return {n: (int(best), float(sure)) for n, (best, sure) in said.items()}, int(token)

    text.append(look(text)[1])
    origins, counts, num_rounds, seen = [4], {"drafted": [], "accepted": []}, 0, []
    while len(text) - prompt < num_tokens and text[-1] != end:
        pending, layers, sures, trust = [], [], [], trust_of(seen)
        joint = trust
        while True:
            said, _ = look(text + pending)
            drafted = None
            if len(pending) < plan.max_drafts and len(text + pending) + 1 - prompt < num_tokens:
                for layer, threshold in zip(plan.exits, plan.thresholds, strict=True):
                    token, sure = said[layer]
                    assume(abs(sure * trust - threshold) > 1e-5)
                    assume(abs(joint * sure - plan.joint_threshold) > 1e-5)
                    if sure * trust >= threshold and joint * sure >= plan.joint_threshold:
                        drafted = layer, token, sure
                        break
            if drafted is None or drafted[1] == end:
                break
            layers.append(drafted[0])
            pending.append(drafted[1])
            sures.append(drafted[2])
            joint *= drafted[2]
        num_rounds += 1
        truths = [look(text + pending[:i])[1] for i in range(len(pending) + 1)]
        agreed = [draft == truth for draft, truth in zip(pending, truths, strict=False)]
        right = [*agreed, False].index(False)
        seen += [(sure, place < right) for place, sure in enumerate(sures[: right + 1])]
        counts["drafted"] += layers
        counts["accepted"] += layers[:right]
        text += [*pending[:right], truths[right]]
        origins += [*layers[:right], 4]
    return text, origins, counts, num_rounds


def trust_of(seen):
    """Weigh a row's drafts by their age, with some right ones before the first."""
    weights = drafting.MEMORY ** np.arange(len(seen))[::-1]
    sure = drafting.PRIOR + sum(weights * [sure for sure, _ in seen])
    right = drafting.PRIOR + sum(weights * [right for _, right in seen])
    return min(right / sure, 1.0)


class Eager(Pace):
    """Never pauses."""

    drafts = True


@settings(max_examples=20)
@given(
    model_type=st.sampled_from(["llama", "mistral", "gpt2", "opt"]),
    length=st.integers(2, 5),
    joint=st.sampled_from([0.0, 0.1, 0.4]),
    max_drafts=st.integers(1, 4),
    end=st.sampled_from([None, 7, 20]),
    same=st.booleans(),
    **PLANS,
)
def test_drafts_are_those_of_a_slow_cascade(
    model_type, length, joint, max_drafts, end, same, layers, thresholds, vocabulary, seed
):
    model = tiny_model(model_type).double()
    if same:  # exits that are often right, as the layers above do little
        for layer in find_parts(model)[0].layers[1:]:
            for parameter in layer.parameters():
                parameter.data *= 0.3
    plan = DraftPlan(
        exits=layers,
        thresholds=tuple(thresholds[: len(layers)]),
        joint_threshold=joint,
        max_drafts=max_drafts,
        vocabulary=vocabulary,
    )
    exits = random_exits(model, seed=seed % 50)
    if same:
        exits = new_exits(*find_parts(model), (1, 2, 3), rank=0)
    inputs = {"input_ids": random_ids(1, length, seed=seed)}
    text, origins, counts, num_rounds = generate_verified(
        Slow(model, exits, plan), inputs["input_ids"], num_tokens=10, end=end
    )
    fast = FastGeneration(model, exits, plan)
    fast._pace = Eager(plan.row_costs, num_layers=4)
    found = decode(fast, inputs, max_new_tokens=10, eos_token_id=end)
    assert found[0].tolist() == text
    assert fast.origins == [origins]
    assert sorted(fast.num_drafted.elements()) == sorted(counts["drafted"])
    assert sorted(fast.num_accepted.elements()) == sorted(counts["accepted"])
    assert fast.num_rounds == num_rounds


@given(
    rounds=st.lists(
        st.tuples(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4), st.integers(0, 4)),
        max_size=30,
    )
)
def test_trust_weighs_drafts_by_their_age(rounds):
    model = tiny_model()
    exits = new_exits(*find_parts(model), (1,), rank=0)
    drafter = Drafter(find_parts(model)[0], exits, DraftPlan.for_all((1,)), verify=True)
    drafter.begin(2)
    seen = []
    for sures, num_right in rounds:
        num_right = min(num_right, len(sures))
        drafter.judge(1, sures, num_right=num_right)
        seen += [(sure, place < num_right) for place, sure in enumerate(sures[: num_right + 1])]
        assert drafter.trust == pytest.approx([1.0, trust_of(seen)])


@given(
    costs=st.lists(st.floats(0.5, 4.0), min_size=3, max_size=3).map(lambda some: [1.0, *some]),
    rounds=st.lists(
        st.tuples(st.lists(st.integers(1, 12), max_size=8), st.integers(0, 9), st.integers(0, 6)),
        max_size=80,
    ),
)
def test_pace_judges_what_it_has_seen_by_its_age(costs, rounds):
    """Rounds of layers' positions, exits that were asked, and tokens that came of them."""
    own = Pace(costs, num_layers=4)
    slope = (costs[3] - costs[2]) / 4
    left, pause, work, tokens = 0, pace.FIRST_PAUSE, [], []
    for positions, asked, came in rounds:
        assert own.drafts == (left == 0)
        for number in positions:
            own.run(number)
        for _ in range(asked):
            own.check()
        own.end_round(float(came))
        if left:
            left = max(left - came, 0)
            continue
        known = [np.interp(n, pace.ROWS, costs) + max(n - 8, 0) * slope for n in positions]
        work.append(sum(known) / 4 + asked * pace.CHECK)
        tokens.append(came)
        weights = pace.MEMORY ** np.arange(len(work))[::-1]
        spent, gained = float(weights @ work), float(weights @ tokens)
        assume(abs(spent - pace.FIRST_TRIAL) > 1e-6 and abs(spent - gained) > 1e-6)
        if spent < pace.FIRST_TRIAL:
            continue
        if gained < spent:
            left, work, tokens = pause, [], []
            pause = min(2 * pause, pace.LONGEST_PAUSE)
        else:
            pause = pace.FIRST_PAUSE
