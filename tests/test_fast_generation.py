"""Fast generation against the dense model: tokens, logits, caches, and the work it saves."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList, TextStreamer
from transformers.generation.streamers import BaseStreamer

from adapters import tuned_model
from decoding import DECODERS, assert_same, decode, follow, make_model, prompts, top_1
from depthmix import DraftPlan, FastGeneration, LazyDepth, attach, set_top_k
from depthmix.decoding.lookahead import align_cache
from depthmix.decoding.pace import Pace
from depthmix.method.found_exits import find_exits
from depthmix.method.norm import active_mixture, find_mixture_norm
from depthmix.method.parts import find_parts, new_exits
from models import random_ids, tiny_model

WHOLE = {"return_dict_in_generate": True, "output_logits": True}
ACCEPTANCES = ["all", "none", "alternating", "random", "one row"]


def plan_all(*layers, num_drafts=4, **options):
    """Draft at the first of these layers whatever its confidence, so many tokens at a time."""
    settings = {"threshold": 0.0, "joint_threshold": 0.0, "max_drafts": num_drafts, **options}
    return DraftPlan.for_all(layers, **settings)


def drafting(model, *layers, exits=None, verify=True, **options):
    """Draft with some layers, by default the first late one."""
    generator = FastGeneration(model, exits)
    layers = layers or generator.exits.layers[:1]
    fast = FastGeneration(model, exits, plan_all(*layers, **options), verify=verify)
    fast._pace = AlwaysOn(fast.plan.row_costs, num_layers=fast.backbone.num_hidden_layers)
    return fast


def random_exits(model, layers, *, rank=3, seed=5):
    """Exits that predict something, each something else."""
    torch.manual_seed(seed)
    exits = new_exits(*find_parts(model), tuple(layers), rank=rank)
    for parameter in exits.parameters():
        torch.nn.init.normal_(parameter)
    return exits


def route_in_float64(model):
    """Route by the content alone, but in float64, so that products of other widths round alike."""
    mixture = active_mixture(model)
    matrix = torch.randn(mixture.router.weight.shape, generator=torch.Generator().manual_seed(4))

    def weigh(x):
        logits = x.double() @ matrix.double().T
        if mixture.top_k is not None:
            lowest_kept = logits.topk(mixture.top_k).values[..., -1:]
            logits = logits.masked_fill(logits < lowest_kept, -torch.inf)
        return logits.softmax(-1)

    mixture.weigh = weigh
    return model


class AlwaysOn(Pace):
    """A pace that never pauses, so that work can be counted."""

    drafts = True


def agree_by_script(model, acceptance, *, batch, seed=0):
    """Let the layers above the first late one do nothing, and let drafts be wrong by a script.

    All layers then predict alike, and a draft is what the ensemble chooses, or, from the negated
    state, the token that it likes least.
    """
    norm = find_mixture_norm(model)
    first = norm.active_mixture.late_layers[0]
    with torch.no_grad():
        for layer in norm.backbone.layers[first:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    generator = torch.Generator().manual_seed(seed)
    answer, calls = norm.answer_alone, []

    def answer_alone(layer, hidden_states):
        calls.append(layer)
        right = {
            "all": torch.ones(batch, dtype=torch.bool),
            "none": torch.zeros(batch, dtype=torch.bool),
            "alternating": (torch.arange(batch) + len(calls)) % 2 == 0,
            "random": torch.rand(batch, generator=generator) < 0.6,
            "one row": torch.arange(batch) == 0,
        }[acceptance]
        normed = answer(layer, hidden_states)
        return torch.where(right[:, None, None], normed, -normed)

    norm.answer_alone = answer_alone
    return model


@settings(max_examples=60)
@given(
    model_type=st.sampled_from(DECODERS),
    batch=st.integers(1, 3),
    length=st.integers(1, 7),
    new_tokens=st.integers(1, 12),
    padded=st.booleans(),
    late_layers=st.sampled_from([None, [4], [1, 4], [2, 3, 4], [1, 2, 3, 4], [3, 4]]),
    layers=st.sampled_from([(1,), (2,), (3,), (1, 2), (1, 3), (1, 2, 3)]),
    thresholds=st.lists(st.sampled_from([0.0, 0.2, 0.6, 1.0]), min_size=3, max_size=3),
    joint_threshold=st.sampled_from([0.0, 0.1, 0.6]),
    max_drafts=st.integers(1, 5),
    vocabulary=st.sampled_from([None, (5,), tuple(range(0, 61, 2))]),
    top_k=st.sampled_from([None, 1]),
    attention=st.sampled_from(["sdpa", "eager"]),
    seed=st.integers(0, 2**31),
)
def test_fast_generation_equals_dense(
    model_type,
    batch,
    length,
    new_tokens,
    padded,
    late_layers,
    layers,
    thresholds,
    joint_threshold,
    max_drafts,
    vocabulary,
    top_k,
    attention,
    seed,
):
    """Any exits, in whatever mood, on a model with any mixture or none: the same logits."""
    if late_layers is None:
        model = tiny_model(model_type).requires_grad_(False).double().eval()
    else:
        model = route_in_float64(make_model(model_type, late_layers=late_layers, top_k=top_k))
    # In float64, transformers' eager attention makes NaN of padding: its softmax is float32.
    if model_type == "gemma2":  # has eager attention only
        padded = False
    else:
        model.set_attn_implementation("sdpa" if padded else attention)
    plan = DraftPlan(
        exits=layers,
        thresholds=tuple(thresholds[: len(layers)]),
        joint_threshold=joint_threshold,
        max_drafts=max_drafts,
        vocabulary=vocabulary,
    )
    fast = FastGeneration(model, random_exits(model, [1, 2, 3], seed=seed % 7), plan)
    inputs = prompts(batch, length, padded=padded, seed=seed)
    expected = decode(model, inputs, max_new_tokens=new_tokens, **WHOLE)
    found = decode(fast, inputs, max_new_tokens=new_tokens, **WHOLE)
    # Eager attention's softmax is float32, and rows here have other paddings than the dense ones.
    tolerance = 1e-5 if model.config._attn_implementation == "eager" else 1e-9
    assert_same(found, expected, inputs, rtol=tolerance, atol=tolerance)
    assert all(len(row) == new_tokens for row in fast.origins)
    drafted = Counter(layer for row in fast.origins for layer in row if layer < 4)
    assert drafted == fast.num_accepted


@settings(max_examples=30)
@given(
    late_layers=st.sampled_from([[1, 4], [2, 3, 4], [1, 2, 3, 4], [3, 4]]),
    draft=st.integers(0, 2),
    num_drafts=st.integers(1, 5),
    batch=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_late_layers_may_draft(late_layers, draft, num_drafts, batch, seed):
    model = route_in_float64(make_model(late_layers=late_layers))
    lower = late_layers[:-1]
    fast = drafting(model, lower[draft % len(lower)], num_drafts=num_drafts)
    inputs = prompts(batch, 5, padded=True, seed=seed)
    expected = decode(model, inputs, max_new_tokens=10, **WHOLE)
    assert_same(decode(fast, inputs, max_new_tokens=10, **WHOLE), expected, inputs)
    assert fast.num_drafted.total() > 0


@settings(max_examples=40)
@given(
    model_type=st.sampled_from(["llama", "mistral", "qwen3"]),
    acceptance=st.sampled_from(ACCEPTANCES),
    batch=st.integers(1, 3),
    new_tokens=st.integers(1, 16),
    padded=st.booleans(),
    num_drafts=st.integers(1, 5),
    ends=st.booleans(),
    repetition_penalty=st.sampled_from([1.0, 1.7]),
    seed=st.integers(0, 2**31),
)
def test_any_acceptance_equals_dense(
    model_type,
    acceptance,
    batch,
    new_tokens,
    padded,
    num_drafts,
    ends,
    repetition_penalty,
    seed,
):
    """Rows are ahead by their own numbers of tokens, end within drafts, and have to go back."""
    model = route_in_float64(make_model(model_type))
    agree_by_script(model, acceptance, batch=batch, seed=seed)
    fast = drafting(model, num_drafts=num_drafts)
    inputs = prompts(batch, 5, padded=padded, seed=seed)
    options = {
        "max_new_tokens": new_tokens,
        "eos_token_id": list(range(3, 9)) if ends else None,
        "repetition_penalty": repetition_penalty,
        **WHOLE,
    }
    expected = decode(model, inputs, **options)
    found = decode(fast, inputs, **options)
    assert_same(found, expected, inputs, rtol=1e-9, atol=1e-9)
    if not ends and repetition_penalty == 1.0 and acceptance in ("all", "none"):
        assert fast.num_accepted.total() == fast.num_drafted.total() * (acceptance == "all")


def widths(model):
    """Note how many positions each layer takes in at each run."""
    seen = {layer.self_attn.layer_idx: [] for layer in model.model.layers}
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_pre_hook(
            lambda _module, args, index=layer.self_attn.layer_idx: seen[index].append(
                args[0].shape[1]
            )
        )
    return seen


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("acceptance", "verified", "layers"),
    [
        ("all", [4, 4, 3], (4 + 11 * 2 + 3 * 2) / 12),
        ("none", [4, 4, 4, 4, 4, 4, 4, 4, 3, 2, 1], (4 + 38 * 2 + 11 * 2) / 12),
    ],
)
def test_each_layer_processes_each_position_once(batch, acceptance, verified, layers):
    model = agree_by_script(make_model(), acceptance, batch=batch)
    fast = drafting(model, num_drafts=3)
    seen = widths(model)
    decode(fast, prompts(batch, 5, padded=False), max_new_tokens=12)
    assert fast.plan.exits == (2,)
    assert seen[0] == seen[1] == [5] + [1] * sum(verified)
    assert seen[2] == seen[3] == [5, *verified]
    assert fast.layers_per_token == pytest.approx(layers)
    assert fast.num_drafted.total() == batch * (sum(verified) - len(verified))
    assert fast.acceptance_rate == (acceptance == "all")


def test_rows_do_not_wait_for_each_other():
    """A row whose drafts are right goes on while the other one's are wrong."""
    passes = {}
    for acceptance in ("alternating", "none"):
        model = agree_by_script(make_model(), acceptance, batch=2)
        seen = widths(model)
        fast = drafting(model, num_drafts=1)
        decode(fast, prompts(2, 5, padded=False), max_new_tokens=21)
        passes[acceptance] = len(seen[3]) - 1
    # With one draft a round, each row's is right every other time, and never both rows' at once.
    assert passes == {"alternating": 14, "none": 20}


