"""Fast generation of every causal language model that can be built tiny, against its own."""

from __future__ import annotations

import pytest
import torch

from decoding import decode, prompts
from depthmix import DraftPlan, FastGeneration
from depthmix.method.parts import find_parts, new_exits
from models import tiny_model
from zoo import build, list_causal_models, runs_alone

PAIRS = {
    f"{config.model_type}-{model.__name__}": (config, model)
    for config, model in list_causal_models()
}

WHOLE = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 10}


def random_exits(model):
    """Exits that predict something, each something else."""
    backbone, norm = find_parts(model)
    layers = tuple(range(1, backbone.num_hidden_layers))
    torch.manual_seed(5)
    exits = new_exits(backbone, norm, layers, rank=3)
    for parameter in exits.parameters():
        torch.nn.init.normal_(parameter)
    return exits


def list_finite(model):
    """List prompts that the model's own `generate` takes, and what it makes of them.

    In float64 eager attention, which some models have alone, makes NaN of padding.
    """
    asked = []
    for padded, batch, length in ((False, 1, 5), (True, 3, 6), (False, 3, 6), (False, 1, 1)):
        inputs = prompts(batch, length, padded=padded)
        truth = decode(model, inputs, **WHOLE)
        if all(bool(logits.isfinite().all()) for logits in truth.logits):
            asked.append((inputs, truth))
    assert len(asked) >= 3, "NaN"
    return asked


def compare(model, exits, asked):
    """Generate fast, and say how far that is from what the model gave, if it is."""
    told = []
    for inputs, truth in asked:
        shape = tuple(inputs["input_ids"].shape)
        for threshold in (0.0, 0.3):
            plan = DraftPlan.for_all(
                exits.layers, threshold=threshold, joint_threshold=0.0, max_drafts=4
            )
            fast = FastGeneration(model, exits, plan)
            found = decode(fast, inputs, **WHOLE)
            apart = max(
                float((ours - its).abs().max())
                for ours, its in zip(found.logits, truth.logits, strict=True)
            )
            if not torch.equal(found.sequences, truth.sequences) or not apart < 1e-3:
                told.append(f"{threshold=} {shape=}: {apart:.2g}")
            if threshold == 0.0:
                assert fast.num_drafted.total() > 0
    return "; ".join(told)


@pytest.mark.slow
def test_every_causal_model_generates_the_same():
    refused, differs, fine, unfit = {}, {}, [], {}
    for name, pair in PAIRS.items():
        model, reason = build(*pair)
        if model is None or not runs_alone(model):
            unfit[name] = reason or "another answer each time, or NaN"
            continue
        model = model.double().requires_grad_(False)
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the only one in float64
        try:
            asked = list_finite(model)
        except Exception as error:  # whatever the model's own code raises
            unfit[name] = f"its own `generate`: {type(error).__name__}: {error}"
            continue
        try:
            exits = random_exits(model)
        except (TypeError, ValueError) as error:
            refused[name] = str(error)
            continue
        try:
            apart = compare(model, exits, asked)
        except ValueError as error:
            refused[name] = str(error)
        except Exception as error:  # all of them are told at the end
            differs[name] = f"{type(error).__name__}: {error}"
        else:
            if apart:
                differs[name] = apart
            else:
                fine.append(name)
    for told, which in (("unfit", unfit), ("refused", refused), ("differs", differs)):
        for name, reason in which.items():
            print(f"{told}: {name}: {' '.join(reason.split())[:400]}")
    print(f"{len(fine)} of {len(PAIRS)} generate the same: {', '.join(fine)}")
    assert not differs
    assert len(fine) >= 75


def gap_at_difference(found, truth, logits, row, *, prompt):
    """Give the difference of the two best logits where two rows part, against the spread of all."""
    place = int((found[row] != truth[row]).nonzero()[0]) - prompt
    step = logits[place][row]
    best = step.topk(2).values
    return float((best[0] - best[1]) / step.std())


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen3", "gpt_neox"])
def test_five_hundred_prompts_in_float32(model_type):
    """Token ids are equal; what differs but by a tie is told apart, and would be counted."""
    model = tiny_model(model_type, hidden_size=64, intermediate_size=96, num_hidden_layers=8)
    backbone, norm = find_parts(model)
    for layer in backbone.layers[2:]:
        for parameter in layer.parameters():
            parameter.data *= 0.3  # so that exits are now and then right
    exits = new_exits(backbone, norm, (3, 5, 7), rank=0)
    plan = DraftPlan.for_all(exits.layers, threshold=0.3, joint_threshold=0.1)
    fast, equal, ties = FastGeneration(model, exits, plan), 0, []
    for seed in range(100):
        inputs = prompts(5, 12, padded=seed % 2 == 1, seed=seed)
        options = {**WHOLE, "max_new_tokens": 24}
        truth = decode(model, inputs, **options)
        found = decode(fast, inputs, **options).sequences
        for row in range(5):
            if torch.equal(found[row], truth.sequences[row]):
                equal += 1
            else:
                parted = (found, truth.sequences, truth.logits)
                ties.append(gap_at_difference(*parted, row, prompt=12))
    drafted, share = fast.num_drafted.total(), fast.layers_per_token / 8
    print(
        f"{model_type}: {equal} of 500 equal, ties {ties}; {fast.acceptance_rate:.2f} of {drafted}"
    )
    print(f"drafts accepted, {share:.2f} of the layers' runs")
    assert fast.num_accepted.total() > 1000
    assert all(gap < 1e-4 for gap in ties)
    assert equal >= 498
