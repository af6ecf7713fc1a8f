"""Lazy depth against the dense model under the same routing: tokens, logits and caches."""

from __future__ import annotations

import warnings
from string import ascii_letters, digits

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from adapters import tuned_model
from decoding import (
    DECODERS,
    assert_same,
    call_at,
    decode,
    follow,
    make_model,
    own_functions,
    prompts,
    top_1,
)
from depthmix import FastGeneration, LazyDepth, MoDEConfig, attach, set_top_k
from depthmix.adapters.readout import reading_out
from depthmix.decoding.deferral import check_device
from depthmix.method.norm import active_mixture
from depthmix.models.generation import generate as answer_prompts
from depthmix.models.generation import warn_of_dense_routing
from depthmix.models.spec import ModelSpec
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
    mixture = active_mixture(model)
    mixture.weigh = lambda x: weights[:, seen["end"] - x.shape[1] : seen["end"]]


def generate(model, inputs, *, lazy, **options):
    generator = model
    if lazy:
        generator = lazy if isinstance(lazy, LazyDepth) else LazyDepth(model)
    return decode(generator, inputs, **options)


@settings(max_examples=60)
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
    k = len(active_mixture(model).late_layers)
    depths = draw_depths(routing, batch=batch, length=length + new_tokens, k=k, generator=generator)
    force(model, depths, k=k, generator=generator)
    inputs = prompts(batch, length, padded=padded, seed=seed)
    options = {"return_dict_in_generate": True, "output_logits": True}
    options["max_new_tokens"] = new_tokens
    expected = generate(model, inputs, lazy=False, **options)
    found = generate(model, inputs, lazy=True, **options)
    assert_same(found, expected, inputs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model_type", DECODERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 0.1)])
def test_narrow_types(model_type, dtype, tolerance):
    """Along the same tokens, each step's logits agree to a few roundings, as a relative norm."""
    generator = torch.Generator().manual_seed(0)
    model = make_model(model_type, dtype=dtype)
    depths = draw_depths("random", batch=2, length=14, k=3, generator=generator)
    force(model, depths, k=3, generator=generator, dtype=torch.float32)
    inputs = prompts(2, 5, padded=True)
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 9}
    expected = generate(model, inputs, lazy=False, **options)
    lazy = LazyDepth(model)
    processor = follow(expected.sequences)
    found = generate(model, inputs, lazy=lazy, logits_processor=processor, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert lazy.layers_per_pass < 4
    for ours, truth in zip(found.logits, expected.logits, strict=True):
        assert (ours - truth).norm() <= tolerance * truth.norm()


def test_a_pass_is_routed_once():
    """A router that answers differently each time would let depth and weights part."""
    model, inputs = make_model(top_k=1), prompts(2, 5, padded=True)
    router, shapes = active_mixture(model).router, []

    def turn(_router, args, logits):
        shapes.append(tuple(args[0].shape[:2]))
        return logits.mul_(0).index_fill_(-1, torch.tensor(len(shapes) % 3), 1.0)

    router.register_forward_hook(turn)
    options = {"return_dict_in_generate": True, "output_logits": True}
    expected = generate(model, inputs, lazy=False, **options)
    dense, shapes[:] = list(shapes), []
    lazy = LazyDepth(model)
    found = generate(model, inputs, lazy=lazy, **options)
    assert shapes == dense == [(2, 5)] + [(2, 1)] * 5
    assert_same(found, expected, inputs, rtol=1e-9, atol=1e-9)
    assert lazy.layers_per_pass < 4


def test_what_is_put_off_holds_no_masks():
    model, seen = make_model(), []
    force(model, torch.zeros(2, 11, dtype=torch.long), k=3, generator=torch.Generator())
    lazy = LazyDepth(model)

    def look(_input_ids):
        seen.extend(call.get("attention_mask") for layer in lazy._layers for call in layer.calls)

    inputs = prompts(2, 5, padded=True)
    generate(model, inputs, lazy=lazy, stopping_criteria=call_at(9, look))
    assert seen
    assert all(mask is None for mask in seen)


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
    assert model.peft_config["default"].top_k == 3  # what is saved
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


def test_a_plain_cache_must_have_the_models_layers():
    model, inputs = top_1("mistral"), prompts(1, 5, padded=False)
    for cache in (DynamicCache(), DynamicCache(config=tiny_model("llama").config)):
        with pytest.raises(ValueError, match=r"4 DynamicSlidingWindowLayer.*config=model.config"):
            generate(model, inputs, lazy=True, past_key_values=cache)
    found, expected = (
        generate(model, inputs, lazy=lazy, past_key_values=DynamicCache(config=model.config))
        for lazy in (True, False)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("way", [LazyDepth, FastGeneration])
def test_a_second_pass_of_each_step_is_refused(way):
    model, inputs = top_1(), prompts(2, 5, padded=True)
    with pytest.raises(ValueError, match=r"`guidance_scale` asks for, got 1.5; leave it out"):
        decode(way(model), inputs, guidance_scale=1.5)


@pytest.mark.parametrize("way", [LazyDepth, FastGeneration])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_everything_is_put_back_whatever_raises(way, error):
    def fail(_input_ids):
        raise error("stop")

    model, inputs = top_1(), prompts(2, 5, padded=True)
    expected, before = decode(model, inputs), own_functions(model)
    generator = way(model)
    with pytest.raises(error, match="stop"):
        decode(generator, inputs, stopping_criteria=call_at(8, fail))
    assert own_functions(model) == before
    assert torch.equal(decode(generator, inputs), expected)
    assert torch.equal(decode(model, inputs), expected)
    # While it takes its place in front of the layers.
    model.model.layers[-1].__dict__["forward"] = None
    with pytest.raises(TypeError):
        decode(generator, inputs)
    del model.model.layers[-1].forward
    assert own_functions(model) == before
    assert torch.equal(decode(generator, inputs), expected)


@pytest.mark.parametrize("way", [LazyDepth, FastGeneration])
def test_another_mixture_is_refused(way):
    model, inputs = tuned_model(top_k=1), prompts(2, 5, padded=True)
    generator, message = way(model), f"make a new {way.__name__}"
    with model.disable_adapter(), pytest.raises(RuntimeError, match=message):
        decode(generator, inputs)
    with reading_out(model, 3), pytest.raises(RuntimeError, match=message):
        decode(generator, inputs)
    model.add_adapter("other", MoDEConfig(target_modules=["q_proj"], late_layers=2))
    model.set_adapter("other")
    with pytest.raises(RuntimeError, match=message):
        decode(generator, inputs)
    model.set_adapter("default")
    assert torch.equal(decode(generator, inputs), decode(model, inputs))


def test_a_cache_is_not_handed_back_on_mps():
    check_device(torch.device("mps"), outlives=False, name="Lazy depth")
    check_device(torch.device("cpu"), outlives=True, name="Lazy depth")
    with pytest.raises(ValueError, match="cannot hand a cache back on the device mps"):
        check_device(torch.device("mps"), outlives=True, name="Lazy depth")


@pytest.mark.parametrize(
    ("layer_types", "message"),
    [
        (["full_attention"] * 4, "cannot defer layers that take `position_embeddings`"),
        (["chunked_attention"] * 3 + ["full_attention"], "attend by chunks"),
    ],
)
@pytest.mark.parametrize("way", [LazyDepth, FastGeneration])
def test_llama_4_is_refused(way, layer_types, message):
    model = tiny_model(
        "llama4_text", layer_types=layer_types, intermediate_size_mlp=24, num_local_experts=2
    )
    attach(model, late_layers=3)
    with pytest.raises(ValueError, match=message):
        decode(way(model), prompts(1, 5, padded=False))


def test_options_that_do_nothing_are_not_passed_over():
    for options in ({"exits": "there"}, {"verify": False}):
        with pytest.raises(ValueError, match="needs `fast`, which drafts"):
            answer_prompts(ModelSpec(name="nowhere"), ["1 + 1 ="], **options)
    for top_k in (None, 3):
        with pytest.warns(UserWarning, match="`lazy` skips no layer while each .* all 3 routes"):
            warn_of_dense_routing(active_mixture(make_model(top_k=top_k)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_dense_routing(active_mixture(make_model(top_k=2)))


def test_unknown_layer_arguments_are_refused():
    model = top_1("bloom")
    with pytest.raises(ValueError, match="cannot defer layers that take `alibi`"):
        generate(model, prompts(1, 5, padded=False), lazy=True)


def test_a_model_without_a_mixture_is_refused():
    with pytest.raises(ValueError, match="`model` must have an active mixture"):
        LazyDepth(tiny_model())