def test_the_end_within_a_draft():
    model, inputs = agree_by_script(make_model(), "all", batch=3), prompts(3, 5, padded=True)
    free = decode(model, inputs, max_new_tokens=12)
    ends = [int(free[0, 6]), int(free[1, 9])]
    options = {"max_new_tokens": 12, "eos_token_id": ends}
    expected = decode(model, inputs, **options)
    assert (expected[0, 7:] == 0).all()
    fast = drafting(model, num_drafts=5)
    assert torch.equal(decode(fast, inputs, **options), expected)
    assert fast.num_accepted.total() <= fast.num_drafted.total()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 1.5, "top_k": 20},
        {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
        {"eos_token_id": list(range(3, 20))},
        {"eos_token_id": 7, "min_new_tokens": 4},
        {"max_length": 9, "max_new_tokens": None},
        {"num_return_sequences": 3, "do_sample": True},
        {"prefill_chunk_size": 2},
        {"prefill_chunk_size": 1},
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2"])
def test_ways_of_decoding(model_type, options):
    model, inputs = top_1(model_type), prompts(3, 5, padded=True)
    fast = drafting(model)
    expected = decode(model, inputs, **{"max_new_tokens": 9, **options})
    found = decode(fast, inputs, **{"max_new_tokens": 9, **options})
    assert torch.equal(found, expected)
    assert 0 <= fast.acceptance_rate <= 1
    assert list(map(len, fast.origins)) == count_tokens(found[:, 5:], options.get("eos_token_id"))


def count_tokens(rows, ends):
    """Count each row's tokens up to its end."""
    ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
    places = [[at for at, token in enumerate(row) if token in ends] for row in rows.tolist()]
    return [found[0] + 1 if found else rows.shape[1] for found in places]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("prompt", [1, 5, 6])
def test_a_streamer_finds_each_origin_when_it_gets_the_token(prompt, verify):
    """Also after a prompt of one token, and one whose last part is one."""
    model = agree_by_script(make_model(), "random", batch=1)
    fast = drafting(model, num_drafts=3, verify=verify)
    seen = []

    class Asking(BaseStreamer):
        def put(self, value):
            seen.append((value.numel(), list(fast.origins[0])))

        def end(self):
            seen.append("end")

    decode(
        fast,
        prompts(1, prompt, padded=False),
        max_new_tokens=9,
        prefill_chunk_size=5,
        streamer=Asking(),
    )
    (first, *others), end = seen[:-1], seen[-1]
    assert (first, end) == ((prompt, []), "end")
    origins = fast.origins[0]
    assert [known for _, known in others] == [origins[: n + 1] for n in range(9)]
    assert set(origins) >= ({2, 4} if verify else {2})
    assert Counter(origins)[2] == fast.num_accepted[2]


def test_no_draft_is_noted_after_a_rows_end():
    """Drafts of rows that have ended count for nothing, verified or not."""
    model, inputs = agree_by_script(make_model(), "all", batch=3), prompts(3, 5, padded=True)
    free = decode(model, inputs, max_new_tokens=12)
    options = {"max_new_tokens": 12, "eos_token_id": [int(free[0, 6]), int(free[1, 9])]}
    for verify in (True, False):
        fast = drafting(model, num_drafts=5, verify=verify)
        found = decode(fast, inputs, **options)
        lengths = count_tokens(found[:, 5:], options["eos_token_id"])
        assert list(map(len, fast.origins)) == lengths
        assert min(lengths) < 12
        assert fast.num_accepted == Counter(n for row in fast.origins for n in row if n < 4)
        assert fast.num_accepted.total() <= fast.num_drafted.total()


def test_all_positions_of_a_model_with_learned_ones():
    model, inputs = top_1("gpt2"), prompts(2, 40, padded=True)
    options = {"max_new_tokens": 24}  # 64 positions in all
    assert torch.equal(
        decode(drafting(model, num_drafts=5), inputs, **options),
        decode(model, inputs, **options),
    )


def test_embeddings_as_the_prompt():
    model = top_1()
    inputs = {"inputs_embeds": model.get_input_embeddings()(random_ids(2, 4))}
    assert torch.equal(decode(drafting(model), inputs), decode(model, inputs))


def test_stopping_criteria_and_streamer(capsys):
    class RowByRow(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] % 3 == 0

    class Decode:
        def decode(self, ids, **kwargs):
            return " ".join(map(str, ids))

    model, texts, sequences = top_1(), [], []
    for generator in (model, drafting(model)):
        sequences.append([])
        for batch, eos in ((1, None), (3, None), (3, 2)):
            streamer = TextStreamer(Decode(), skip_prompt=True) if batch == 1 else None
            found = decode(
                generator,
                prompts(batch, 5, padded=True),
                max_new_tokens=14,
                eos_token_id=eos,
                stopping_criteria=StoppingCriteriaList([RowByRow()]),
                streamer=streamer,
            )
            sequences[-1].append(found)
        texts.append(capsys.readouterr().out)
    assert all(map(torch.equal, *sequences))
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_a_conversation_goes_on_with_the_same_cache(model_type):
    """The cache that comes back is the dense one, so that the next call may speculate or not."""
    model, inputs = top_1(model_type), prompts(2, 5, padded=True)
    fast = drafting(model)
    results = []
    for order in ((0, 0), (1, 1), (1, 0), (0, 1)):
        cache, turn = None, inputs
        for is_fast in order:
            generator = fast if is_fast else model
            output = decode(generator, turn, return_dict_in_generate=True, past_key_values=cache)
            cache = output.past_key_values
            assert not any(getattr(layer, "record_past", False) for layer in cache.layers)
            sequences = torch.cat([output.sequences, random_ids(2, 2, seed=8)], dim=1)
            mask = torch.ones_like(sequences)
            mask[:, :5] = inputs["attention_mask"]
            turn = {"input_ids": sequences, "attention_mask": mask}
        results.append(output.sequences)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_same_tokens_as_transformers_own_early_exit():
    model, inputs = make_model(), prompts(1, 5, padded=False)
    expected = decode(model, inputs, max_new_tokens=20)
    early_exit = decode(model, inputs, max_new_tokens=20, assistant_early_exit=3)
    found = decode(drafting(model, 3), inputs, max_new_tokens=20)
    assert torch.equal(found, expected)
    assert torch.equal(early_exit, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 0.1)])
