"""Lazy depth against the dense model under the same routing: tokens, logits and caches."""

from __future__ import annotations

from string import ascii_letters, digits

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from adapters import tuned_model
from decoding import DECODERS, assert_same, decode, make_model, prompts, top_1
from depthmix import LazyDepth, set_top_k
from depthmix.attachment import find_mixture_norm
from models import random_ids, tiny_model

ROUTINGS = ["all shallow", "all deep", "alternating", "random", "one row deep"]


def draw_depths(routing, *, batch, length, k, generator):
    """Say for each row and position which route is the deepest that it keeps."""
    if routing == "all shallow":
        return torch.zeros(batch, length, dtype=torch.long)
    if routing == "all deep":
        return torch.full((batch, length), k - 1)
    if routing == "alternating":
        return (torch.arange(length) % k).expand(batch, -1)
    if routing == "one row deep":
        depths = torch.zeros(batch, length, dtype=torch.long)
        depths[-1] = k - 1
        return depths
    return torch.randint(k, (batch, length), generator=generator)


def force(model, depths, *, k, generator, dtype=torch.float64):
    """Route by hand: random weights on the routes up to each position's depth, none above."""
    weights = torch.rand(*depths.shape, k, generator=generator, dtype=torch.float64) + 0.1
    weights = torch.where(torch.arange(k) <= depths[..., None], weights, 0.0)
    weights = (weights / weights.sum(-1, keepdim=True)).to(dtype)
    seen = {}

    def note(_model, args, kwargs):
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        seen["end"] = past + (args[0] if args else kwargs["input_ids"]).shape[1]

    model.register_forward_pre_hook(note, with_kwargs=True)
    mixture = find_mixture_norm(model).active_mixture
    mixture.weigh = lambda x: weights[:, seen["end"] - x.shape[1] : seen["end"]]


def generate(model, inputs, *, lazy, **options):
    generator = model
    if lazy:
        generator = lazy if isinstance(lazy, LazyDepth) else LazyDepth(model)
    return decode(generator, inputs, **options)


@settings(max_examples=60, deadline=None)
@given(
    model_type=st.sampled_from(DECODERS),
    routing=st.sampled_from(ROUTINGS),
    batch=st.integers(1, 3),
    length=st.integers(1, 7),
    new_tokens=st.integers(1, 9),
    padded=st.booleans(),
    late_layers=st.sampled_from([3, 4, [1, 4], [2, 3, 4], 1]),
    attention=st.sampled_from(["sdpa", "eager"]),
    seed=st.integers(0, 2**31),
)
def test_lazy_equals_dense(
    model_type, routing, batch, length, new_tokens, padded, late_layers, attention, seed
):
    generator = torch.Generator().manual_seed(seed)
    model = make_model(model_type, late_layers=late_layers)
    # In float64, transformers' eager attention makes NaN of padding: its softmax is float32.
    if model_type == "gemma2":  # has eager attention only
        padded = False
    else:
        model.set_attn_implementation("sdpa" if padded else attention)
    k = len(find_mixture_norm(model).active_mixture.late_layers)
    depths = draw_depths(routing, batch=batch, length=length + new_tokens, k=k, generator=generator)
    force(model, depths, k=k, generator=generator)
    inputs = prompts(batch, length, padded=padded, seed=seed)
    options = {"return_dict_in_generate": True, "output_logits": True}
    options["max_new_tokens"] = new_tokens
    expected = generate(model, inputs, lazy=False, **options)
    found = generate(model, inputs, lazy=True, **options)
    assert_same(found, expected, inputs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model_type", DECODERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, None)])
def test_narrow_types(model_type, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    model = make_model(model_type, dtype=dtype)
    depths = draw_depths("random", batch=2, length=14, k=3, generator=generator)
    force(model, depths, k=3, generator=generator, dtype=torch.float32)
    inputs = prompts(2, 5, padded=True)
    options = {"return_dict_in_generate": True, "output_logits": True}
    expected = generate(model, inputs, lazy=False, **options)
    found = generate(model, inputs, lazy=True, **options)
    if tolerance:
        assert_same(found, expected, inputs, rtol=tolerance, atol=tolerance)
    else:
        first = (found.logits[0] - expected.logits[0]).norm() / expected.logits[0].norm()
        assert first < 0.05


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 1.5, "top_k": 20},
        {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
        {"eos_token_id": list(range(3, 20))},
        {"max_length": 9, "max_new_tokens": None},
        {"num_return_sequences": 3, "do_sample": True},
        {"prefill_chunk_size": 2},
    ],
)
def test_ways_of_decoding(options):
    model, inputs = top_1(), prompts(3, 5, padded=True)
    lazy = LazyDepth(model)
    expected = generate(model, inputs, lazy=False, **options)
    found = generate(model, inputs, lazy=lazy, **options)
    assert torch.equal(found, expected)
    assert 2 <= lazy.layers_per_pass < 4


def test_stopping_criteria_and_streamer(capsys):
    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 8)

    class Decode:
        def decode(self, ids, **kwargs):
            return " ".join(map(str, ids))

    model, inputs = top_1(), prompts(1, 5, padded=False)
    texts = []
    for lazy in (False, True):
        found = generate(
            model,
            inputs,
            lazy=lazy,
            stopping_criteria=StoppingCriteriaList([AfterThree()]),
            streamer=TextStreamer(Decode(), skip_prompt=True),
        )
        assert found.shape == (1, 8)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize("where", ["argument", "generation_config"])
