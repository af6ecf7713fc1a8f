"""What exits would draft in a text that a lens shows, beside a slow reference."""

from __future__ import annotations

import json

import pytest
import torch

from calibrations import make_calibrated
from depthmix import DraftPlan, load_exits, load_model, load_tokenizer
from depthmix.depth import lens_drafts
from depthmix.depth.lens import look
from depthmix.depth.token_texts import token_texts
from depthmix.models.subjects import load_subjects
from depthmix.pages.lens_page import show_lens, to_page_data

TEXT = "3 + 3 = 6 and 4 + 4 ="


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_calibrated(tmp_path_factory.mktemp("lens") / "model")


@pytest.mark.parametrize("vocabulary", [None, tuple(range(0, 250, 2))])
def test_each_token_is_drafted_at_the_first_sure_exit(folder, monkeypatch, vocabulary):
    monkeypatch.setattr(lens_drafts, "BLOCK_TOKENS", 5)
    model, tokenizer = load_model(folder).eval(), load_tokenizer(folder)
    exits = load_exits(folder, model)
    plan = DraftPlan(exits=(1, 3), thresholds=(0.6, 0.3), vocabulary=vocabulary)
    lens = look(model, tokenizer, TEXT, drafting=(exits, plan))
    assert lens.drafts is not None
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
        for place in range(ids.shape[1]):
            expected = (None, "", False)
            for layer, threshold in zip(plan.exits, plan.thresholds, strict=True):
                normed = exits(layer, output.hidden_states[layer][0, place])
                logits = model.lm_head(normed)
                allowed = torch.arange(len(logits)) if vocabulary is None else vocabulary
                share, best = logits[list(allowed)].softmax(-1).max(-1)
                if share >= threshold:
                    token = int(allowed[best])
                    right = token == int(output.logits[0, place].argmax())
                    expected = (layer, token, right)
                    break
            layer, token, right = expected
            assert lens.drafts.layers[place] == layer
            assert lens.drafts.accepted[place] == right
            text = "" if layer is None else token_texts(tokenizer, [token])[0]
            assert lens.drafts.tokens[place] == text
    assert {None, 1} <= {*lens.drafts.layers}


def test_a_page_says_what_is_drafted(folder, tmp_path):
    lenses = load_subjects([folder], drafts=True).look(TEXT)
    (lens,) = lenses.values()
    assert lens.drafts is not None
    data = to_page_data({"": lenses})
    laid_out = data["passages"][0]["lenses"][0]["drafts"]
    assert laid_out["layers"] == lens.drafts.layers
    assert [data["texts"][place] for place in laid_out["tokens"]] == [*lens.drafts.tokens]
    page = show_lens([folder], TEXT, path=tmp_path / "lens.html").read_text("utf-8")
    assert '"drafts":' in page
    (plain,) = load_subjects([folder]).look(TEXT).values()
    assert plain.drafts is None
    assert "drafts" not in to_page_data({"": {"m": plain}})["passages"][0]["lenses"][0]


def test_where_drafting_is_not_worth_it_nothing_is_shown(folder):
    plan = DraftPlan.for_all((1, 2, 3), stay_dense=True)
    path = folder / "exits" / "plan.json"
    path.write_text(json.dumps(plan.to_dict()))
    (lens,) = load_subjects([folder], drafts=True).look(TEXT).values()
    path.unlink()
    assert lens.drafts is None