def test_narrow_types(dtype, tolerance):
    """Along the same tokens, each step's logits agree to a few roundings, as a relative norm."""
    model, inputs = make_model(dtype=dtype), prompts(2, 5, padded=True)
    options = {**WHOLE, "max_new_tokens": 12}
    expected = decode(model, inputs, **options)
    fast = drafting(model)
    processor = follow(expected.sequences)
    found = decode(fast, inputs, logits_processor=processor, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert fast.num_drafted.total() > 0
    for ours, truth in zip(found.logits, expected.logits, strict=True):
        assert (ours - truth).norm() <= tolerance * truth.norm()


def test_adapters_and_custom_generate():
    model, inputs = tuned_model(top_k=3), prompts(2, 5, padded=True)
    fast = drafting(model)
    for top_k in (3, 1):
        set_top_k(model, top_k)
        expected = decode(model, inputs)
        assert torch.equal(decode(fast, inputs), expected)
        assert torch.equal(decode(model, inputs, custom_generate=fast), expected)
        assert torch.equal(decode(LazyDepth(model), inputs), expected)


@settings(max_examples=50)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    new=st.integers(0, 4),
    data=st.data(),
)
def test_aligned_rows_keep_their_own_states(lengths, new, data):
    """Each row of the cache ends with the states that are not taken from it."""
    surplus = [data.draw(st.integers(0, new)) for _ in lengths]
    before, cache = max(lengths) + new, DynamicCache()
    if before == 0:
        return
    states = torch.arange(before, dtype=torch.float64).expand(len(lengths), 1, before)[..., None]
    cache.update(states, -states, 0)
    after = max(length + new - own for length, own in zip(lengths, surplus, strict=True))
    align_cache(cache, surplus, length=after)
    layer = cache.layers[0]
    assert layer.keys.shape == (len(lengths), 1, after, 1)
    assert torch.equal(layer.values, -layer.keys)
    for row, (length, own) in enumerate(zip(lengths, surplus, strict=True)):
        kept = length + new - own
        expected = states[row, 0, before - own - kept : before - own]
        assert torch.equal(layer.keys[row, 0, after - kept :], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "Fast generation needs greedy.*was asked for beam search"),
        ({"assistant_early_exit": 2}, "was asked for assisted generation"),
        ({"assistant_model": tiny_model()}, "cannot be combined with fast generation"),
        ({"cache_implementation": "static"}, "plain `DynamicCache`.*got StaticCache"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "no hidden states"),
    ],
)
def test_what_cannot_be_deferred_is_refused(options, message):
    model = top_1()
    with pytest.raises(ValueError, match=message):
        decode(drafting(model), prompts(2, 5, padded=False), **options)
    assert "forward" not in {**vars(model), **vars(model.model.layers[0])}