def test_stop_strings(where):
    model, inputs = top_1(), prompts(1, 5, padded=False)
    letters = {letter: i for i, letter in enumerate(ascii_letters + digits[:9])}
    backend = Tokenizer(models.BPE(letters, merges=[]))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    unstopped = decode(model, inputs)
    options = {"stop_strings": [tokenizer.decode(unstopped[0, 7])]}
    if where == "generation_config":
        options = {"generation_config": GenerationConfig(**options)}
    found = decode(LazyDepth(model), inputs, tokenizer=tokenizer, **options)
    assert torch.equal(found, unstopped[:, :8])
    assert torch.equal(found, decode(model, inputs, tokenizer=tokenizer, **options))
    with pytest.raises(ValueError, match="`stop_strings` need the model's `tokenizer`"):
        decode(LazyDepth(model), inputs, **options)


def test_a_conversation_goes_on_with_the_same_cache():
    """The cache that comes back is whole, so that the next call may be lazy or not."""
    model, inputs = top_1(), prompts(2, 5, padded=True)
    results = []
    for order in ((False, False), (True, True), (True, False), (False, True)):
        cache, turn = None, inputs
        for lazy in order:
            output = generate(
                model, turn, lazy=lazy, return_dict_in_generate=True, past_key_values=cache
            )
            cache = output.past_key_values
            sequences = torch.cat([output.sequences, random_ids(2, 2, seed=8)], dim=1)
            mask = torch.ones_like(sequences)
            mask[:, :5] = inputs["attention_mask"]
            turn = {"input_ids": sequences, "attention_mask": mask}
        results.append(output.sequences)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_custom_generate_is_the_same_door():
    model, inputs = top_1(), prompts(2, 5, padded=True)
    found = generate(model, inputs, lazy=False, custom_generate=LazyDepth(model))
    assert torch.equal(found, generate(model, inputs, lazy=True))


@pytest.mark.parametrize(("routing", "layers"), [("all shallow", 2), ("all deep", 4)])
def test_layers_run_only_when_they_are_needed(routing, layers):
    generator = torch.Generator().manual_seed(0)
    model, inputs = make_model(), prompts(2, 5, padded=True)
    depths = draw_depths(routing, batch=2, length=11, k=3, generator=generator)
    force(model, depths, k=3, generator=generator)
    runs = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda m, *_: runs.append(m.layer_idx))
    lazy = LazyDepth(model)
    generate(model, inputs, lazy=lazy)
    assert lazy.layers_per_pass == layers
    assert max(runs) == layers - 1
    assert len(runs) == 6 * layers


def test_a_deep_token_brings_the_layers_up_to_date_in_one_pass():
    generator = torch.Generator().manual_seed(0)
    model, inputs = make_model(), prompts(2, 5, padded=True)
    depths = torch.zeros(2, 11, dtype=torch.long)
    depths[1, 8] = 2  # the fourth token's pass, for one row
    force(model, depths, k=3, generator=generator)
    widths = []
    last = model.model.layers[-1].self_attn.q_proj
    last.register_forward_pre_hook(lambda _module, args: widths.append(args[0].shape[1]))
    generate(model, inputs, lazy=True)
    assert widths == [9]


def test_adapters_and_their_top_k():
    model = tuned_model(top_k=3)
    inputs = prompts(2, 5, padded=True)
    dense = generate(model, inputs, lazy=False)
    assert torch.equal(generate(model, inputs, lazy=True), dense)
    set_top_k(model, 1)
    assert model.peft_config["default"].top_k == 1
    expected = generate(model, inputs, lazy=False)
    assert not torch.equal(expected, dense)
    assert torch.equal(generate(model, inputs, lazy=True), expected)
    with pytest.raises(ValueError, match=r"`top_k` must be between 1 and the 3 routes"):
        set_top_k(model, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "was asked for beam search"),
        ({"assistant_early_exit": 2}, "was asked for assisted generation"),
        ({"prompt_lookup_num_tokens": 2}, "was asked for assisted generation"),
        ({"assistant_model": tiny_model()}, "`assistant_model` cannot be combined"),
        ({"cache_implementation": "static"}, "plain `DynamicCache`.*got StaticCache"),
        ({"use_cache": False}, "plain `DynamicCache`"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "no hidden states"),
    ],
)
def test_what_cannot_be_deferred_is_refused(options, message):
    model = top_1()
    with pytest.raises(ValueError, match=message):
        generate(model, prompts(2, 5, padded=False), lazy=True, **options)
    assert "forward" not in vars(model.model.layers[-1])


def test_unknown_layer_arguments_are_refused():
    model = top_1("bloom")
    with pytest.raises(ValueError, match="cannot defer layers that take `alibi`"):
        generate(model, prompts(1, 5, padded=False), lazy=True)


def test_a_model_without_a_mixture_is_refused():
    with pytest.raises(ValueError, match="`model` must have an active mixture"):
        LazyDepth(tiny_model())
