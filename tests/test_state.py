"""What a pass leaves behind: nothing, however it ended, and wherever the layers went meanwhile."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from peft import get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from adapters import tuned_model
from decoding import decode, prompts
from depthmix import MoDEConfig, attach, detach
from depthmix.adapters.readout import reading_out
from depthmix.libraries.releases import CHECKPOINTING
from depthmix.method.capture import HiddenStateCapture
from depthmix.method.norm import active_mixture, find_mixture_norm
from models import random_ids, randomise, tiny_model

IDS, OTHERS = random_ids(2, 6), random_ids(3, 9, seed=4)
INPUTS = prompts(1, 4, padded=False)


def mixed(way="attach", **options):
    if way == "peft":
        return tuned_model(late_layers=[2, 4], **options).get_base_model()
    model = tiny_model()
    randomise(attach(model, late_layers=[2, 4], **options).mixture, seed=3)
    return model.eval()


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits


def fail_in(module, error=RuntimeError, *, after=False):
    def fail(*_):
        raise error("stop")

    if after:
        return module.register_forward_hook(fail)
    return module.register_forward_pre_hook(fail)


PLACES = {
    "a layer": lambda model: model.model.layers[2],
    "attention": lambda model: model.model.layers[3].self_attn,
    "the norm": lambda model: model.model.norm,
    "a late norm": lambda model: active_mixture(model).norms["2"],
    "the router": lambda model: active_mixture(model).router,
    "the pretrained norm": lambda model: find_mixture_norm(model).base_layer,
    "the head": lambda model: model.lm_head,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_pass_leaves_nothing(place, after, error):
    model = mixed()
    expected = logits(model)
    drafted = decode(model, INPUTS, assistant_early_exit=2)
    handle = fail_in(PLACES[place](model), error, after=after)
    with pytest.raises(error, match="stop"):
        logits(model, OTHERS)
    handle.remove()
    assert torch.equal(decode(model, INPUTS, assistant_early_exit=2), drafted)
    assert torch.equal(logits(model), expected)


def test_states_of_a_failed_pass_keep_no_memory():
    model, states = mixed(), []
    handle = fail_in(model.model.layers[3], after=True)
    model.model.layers[2].register_forward_pre_hook(lambda _m, a: states.append(weakref.ref(a[0])))
    with pytest.raises(RuntimeError, match="stop"):
        model(input_ids=OTHERS)
    handle.remove()
    gc.collect()
    assert states[0]() is None


def test_a_pass_inside_of_another_is_no_part_of_it():
    model = mixed()
    expected = logits(model)

    def interrupt(_module, _args):
        handle.remove()
        failing = fail_in(model.model.layers[3])
        with pytest.raises(RuntimeError, match="stop"):
            logits(model, IDS.flip(0))
        failing.remove()

    # The inner one has kept depth 1, and not come to depth 2, when the outer one goes on.
    handle = model.model.layers[1].register_forward_pre_hook(interrupt, prepend=True)
    assert torch.equal(logits(model), expected)
    handle = model.model.layers[2].register_forward_pre_hook(interrupt, prepend=True)
    with pytest.raises(RuntimeError, match=r"Only 2 of 3 .* without another pass in between"):
        logits(model)
    assert torch.equal(logits(model), expected)


def swap(layers, i, j):
    layers[i], layers[j] = layers[j], layers[i]


def double(layers, i, j):
    layers[i] = layers[j]


def copied(layers, *indices):
    for i in indices:
        layers[i] = copy.deepcopy(layers[i])


CHANGES = {
    "watched layers copied": lambda layers: copied(layers, 1),
    "the upper one copied": lambda layers: copied(layers, 2),
    "all copied": lambda layers: copied(layers, 0, 1, 2, 3),
    "watched layers swapped": lambda layers: swap(layers, 1, 2),
    "one of them moved down": lambda layers: swap(layers, 0, 1),
    "one of them moved up": lambda layers: swap(layers, 2, 3),
    "shared": lambda layers: double(layers, 2, 1),
    "shared further up": lambda layers: double(layers, 3, 2),
    "reversed": lambda layers: layers.__init__(list(layers)[::-1]),
    "one taken away": lambda layers: layers.__delitem__(3),
    "truncated": lambda layers: layers.__delitem__(slice(1, None)),
    "extended": lambda layers: layers.append(copy.deepcopy(layers[0])),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", ["attach", "peft"])
@pytest.mark.parametrize("told", [False, True])
def test_layers_changed_afterwards_are_an_error(change, way, told):
    model = mixed(way)
    CHANGES[change](model.model.layers)
    if told:
        model.config.num_hidden_layers = len(model.model.layers)
    message = "`model.layers` must hold the 4 layers|hidden states of the mixture were seen"
    for mode in (True, False):
        with pytest.raises(RuntimeError, match=message):
            model.train(mode)(input_ids=IDS, use_cache=False)


def test_a_list_of_copies_is_an_error():
    model = mixed()
    model.model.layers = copy.deepcopy(model.model.layers)
    with pytest.raises(RuntimeError, match=r"`model\.layers` must hold the 4 layers"):
        logits(model)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 1, 2, 2, 3), (0, 1, 2, 3, 1)])
def test_depths_out_of_order_are_not_handed_over(order):
    """While torch.compile traces, the list of layers is not looked at, and this remains."""
    layers, capture = nn.ModuleList(nn.Identity() for _ in range(4)), HiddenStateCapture()
    capture.watch(layers, {0, 1, 2, 3})
    for layer in (0, 1, 2, 3):
        layers[layer](torch.zeros(1, 1, 1))
    assert capture.take().keys() == {0, 1, 2, 3}
    for layer in order:
        layers[layer](torch.zeros(1, 1, 1))
    assert capture.take().keys() < {0, 1, 2, 3}


@pytest.mark.parametrize("way", ["attach", "peft"])
def test_other_changes_are_none_of_the_mixtures_business(way):
    model = mixed(way)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    copied(model.model.layers, 0)  # not watched
    assert torch.equal(logits(model), expected)
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = checkpoint_wrapper(layer)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_given_back_its_norm_too(clone):
    model = tiny_model()
    plain = logits(model)
    attach(model, late_layers=[2, 4])
    expected = logits(model)
    copied = clone(model)
    assert torch.equal(logits(copied), expected)
    norm = copied.model.norm
    norm.watch([norm.mixture])
    assert len(copied.model.layers[1]._forward_pre_hooks) == 1
    detach(copied)
    assert torch.equal(logits(copied), plain)
    hooked = ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
    hooked += ("_forward_hooks_with_kwargs", "_forward_hooks_always_called")
    assert not any(getattr(module, name) for module in copied.modules() for name in hooked)
    assert torch.equal(logits(model), expected)


def test_layers_may_change_while_there_is_no_mixture():
    model = tiny_model()
    attach(model, late_layers=[2, 4])
    detach(model)
    copied(model.model.layers, 1, 2)
    expected = logits(model)
    attach(model, late_layers=1)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("late_layers", [[1, 3, 4], [2, 4], [3, 4]])
@pytest.mark.parametrize("exit_layer", [1, 2, 3])
def test_a_draft_is_answered_by_the_layer_it_stops_at(late_layers, exit_layer):
    model = tiny_model()
    norm = attach(model, late_layers=late_layers)
    randomise(norm.mixture, seed=3)
    states = []
    model.model.layers[exit_layer].register_forward_pre_hook(lambda _m, a: states.append(a[0]))
    logits(model)
    own = str(exit_layer)
    answering = dict(norm.mixture.norms.items()).get(own, norm.base_layer)
    with torch.no_grad():
        expected = model.lm_head(answering(states[0]))
    model.config.num_hidden_layers = exit_layer
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_an_interrupted_draft_leaves_is_refused(error):
    model = mixed()
    expected = logits(model)
    handle = fail_in(model.model.layers[1], error)
    with pytest.raises(error, match="stop"):
        decode(model, INPUTS, assistant_early_exit=2)
    handle.remove()
    assert model.config.num_hidden_layers == 2  # transformers does not put it back
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"must be 4 and is 2: .* was interrupted"):
            logits(model)
    model.config.num_hidden_layers = 4
    assert torch.equal(logits(model), expected)


def test_a_pass_beside_a_draft_is_refused():
    model, found = mixed(), []

    def beside(_norm, _args):
        handle.remove()
        thread = threading.Thread(target=catch, args=(found, lambda: logits(model)))
        thread.start()
        thread.join()

    expected = decode(model, INPUTS)
    handle = model.model.layers[1].register_forward_pre_hook(beside)
    assert torch.equal(decode(model, INPUTS, assistant_early_exit=2), expected)
    assert "one runs in another thread" in str(found[0])


def catch(found, function):
    try:
        found.append(function())
    except Exception as error:
        found.append(error)


def test_the_norm_alone_has_no_depths_to_mix():
    model = mixed()
    with pytest.raises(RuntimeError, match="`base_layer` is the pretrained norm"):
        model.model.norm(torch.zeros(1, 3, 16))


def test_replicas_are_refused():
    model = mixed()
    replica = model._replicate_for_data_parallel()
    decoder = replica._modules["model"] = model.model._replicate_for_data_parallel()
    decoder._modules["norm"] = model.model.norm._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="`DataParallel` cannot run a mixture"):
        logits(replica)
    assert logits(model).shape == (2, 6, 61)


@pytest.mark.parametrize("module", ["model.layers.1", "model.norm", "lm_head"])
def test_hooks_of_accelerate_come_and_go(module):
    model = mixed()
    expected, names = logits(model), dict(vars(model.model.norm))
    add_hook_to_module(model.get_submodule(module), AlignDevicesHook(io_same_device=True))
    assert torch.equal(logits(model), expected)
    handle = fail_in(model.model.norm)
    with pytest.raises(RuntimeError, match="stop"):
        logits(model, OTHERS)
    handle.remove()
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(logits(model), expected)
    assert vars(model.model.norm).keys() == names.keys()


# Training.


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_an_interrupted_training_pass_leaves_nothing(place, checkpointing):
    model = mixed(distillation_weight=0.3)
    if checkpointing is not None:
        getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": checkpointing})
    evaluated = loss_of(model, IDS).item()
    trained = loss_of(model.train(), IDS).item()
    assert trained != evaluated
    handle = fail_in(PLACES[place](model), after=True)
    with pytest.raises(RuntimeError, match="stop"):
        loss_of(model, OTHERS)
    handle.remove()
    assert loss_of(model.eval(), IDS).item() == evaluated
    handle = fail_in(PLACES[place](model.train()), after=True)
    with pytest.raises(RuntimeError, match="stop"):
        loss_of(model, OTHERS)
    handle.remove()
    with model.model.norm.objective.collecting() as steps:
        assert loss_of(model, IDS).item() == trained
    assert [step.num_tokens for step in steps] == [IDS[:, 1:].numel()]


def test_a_failed_backward_pass_leaves_nothing():
    model = mixed(distillation_weight=0.3).train()
    getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": False})
    loss_of(model, IDS).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    handle = model.model.layers[1].mlp.register_full_backward_hook(
        lambda *_: (_ for _ in ()).throw(RuntimeError("stop"))
    )
    with pytest.raises(RuntimeError, match="stop"):
        loss_of(model, OTHERS).backward()
    handle.remove()
    model.zero_grad()
    loss_of(model, IDS).backward()
    for name, gradient in expected.items():
        assert torch.equal(model.get_parameter(name).grad, gradient)


# Reading out.


def test_reading_out_ends_where_it_began():
    model = mixed()
    expected = logits(model)
    with reading_out(model, 2):
        second = logits(model)
        with reading_out(model, 4):
            assert not torch.equal(logits(model), second)
        assert torch.equal(logits(model), second)
        with pytest.raises(KeyboardInterrupt), reading_out(model, 4):
            raise KeyboardInterrupt
        assert torch.equal(logits(model), second)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("make", [mixed, tiny_model])
def test_two_threads_do_not_read_out_at_once(make):
    model, found = make(), []
    expected = logits(model)

    def beside():
        with reading_out(model, 2):
            return logits(model)

    with reading_out(model, 2):
        second = logits(model)
        thread = threading.Thread(target=catch, args=(found, beside))
        thread.start()
        thread.join()
        assert torch.equal(logits(model), second)
    assert "`model` is read out at layer 2 by another thread" in str(found[0])
    assert torch.equal(beside(), second)
    assert torch.equal(logits(model), expected)


def test_an_interrupt_while_the_lens_is_attached(monkeypatch):
    model = tiny_model()
    expected = logits(model)

    def interrupted(decoder, **options):
        attach(decoder, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr("depthmix.adapters.readout.attach", interrupted)
    with pytest.raises(KeyboardInterrupt), reading_out(model, 2):
        pass
    assert find_mixture_norm(model) is None
    assert torch.equal(logits(model), expected)
    assert isinstance(model.model.norm, nn.Module)


def holdings(model):
    """Say what a model holds beside its weights: parts, hooks, modes, configuration."""
    parts = {
        name: (id(part), list(part._forward_pre_hooks), list(part._forward_hooks), part.training)
        for name, part in model.named_modules()
    }
    return parts, sorted(vars(model.config)), getattr(model, "_weight_conversions", None)


STEPS = ("register_forward_pre_hook", "register_forward_hook", "set_submodule", "train")


@pytest.mark.parametrize("way", ["attach", "peft"])
def test_an_interrupted_beginning_is_undone(way, monkeypatch):
    """Interrupted after each of the steps that write into the model."""
    model, moments, done = tiny_model(num_hidden_layers=3), 0, False
    before, expected = holdings(model), logits(model)
    config = MoDEConfig(late_layers=[2, 3], target_modules=["q_proj"])
    while not done:
        moments, left = moments + 1, [moments]

        def stepping(own, left):
            def step(*args, **kwargs):
                result = own(*args, **kwargs)
                left[0] -= 1
                if left[0] == -1:
                    raise KeyboardInterrupt
                return result

            return step

        with monkeypatch.context() as patch:
            for name in STEPS:
                patch.setattr(nn.Module, name, stepping(getattr(nn.Module, name), left))
            try:
                attach(model, late_layers=[2, 3]) if way == "attach" else get_peft_model(
                    model, config
                )
                done = True
            except KeyboardInterrupt:
                pass
        if not done:
            assert holdings(model) == before
            assert torch.equal(logits(model), expected)
    assert moments > 20
    assert find_mixture_norm(model) is not None
