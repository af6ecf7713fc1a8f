"""A tiny model calibrated: what is written, what is said, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from calibrations import make_calibrated, pretend_costs, pretend_speed, write_records
from checkpoints import make_tokenizer
from depthmix.adapters.exit_files import load_exits, save_exits
from depthmix.decoding.draft_plan import DraftPlan
from depthmix.decoding.fast_generation import FastGeneration
from depthmix.decoding.pace import Pace
from depthmix.depth.calibrator import Calibrator
from depthmix.depth.cascade import simulate
from depthmix.depth.confidences import record_confidences
from depthmix.depth.costs import Costs
from depthmix.method.parts import find_parts
from depthmix.models.calibrating import calibrate
from depthmix.models.loading import load_model
from depthmix.models.own_texts import read_questions, write_continuations
from depthmix.models.speed import measure_speed

TOKENIZER = make_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model whose exits are often right."""
    return make_calibrated(tmp_path_factory.mktemp("calibrated") / "model")


def test_a_calibration_says_what_it_found_and_leaves_a_plan(folder, tmp_path):
    data = write_records(tmp_path / "records.jsonl")
    calibration = calibrate(folder, data, max_new_tokens=12, num_measured=3)
    assert calibration.path == folder / "exits" / "plan.json"
    plan = DraftPlan.from_dict(json.loads(calibration.path.read_text()))
    assert plan == calibration.plan
    assert plan.row_costs == calibration.costs.row_costs
    about = json.loads((folder / "exits" / "calibration.json").read_text())
    assert about == json.loads(json.dumps(calibration.to_dict()))
    assert calibration.measured.num_texts == calibration.measured.num_same == 3
    assert calibration.found.expected.num_texts == 12
    assert plan.stay_dense == (
        calibration.measured.speed_up < 1.05 or calibration.found.plan.stay_dense
    )
    said = str(calibration)
    for word in ("Drafts: layer", "Expected:", "Measured:", f"Saved as {calibration.path}."):
        assert word in said
    model = load_model(folder).eval()
    FastGeneration(model, load_exits(folder, model), plan)  # which it fits


def test_exits_that_are_often_right_draft(folder, tmp_path, monkeypatch):
    pretend_costs(monkeypatch)
    calls = pretend_speed(monkeypatch, 1.4)
    data = write_records(tmp_path / "records.jsonl")
    calibration = calibrate(folder, data, max_new_tokens=12, num_measured=2)
    assert calibration.found.expected.speed_up > 1.2
    assert calibration.found.expected.drafted > 0.3
    assert not calibration.plan.stay_dense
    assert "Stay dense" not in str(calibration)
    ((verify, plan, prompts),) = calls
    assert verify
    assert plan == calibration.plan
    # Measured where nothing was chosen: the third part of the texts and the fourth.
    asked = tuple(TOKENIZER("2 + 2 =")["input_ids"])
    assert prompts[0] == asked
    assert calibration.found.told_by == (2, 6, 10, 14, 18, 22, 3, 7, 11, 15, 19, 23)


def test_what_does_not_pay_stays_dense(folder, tmp_path, monkeypatch):
    pretend_costs(monkeypatch)
    pretend_speed(monkeypatch, 1.04)
    data = write_records(tmp_path / "records.jsonl")
    calibration = calibrate(folder, data, max_new_tokens=6)
    assert calibration.plan.stay_dense
    assert "Stay dense" in str(calibration)
    assert json.loads(calibration.path.read_text())["stay_dense"] is True


def test_drafts_that_nothing_verifies_have_a_plan_of_their_own(folder, tmp_path, monkeypatch):
    pretend_costs(monkeypatch)
    calls = pretend_speed(monkeypatch, 1.4)
    data = write_records(tmp_path / "records.jsonl", 48)
    before = (folder / "exits" / "plan.json").read_text()
    calibration = calibrate(folder, data, max_new_tokens=4, texts_unchanged=0.5)
    assert calibration.path == folder / "exits" / "unverified_plan.json"
    assert (folder / "exits" / "plan.json").read_text() == before
    promise = calibration.found.promise
    assert promise is not None
    assert (promise.target, promise.num_tested) == (0.5, 24)
    assert calibration.plan.stay_dense == (promise.lowest < 0.5)
    assert calls[0][0] is False
    assert calibration.found.expected.num_texts == 12
    assert "Texts unchanged: 50% asked for" in str(calibration)
    # New exits take away what was found for the old ones.
    model = load_model(folder)
    copied = tmp_path / "exits"
    copied.mkdir()
    for path in (folder / "exits").iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    save_exits(load_exits(folder, model), copied)
    assert sorted(path.name for path in copied.iterdir()) == ["exits.json", "exits.safetensors"]


