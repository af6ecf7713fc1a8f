"""One call defers a model's layers at a time; others get ordinary answers, and nothing stays."""

from __future__ import annotations

import copy
import pickle
import sys
import threading

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from adapters import tuned_model
from decoding import call_at, decode, own_functions, prompts, top_1
from depthmix import FastGeneration, LazyDepth, MoDEConfig, attach, detach
from depthmix.adapters.readout import reading_out
from depthmix.decoding.stand_ins import StandIn
from depthmix.method.norm import find_mixture_norm
from models import random_ids, tiny_model

INPUTS = prompts(2, 5, padded=True)
OTHERS = prompts(3, 4, padded=True, seed=9)
WAYS = pytest.mark.parametrize("way", [LazyDepth, FastGeneration])


def meanwhile(way, model, function, *, at=8, inputs=INPUTS, **options):
    """Generate, and call a function when there are so many tokens; give its result, too."""
    results = []
    criteria = call_at(at, lambda _ids: results.append(function()))
    found = decode(way(model), inputs, stopping_criteria=criteria, **options)
    return found, results[0]


def in_thread(function, *args, **options):
    """Run a function in another thread; give its result or what it raises."""
    results = []

    def run():
        try:
            results.append(function(*args, **options))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, name="B")
    thread.start()
    thread.join()
    return results[0]


USES = {
    "generate": lambda model: decode(model, OTHERS),
    "a pass": lambda model: model(**OTHERS).logits,
    "a pass with its cache": lambda model: model(**OTHERS, use_cache=True).logits,
    "the decoder alone": lambda model: model.model(**OTHERS).last_hidden_state,
    "the early exit": lambda model: decode(
        model, {"input_ids": OTHERS["input_ids"][:1]}, assistant_early_exit=2
    ),
    "a reading": lambda model: read(model),
}


def read(model):
    with reading_out(model, 3):
        return model(**OTHERS).logits


@WAYS
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("threaded", [False, True])
def test_others_get_ordinary_answers_meanwhile(way, use, threaded):
    model = top_1()
    expected, truth = decode(model, INPUTS), USES[use](model)
    before = own_functions(model)

    def function():
        return in_thread(USES[use], model) if threaded else USES[use](model)

    found, result = meanwhile(way, model, function)
    assert torch.equal(found, expected)
    assert torch.equal(result, truth)
    assert own_functions(model) == before


@WAYS
def test_a_layer_may_call_the_model_within_a_pass(way):
    model, results = top_1(), []
    expected, truth = decode(model, INPUTS), model(**OTHERS).logits
    hooked = []

    def call(_module, _args):
        if not hooked and threading.current_thread() is threading.main_thread():
            hooked.append(True)
            results.append(model(**OTHERS).logits)

    handle = model.model.layers[0].self_attn.register_forward_pre_hook(call)
    assert torch.equal(decode(way(model), INPUTS), expected)
    assert torch.equal(results[0], truth)
    hooked.clear()
    handle.remove()

    def decoder_alone(_module, _args):
        model.model(**OTHERS)

    model.model.layers[0].self_attn.register_forward_pre_hook(decoder_alone)
    with pytest.raises((ValueError, RecursionError), match=r"decoding loop's cache|recursion"):
        decode(way(model), INPUTS)


@pytest.mark.parametrize("first", [LazyDepth, FastGeneration])
@pytest.mark.parametrize("second", [LazyDepth, FastGeneration])
@pytest.mark.parametrize("threaded", [False, True])
def test_a_second_deferral_is_refused(first, second, threaded):
    model = top_1()
    expected, before = decode(model, INPUTS), own_functions(model)
    other = second(model)

    def function():
        if threaded:
            return in_thread(decode, other, OTHERS)
        with pytest.raises(RuntimeError) as caught:
            decode(other, OTHERS)
        return caught.value

    found, error = meanwhile(first, model, function)
    where = "thread 'MainThread'" if threaded else "this thread"
    message = f"{second.name} cannot begin while {first.name.lower()} generates with the same model"
    assert message in str(error)
    assert where in str(error) or not threaded
    assert torch.equal(found, expected)
    assert own_functions(model) == before
    assert torch.equal(decode(other, INPUTS), expected)