def test_unforeseeable_arguments_are_refused():
    model, inputs = top_1("gpt2"), prompts(1, 5, padded=False)
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    with pytest.raises(ValueError, match="cannot foresee `token_type_ids`"):
        decode(drafting(model), inputs)
    assert "_replaced_forward" not in vars(find_mixture_norm(model))
    with pytest.raises(ValueError, match="takes `position_ids`, and BloomForCausalLM does not"):
        decode(drafting(top_1("bloom")), prompts(1, 5, padded=False))


@pytest.mark.parametrize("paused", [True, False])
def test_a_pause_is_the_models_own_pass(paused):
    """While drafting pauses and no row is ahead, nothing of ours acts, and it can begin again."""

    class Alternating(Pace):
        """Drafts in every second round, or in none."""

        num_rounds = 0

        @property
        def drafts(self):
            return not paused and self.num_rounds % 2 == 1

        def end_round(self, tokens):
            self.num_rounds += 1

    model = route_in_float64(make_model())
    fast = drafting(model, num_drafts=2)
    fast._pace = Alternating(fast.plan.row_costs, num_layers=4)
    inputs = prompts(3, 5, padded=True)
    expected = decode(model, inputs, max_new_tokens=12, **WHOLE)
    found = decode(fast, inputs, max_new_tokens=12, **WHOLE)
    assert_same(found, expected, inputs, rtol=1e-9, atol=1e-9)
    assert (fast.num_drafted.total() == 0) == paused
    if paused:
        assert fast.layers_per_token == 4