def test_the_simulation_is_what_generation_does(folder, monkeypatch):
    """Where no draft is refused, the counts of layers, drafts and rounds are the same."""
    monkeypatch.setattr(Pace, "drafts", True)
    model = load_model(folder).eval()
    exits = load_exits(folder, model)
    prompts = [tuple(TOKENIZER(f"{n} - {n * 3} =")["input_ids"]) for n in range(6)]
    texts = write_continuations(model, TOKENIZER, prompts, max_new_tokens=9)
    backbone, _ = find_parts(model)
    num_layers = backbone.num_hidden_layers
    (recorded,) = record_confidences(backbone, exits, texts, vocabularies=[None])
    costs = Costs(
        rows=(1,),
        layer=(1.0,),
        head=(1.0,),
        vocabulary_sizes=(backbone.vocab_size,),
        exit=(0.1,),
        step=0.0,
        prompt=1.0,
        num_prompt_tokens=1,
        device="cpu",
        dtype="float32",
    )
    compared = 0
    for plan in (
        DraftPlan.for_all((1, 3), threshold=0.5, joint_threshold=0.3),
        DraftPlan.for_all((2,), threshold=0.4, joint_threshold=0.0, max_drafts=3),
        DraftPlan(exits=(1, 2), thresholds=(0.9, 0.6), joint_threshold=0.5),
    ):
        for verify in (True, False):
            found = simulate(recorded, [plan], costs, num_hidden_layers=num_layers, verify=verify)
            for number, text in enumerate(texts):
                if found.num_accepted[0, number] < found.num_drafted[0, number]:
                    continue
                fast = FastGeneration(model, exits, plan, verify=verify)
                ids = torch.tensor([text.prompt])
                output = fast.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False
                )
                assert tuple(output[0, len(text.prompt) :].tolist()) == text.tokens
                runs = fast.num_layer_runs - num_layers  # but the prompt's
                assert runs == found.layer_runs[0, number]
                assert fast.num_rounds == found.num_rounds[0, number]
                assert fast.num_accepted.total() == found.num_accepted[0, number]
                compared += bool(found.num_drafted[0, number])
    assert compared > 6


def test_both_ways_are_measured_on_the_same_prompts(folder):
    model = load_model(folder).eval()
    exits = load_exits(folder, model)
    fast = FastGeneration(model, exits, DraftPlan.for_all(exits.layers))
    prompts = [tuple(TOKENIZER(text)["input_ids"]) for text in ("1 + 1", "2 +", "3 + 3 =")]
    model.train()
    measured = measure_speed(model, fast, TOKENIZER, prompts, max_new_tokens=5)
    assert model.training
    assert (measured.num_texts, measured.num_same) == (3, 3)
    assert measured.lowest <= measured.speed_up <= measured.highest
    ratio = measured.fast_tokens_per_second / measured.dense_tokens_per_second
    assert ratio == pytest.approx(measured.speed_up)


def test_texts_are_the_models_own(folder):
    model = load_model(folder).eval()
    prompts = [tuple(TOKENIZER(text)["input_ids"]) for text in ("1 + 1 =", "a", "longer text")]
    texts = write_continuations(model, TOKENIZER, prompts, max_new_tokens=6, batch_size=2)
    for prompt, text in zip(prompts, texts, strict=True):
        output = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        assert text.prompt == prompt
        assert text.tokens == tuple(output[0, len(prompt) :].tolist())
        assert text.ended == (text.tokens[-1] == TOKENIZER.eos_token_id)


def test_a_text_ends_with_its_end(folder):
    model = load_model(folder).eval()
    prompt = tuple(TOKENIZER("1 + 1 =")["input_ids"])
    options = {"max_new_tokens": 6}
    (whole,) = write_continuations(model, TOKENIZER, [prompt], **options)
    model.generation_config.eos_token_id = [whole.tokens[2]]
    (text,) = write_continuations(model, TOKENIZER, [prompt], **options)
    assert text.tokens == whole.tokens[: whole.tokens.index(whole.tokens[2]) + 1]
    assert text.ended


@pytest.mark.parametrize(
    ("record", "answer"),
    [
        ({"prompt": "2 + 2 ="}, ""),
        ({"prompt": "2 + 2 =", "completion": " 4"}, " 4</s>"),
        ({"prompt": "2 + 2 =", "answer": " 4"}, " 4</s>"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, ""),
        ({"instruction": "Add.", "input": "2, 2", "output": "4"}, "4</s>"),
    ],
)
def test_records_of_any_form_ask(record, answer):
    (question,) = read_questions([record], "auto", TOKENIZER, source="x.jsonl")
    assert TOKENIZER.decode(question.answer) == answer
    assert question.prompt
    assert not set(question.answer[:1]) & {None}


def test_words_of_texts_that_tell_do_not_choose(folder, monkeypatch):
    pretend_costs(monkeypatch)
    model = load_model(folder).eval()
    prompts = [tuple(TOKENIZER(f"{n} =")["input_ids"]) for n in range(8)]
    texts = write_continuations(model, TOKENIZER, prompts, max_new_tokens=3)
    texts = [replace(text, tokens=(number, 100, 100)) for number, text in enumerate(texts)]
    answers = [{20 + number} for number in range(8)] + [{50}]
    calibrator = Calibrator(
        backbone=find_parts(model)[0],
        exits=load_exits(folder, model),
        texts=texts,
        answers=answers,
    )
    known = set(calibrator.choose().plan.vocabulary or range(60))
    expected = {0, 1, 4, 5, 100, 20, 21, 24, 25, 50}
    assert known in (expected, set(range(60)))
    assert calibrator.choose().told_by == (2, 6, 3, 7)
    unverified = calibrator.choose_unverified(0.2)
    assert set(unverified.plan.vocabulary or ()) == {0, 4, 100, 20, 24, 50}
    assert unverified.told_by == (3, 7)
    assert unverified.coverage == pytest.approx(4 / 6)