@WAYS
def test_one_generator_does_not_generate_twice_at_once(way):
    model = top_1()
    generator, expected = way(model), decode(model, INPUTS)
    errors = []

    def again(_ids):
        with pytest.raises(RuntimeError, match="wait until that call has ended") as caught:
            decode(generator, OTHERS)
        errors.append(caught.value)

    found = decode(generator, INPUTS, stopping_criteria=call_at(8, again))
    assert errors
    assert torch.equal(found, expected)


@WAYS
def test_the_first_to_begin_may_be_the_first_to_end(way):
    """As two threads whose calls overlap; the second one's refusal takes nothing away."""
    model = top_1()
    expected = decode(model, INPUTS)
    inside, go_on, results = threading.Event(), threading.Event(), []

    def first():
        criteria = call_at(6, lambda _ids: (inside.set(), go_on.wait(60)))
        results.append(decode(way(model), INPUTS, stopping_criteria=criteria))

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(60)
    with pytest.raises(RuntimeError, match="cannot begin while"):
        decode(way(model), INPUTS)
    assert torch.equal(decode(model, INPUTS), expected)
    go_on.set()
    thread.join()
    assert torch.equal(results[0], expected)
    assert torch.equal(decode(way(model), INPUTS), expected)


class Failing(LogitsProcessor, BaseStreamer):
    """Fails as a logits processor, or as a streamer, at its third call."""

    def __init__(self, error):
        self.error, self.calls = error, 0

    def __call__(self, input_ids, scores):
        self.put(None)
        return scores

    def put(self, value):
        self.calls += 1
        if self.calls == 3:
            raise self.error("stop")

    def end(self):
        pass


PLACES = {
    "the embeddings": "model.embed_tokens",
    "an early layer": "model.layers.0.mlp",
    "a late layer": "model.layers.2.self_attn",
    "the last layer": "model.layers.3.mlp",
    "the norm": "model.norm",
    "the router": "model.norm.mixture.router",
    "the head": "lm_head",
    "the model": "",
}


@WAYS
@pytest.mark.parametrize("place", ["a processor", "a streamer", "a criterion", *PLACES])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_whatever_fails_the_model_answers_as_before(way, place, error):
    model = top_1()
    inputs = prompts(1, 5, padded=False)
    expected, before = decode(model, inputs), own_functions(model)
    generator, options, failing = way(model), {}, Failing(error)
    handle = None
    if place == "a processor":
        options["logits_processor"] = LogitsProcessorList([failing])
    elif place == "a streamer":
        options["streamer"] = failing
    elif place == "a criterion":
        options["stopping_criteria"] = call_at(7, lambda _ids: failing(None, failing.put(None)))
        failing.calls = 1
    else:
        module = model.get_submodule(PLACES[place])
        failing.calls = 2  # a late layer need not run often
        handle = module.register_forward_hook(lambda *_: failing.put(None))
    with pytest.raises(error, match="stop"):
        decode(generator, inputs, **options)
    if handle is not None:
        handle.remove()
    assert own_functions(model) == before
    assert torch.equal(decode(model, inputs), expected)
    assert torch.equal(decode(generator, inputs), expected)


def interrupt_at(line, function):
    """Call a function, with Ctrl-C at the first or last time that a line of ours is reached."""
    reached = []

    def local(frame, event, _arg):
        where = (frame.f_code.co_filename, frame.f_lineno)
        if event == "line":
            reached.append(where)
            if where == line:
                raise KeyboardInterrupt
        return local

    def trace(frame, _event, _arg):
        return local if "/depthmix/decoding/" in frame.f_code.co_filename else None

    tracing = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(tracing)
    return list(dict.fromkeys(reached))


