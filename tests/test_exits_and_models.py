"""Exits, plans and models that belong together, and those that do not."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from torch import nn

from adapters import tuned_model
from depthmix import DraftPlan, FastGeneration, load_exits
from depthmix.adapters.exit_files import save_exits
from depthmix.depth.exit_training import train_exits
from depthmix.method.fingerprint import TOLERANCE, Fingerprint
from depthmix.method.parts import find_parts
from depthmix.models.fast import read_plan
from models import random_ids, tiny_model

LOSSLESS = "the text stays the model's own, and is hardly faster"
LOSSY = "with `verify=False` nobody would notice"


def put_on(model, folder, **options):
    """Put exits on a model and save them."""
    rows = [{"input_ids": row.tolist()} for row in random_ids(4, 7)]
    options = {"layers": [1, 3], "rank": 2, "num_steps": 1, "num_negatives": 8, **options}
    return save_exits(train_exits(model, rows, **options), folder)


def fingerprint(model):
    taken = Fingerprint.take(find_parts(model)[0])
    assert taken is not None
    return taken


def difference(model, other):
    return fingerprint(model).difference(find_parts(other)[0])


def quietly(model, exits):
    """Make what generates in both ways, where nothing may be said."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return [FastGeneration(model, exits, verify=verify) for verify in (True, False)]


def rounded(model, share):
    """Move each weight by a share of its size, as rounding does."""
    generator = torch.Generator().manual_seed(1)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in twin.parameters():
            weight += weight * share * (torch.rand(weight.shape, generator=generator) - 0.5)
    return twin


@pytest.mark.parametrize("make", [tiny_model, lambda: tiny_model("gemma2"), tuned_model])
def test_exits_know_their_model(tmp_path, make):
    model = make()
    model.train()
    state = torch.get_rng_state()
    put_on(model, tmp_path)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    exits = load_exits(tmp_path, make())
    assert exits.made_for == fingerprint(make())
    quietly(make(), exits)
    quietly(make().double(), exits)
    quietly(rounded(make(), 2e-3), exits)  # about what bfloat16 does


def test_exits_of_another_model_are_told(tmp_path):
    put_on(tiny_model(), tmp_path)
    other = tiny_model(seed=7)
    exits = load_exits(tmp_path, other)
    with pytest.warns(UserWarning, match=LOSSLESS) as told:
        fast = FastGeneration(other, exits)
    assert len(told) == 1
    assert "`exits` must be those of this very model" in str(told[0].message)
    ids = random_ids(1, 4)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(fast.generate(ids, **options), other.generate(ids, **options))
    with pytest.raises(ValueError, match=LOSSY):
        FastGeneration(other, exits, verify=False)
    plan = DraftPlan.for_all((1, 3), stay_dense=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FastGeneration(other, exits, plan, verify=False)  # nothing drafts


def test_an_adapter_belongs_to_what_was_said(tmp_path):
    model = tuned_model()
    put_on(model, tmp_path)
    exits = load_exits(tmp_path, model)
    with model.disable_adapter(), pytest.raises(ValueError, match=LOSSY):
        FastGeneration(model, exits, verify=False)
    quietly(model, exits)
    other = tuned_model(seed=6)
    with pytest.raises(ValueError, match=LOSSY):
        FastGeneration(other, load_exits(tmp_path, other), verify=False)
    merged = tuned_model().merge_and_unload()
    quietly(merged, load_exits(tmp_path, merged))


def test_what_is_the_same_and_what_is_not():
    model = tiny_model()
    assert difference(model, model) < 1e-3  # four digits are kept
    assert difference(model, copy.deepcopy(model).double()) < 1e-3
    wider = copy.deepcopy(model)
    wider.resize_token_embeddings(model.config.vocab_size + 64)
    assert difference(model, wider) < 1e-3
    assert difference(wider, model) == float("inf")  # it was asked about tokens that are new
    assert difference(model, tiny_model(seed=1)) > TOLERANCE
    broken, _ = find_parts(copy.deepcopy(model))
    nn.init.constant_(broken.head_weight, float("nan"))
    assert fingerprint(model).difference(broken) == float("inf")
    assert Fingerprint.take(broken) is None
    silent = copy.deepcopy(model)
    nn.init.zeros_(silent.lm_head.weight)
    assert difference(silent, silent) == 0
    assert difference(silent, model) > TOLERANCE


def test_fingerprints_in_words():
    model = tiny_model()
    taken = fingerprint(model)
    assert Fingerprint.from_dict(json.loads(json.dumps(taken.to_dict()))) == taken
    with torch.no_grad():
        logits = model(torch.tensor([taken.input_ids])).logits[0, :, list(taken.compared_ids)]
    expected = logits - logits.mean(-1, keepdim=True)
    torch.testing.assert_close(
        torch.tensor(taken.logits).view(expected.shape), expected, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(
    "change",
    [
        {"logits": [1.0]},
        {"logits": ["a"] * 64},
        {"logits": [float("nan")] * 64},
        {"input_ids": []},
        {"input_ids": [-1] * 16},
        {"input_ids": 3},
        {"more": [1]},
        None,
    ],
)
def test_damaged_fingerprints_are_refused(tmp_path, change):
    put_on(tiny_model(), tmp_path)
    path = tmp_path / "exits.json"
    settings = json.loads(path.read_text())
    settings["made_for"] = [1] if change is None else {**settings["made_for"], **change}
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"exits.json is damaged \(A fingerprint"):
        load_exits(tmp_path, tiny_model())


def test_exits_that_do_not_know_it_draft_for_any(tmp_path):
    put_on(tiny_model(), tmp_path)
    path = tmp_path / "exits.json"
    settings = json.loads(path.read_text())
    del settings["made_for"]
    path.write_text(json.dumps(settings))
    other = tiny_model(seed=7)
    quietly(other, load_exits(tmp_path, other))


def test_a_plan_of_other_exits_is_refused(tmp_path):
    model = tiny_model()
    first, second = put_on(model, tmp_path / "one"), put_on(model, tmp_path / "two", seed=3)
    exits, others = load_exits(first, model), load_exits(second, model)
    plan = DraftPlan.for_all((1, 3), exits_sha256=exits.sha256)
    FastGeneration(model, exits, plan)
    with pytest.raises(ValueError, match="`plan` must have been found for these exits"):
        FastGeneration(model, others, plan)
    for name, verify in (("plan.json", True), ("unverified_plan.json", False)):
        for folder in (first, second):
            (folder / name).write_text(json.dumps(plan.to_dict()))
        assert read_plan(first, verify=verify) == plan
        with pytest.raises(ValueError, match=rf"{name} was made for other exits than those"):
            read_plan(second, verify=verify)
        (second / name).write_text(json.dumps(DraftPlan.for_all((1, 3)).to_dict()))
        assert read_plan(second, verify=verify) == DraftPlan.for_all((1, 3))
    trained = tmp_path / "trained"  # a model with exits of its own has no `exits.json`
    trained.mkdir()
    (trained / "plan.json").write_text(json.dumps(plan.to_dict()))
    with pytest.raises(ValueError, match="was made for other exits"):
        read_plan(trained)