def test_exits_that_were_trained_with_the_model_draft():
    model = tiny_model().requires_grad_(False).double().eval()
    attach(model, late_layers=1, exits=[1, 3], exit_rank=2)
    fast = FastGeneration(model, plan=plan_all(1, 3))
    assert fast.exits is find_exits(model)
    inputs = prompts(2, 5, padded=True)
    expected = decode(model, inputs, **WHOLE)
    assert_same(decode(fast, inputs, **WHOLE), expected, inputs, rtol=1e-9, atol=1e-9)
    assert fast.num_drafted[1] > 0


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (plan_all(1), r"`plan` must draft with exits that there are \(\[2, 3\]\), got layer 1"),
        (plan_all(2, vocabulary=(61,)), r"tokens that the model has \(61\), got token 61"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan, message):
    with pytest.raises(ValueError, match=message):
        FastGeneration(make_model(), plan=plan)


@pytest.mark.parametrize("batch", [1, 3])
def test_without_verification_a_sure_exit_has_the_last_word(batch):
    model, inputs = tiny_model().eval(), prompts(batch, 7, padded=True)
    backbone, norm = find_parts(model)
    with torch.no_grad():
        for layer in backbone.layers[2:]:  # they do nothing, so that layer 2 says what the top says
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    exits = new_exits(backbone, norm, (1, 2), rank=0)
    fast = FastGeneration(model, exits, plan_all(2), verify=False)
    found = decode(fast, inputs, max_new_tokens=8)
    assert torch.equal(found, decode(model, inputs, max_new_tokens=8))
    assert fast.num_drafted == fast.num_accepted == {2: 7 * batch}
    assert fast.origins == [[4] + [2] * 7] * batch  # the prompt's pass gives the first one