@pytest.mark.slow
@WAYS
def test_an_interrupt_at_any_line(way):
    model, inputs = top_1(), prompts(1, 3, padded=False)
    options = {"max_new_tokens": 3, "return_dict_in_generate": True}
    expected, before = decode(model, inputs, max_new_tokens=3), own_functions(model)
    lines = interrupt_at(None, lambda: decode(way(model), inputs, **options))
    assert len(lines) > 100
    for line in lines:
        generator = way(model)
        interrupt_at(line, lambda: decode(generator, inputs, **options))  # noqa: B023
        assert own_functions(model) == before, line
        assert torch.equal(decode(model, inputs, max_new_tokens=3), expected), line
        assert torch.equal(decode(generator, inputs, max_new_tokens=3), expected), line


@WAYS
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_made_meanwhile_are_ordinary_models(way, clone):
    model = top_1()
    expected = decode(model, INPUTS)
    found, copied = meanwhile(way, model, lambda: clone(model))
    assert torch.equal(found, expected)
    norm = find_mixture_norm(copied)
    assert isinstance(vars(copied)["forward"], StandIn)
    assert torch.equal(decode(copied, INPUTS), expected)
    own = {
        name
        for module in copied.modules()
        for name, value in vars(module).items()
        if isinstance(value, StandIn)
    }
    assert not own
    assert norm.backbone.model is copied
    assert torch.equal(decode(way(copied), INPUTS), expected)


def hook_onto(model, index=3):
    add_hook_to_module(model.model.layers[index], AlignDevicesHook(io_same_device=True))


@WAYS
def test_hooks_added_meanwhile_are_refused_and_leave_nothing(way):
    model = top_1()
    expected, before = decode(model, INPUTS), own_functions(model)
    with pytest.raises(RuntimeError, match="the forward of a LlamaDecoderLayer was replaced"):
        meanwhile(way, model, lambda: hook_onto(model))
    assert torch.equal(decode(model, INPUTS), expected)
    assert torch.equal(decode(way(model), INPUTS), expected)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(decode(model, INPUTS), expected)
    assert not any(
        isinstance(value, StandIn) for m in model.modules() for value in vars(m).values()
    )
    assert own_functions(model) == before


@WAYS
def test_hooks_from_before_stay_where_they_are(way):
    model = top_1()
    expected = decode(model, INPUTS)
    for index in (0, 3):
        hook_onto(model, index)
    before = own_functions(model)
    assert torch.equal(decode(way(model), INPUTS), expected)
    assert own_functions(model) == before
    with pytest.raises(RuntimeError, match="the forward of a LlamaDecoderLayer was replaced"):
        meanwhile(way, model, lambda: remove_hook_from_module(model, recurse=True))
    assert torch.equal(decode(model, INPUTS), expected)
    assert torch.equal(decode(way(model), INPUTS), expected)


CHANGES = {
    "another layer": lambda model: model.model.layers.__setitem__(
        0, copy.deepcopy(tiny_model(seed=1).double().model.layers[0])
    ),
    "fewer layers": lambda model: model.model.layers.__delitem__(3),
    "the norm taken out": detach,
}


@WAYS
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_is_changed_meanwhile_is_refused(way, change):
    model = top_1()
    with pytest.raises(RuntimeError, match="the model's layers or its final norm were replaced"):
        meanwhile(way, model, lambda: CHANGES[change](model))
    assert not any(
        isinstance(value, StandIn) for m in model.modules() for value in vars(m).values()
    )


@WAYS
def test_another_adapter_or_reading_meanwhile_is_refused(way):
    model = tuned_model(top_k=1)
    model.add_adapter("other", MoDEConfig(target_modules=["q_proj"], late_layers=2))
    model.set_adapter("default")
    expected = decode(model, INPUTS)
    with pytest.raises(RuntimeError, match="needs the mixture that was active"):
        meanwhile(way, model, lambda: model.set_adapter("other"))
    model.set_adapter("default")
    assert torch.equal(decode(way(model), INPUTS), expected)


@WAYS
def test_the_layers_are_those_that_the_model_has_when_it_generates(way):
    model = top_1()
    generator = way(model)
    other = tiny_model(seed=7).double().requires_grad_(False).model.layers[0].eval()
    model.model.layers[0] = other  # no depth below it is read
    expected = decode(model, INPUTS)
    assert torch.equal(decode(generator, INPUTS), expected)
    model.model.layers[2] = copy.deepcopy(model.model.layers[2])
    with pytest.raises(RuntimeError, match=r"`model\.layers` must hold the 4 layers"):
        decode(generator, INPUTS)


@WAYS
def test_a_generator_of_another_model_is_refused(way):
    with pytest.raises(ValueError, match=rf"must be a {way.__name__} of the model that generates"):
        decode(top_1(), INPUTS, custom_generate=way(top_1()))


# Masks.


@WAYS
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text", "opt", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_that_the_caller_leaves_out(way, model_type, attention):
    model = top_1(model_type)
    model.set_attn_implementation(attention)
    ids = random_ids(2, 7)
    for inputs in ({"input_ids": ids}, prompts(2, 7, padded=attention == "sdpa")):
        inputs = {"input_ids": inputs["input_ids"]}  # transformers finds the padding by itself
        expected = decode(model, inputs, max_new_tokens=9)
        assert torch.equal(decode(way(model), inputs, max_new_tokens=9), expected)


@WAYS
@pytest.mark.parametrize("whole", [True, False])
def test_a_mask_that_looks_ahead_is_refused(way, whole):
    """As a prefix does that sees all of itself; with and without padding beside it."""
    model, inputs = top_1(), prompts(2, 5, padded=not whole)

    def look_ahead(_layer, args, kwargs):
        if args[0].shape[1] > 1:
            seen = torch.ones(2, 1, 5, 5, dtype=torch.bool)
            kwargs = {
                **kwargs,
                "attention_mask": seen & inputs["attention_mask"][:, None, None].bool(),
            }
        return args, kwargs

    for layer in model.model.layers:
        layer.register_forward_pre_hook(look_ahead, with_kwargs=True)
    with pytest.raises(ValueError, match="is given a mask of another kind; leave out"):
        decode(way(model), inputs)


@WAYS
@pytest.mark.parametrize("bias", [-0.5, 1.0])
def test_a_mask_with_more_in_it_is_refused(way, bias):
    """As positions by ALiBi, which some models add to the mask."""
    model, inputs = top_1(), prompts(1, 5, padded=False)

    def lean(_layer, args, kwargs):
        width = (
            kwargs["past_key_values"].get_seq_length(_layer.self_attn.layer_idx) + args[0].shape[1]
        )
        mask = torch.zeros(1, 1, args[0].shape[1], width, dtype=torch.float64)
        mask[..., 0] = bias
        return args, {**kwargs, "attention_mask": mask}

    for layer in model.model.layers:
        layer.register_forward_pre_hook(lean, with_kwargs=True)
    with pytest.raises(ValueError, match="is given a mask of another kind; leave out"):
        decode(way(model), inputs)


@WAYS
def test_a_window_that_the_cache_does_not_know_is_refused(way):
    """Apertus gives its layers a mask without the window that its cache has."""
    model = tiny_model("apertus", sliding_window=4)
    attach(model, late_layers=3)
    with pytest.raises(ValueError, match="is given a mask of another kind; leave out"):
        decode(way(model), prompts(1, 9, padded=False))


@WAYS
def test_one_token_after_a_padded_conversation(way):
    """What is padding is told by the mask, not by the width of the first pass."""
    model, results = top_1(), []
    for generator in (model, way(model)):
        turn = decode(generator, INPUTS, return_dict_in_generate=True)
        mask = torch.ones_like(turn.sequences)
        mask[:, :5] = INPUTS["attention_mask"]
        inputs = {"input_ids": turn.sequences, "attention_mask": mask}
        results.append(decode(generator, inputs, past_key_values=turn.past_key_values))
    assert torch.equal(*results)


def test_a_constant_that_changes_between_passes_is_refused():
    model, count = top_1(), iter(range(1, 100))

    def change(_layer, args, kwargs):
        return args, {**kwargs, "use_cache": next(count)}

    before = decode(model, INPUTS)
    handle = model.model.layers[3].register_forward_pre_hook(change, with_kwargs=True)
    with pytest.raises(ValueError, match="`use_cache` of the model's layers must stay the same"):
        decode(LazyDepth(model), INPUTS, max_new_tokens=12)
    handle.remove()
    assert torch.equal(decode(LazyDepth(model), INPUTS), before)