def test_models_that_cannot_draft_are_refused():
    with pytest.raises(ValueError, match="`exits` must be given for a mixture of the final layer"):
        FastGeneration(make_model(late_layers=1))
    with pytest.raises(ValueError, match="`exits` must be given for a model without a mixture"):
        FastGeneration(tiny_model())

    class Deeper:
        layers = (2, 5)

        def __call__(self, layer, hidden_states):
            return hidden_states

    with pytest.raises(ValueError, match="must be below the final layer, 4, got layer 5"):
        FastGeneration(tiny_model(), Deeper())


def test_exits_that_do_not_fit_are_refused():
    model = tiny_model()
    for name, number in (("hidden_size", 32), ("num_hidden_layers", 6)):
        other = random_exits(tiny_model(**{name: number}), [1, 2])
        with pytest.raises(ValueError, match=rf"as its `{name}`, got exits for {number}; put"):
            FastGeneration(model, other)


def test_a_dense_plan_refuses_what_its_loop_cannot_do():
    """As `custom_generate` it would stand for beam search, and be greedy."""
    model, inputs = top_1(), prompts(1, 5, padded=False)
    fast = FastGeneration(model, plan=DraftPlan.for_all((2,), stay_dense=True))
    expected = decode(model, inputs, num_beams=3)
    assert torch.equal(decode(fast, inputs, num_beams=3), expected)
    with pytest.raises(ValueError, match="was asked for beam search"):
        decode(model, inputs, num_beams=3, custom_generate=fast)
    assert torch.equal(decode(model, inputs, custom_generate=fast), decode(model, inputs))


@pytest.mark.parametrize("verify", [True, False])
def test_the_head_is_taken_as_it_is_when_a_call_begins(verify):
    """A few of its rows are kept, and it may be trained, cast or moved meanwhile."""
    model, inputs = tiny_model().double().requires_grad_(False), prompts(2, 5, padded=True)
    exits, plan = random_exits(model, [1, 2]), plan_all(1, vocabulary=tuple(range(3, 40)))
    fast = FastGeneration(model, exits, plan, verify=verify)
    decode(fast, inputs)
    model.get_output_embeddings().weight.mul_(-1)
    model.float()
    other = FastGeneration(model, exits, plan, verify=verify)
    assert torch.equal(decode(fast, inputs), decode(other, inputs))
    assert fast._drafter.head._weight.dtype == torch.float32
    assert torch.equal(fast._drafter.head._weight, model.get_output_embeddings().weight[3:40])


@pytest.mark.parametrize(("size", "right"), [(None, 10), (1, 12), (2, 12), (3, 10), (4, 12)])
def test_parts_of_a_prompt_draft_nothing(size, right):
    """Nine tokens, in parts of which the last may be one token, from which a round begins."""
    model, inputs = agree_by_script(make_model(), "all", batch=2), prompts(2, 9, padded=False)
    fast = drafting(model)
    decode(fast, inputs, max_new_tokens=8, prefill_chunk_size=size)
    assert fast.num_drafted.total() == fast.num_accepted.total() == right
    assert [len(row) for row in fast.origins] == [8, 8]
    assert fast.num_rounds == 2


def test_only_drafts_with_room_are_counted():
    """A row that is ahead of the others may have no room for a draft that they have."""
    model = agree_by_script(make_model(), "one row", batch=2)
    fast = drafting(model, num_drafts=3)
    decode(fast, prompts(2, 5, padded=False), max_new_tokens=12)
    right = fast.num_accepted.total()
    assert right == sum(layer == 2 for row in fast.origins for layer in row) > 0
    # The other row drafts wrongly: each of its rounds counts what was drafted after a token of it.
    assert right < fast.num_drafted.total() <= right + 3 * fast.num_rounds


def test_a_head_that_somebody_has_wrapped_is_asked():
    """Few positions are multiplied by another way only where the head does nothing more."""
    model, inputs = tiny_model().requires_grad_(False), prompts(1, 5, padded=False)
    head = model.get_output_embeddings()
    own = head.forward
    head.forward = lambda states: own(states).roll(1, dims=-1)
    expected = decode(model, inputs, max_new_tokens=12)
    fast = FastGeneration(model, random_exits(model, [1]), plan_all(1))
    assert torch.equal(decode(fast, inputs, max_new_tokens=12), expected)
    assert fast.num_drafted.total() > 0


def test_a_model_that_gives_its_norms_output_the_shape_of_its_input():
    model = tiny_model("gpt_bigcode", n_inner=24).double().requires_grad_(False)
    inputs = prompts(2, 5, padded=True)
    expected = decode(model, inputs, **WHOLE)
    fast = FastGeneration(model, random_exits(model, [1, 2]), plan_all(1))
    assert_same(decode(fast, inputs, **WHOLE), expected, inputs, rtol=1e-9, atol=1e-9)
    assert fast.num_drafted.total() > 0


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda fast: pickle.loads(pickle.dumps(fast))])
@pytest.mark.parametrize("guard", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_copies_and_guards(clone, guard):
    model, inputs = make_model(), prompts(2, 5, padded=True)
    fast = FastGeneration(model, random_exits(model, [1, 2]), plan_all(1))
    expected = decode(model, inputs)
    for one in (fast, clone(fast)):
        with guard():
            assert torch.equal(decode(one, inputs), expected)
