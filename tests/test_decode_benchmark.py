"""The benchmark of generation: what takes turns, what is compared, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import depthmix
from data_folder import needs_data
from decoding import prompts
from models import tiny_model

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def make_answers(*seconds, texts=()):
    from answers import Answers

    return Answers(list(seconds), [list(text) for text in texts])


def test_ratios_are_of_total_times_with_an_interval_over_prompts():
    from answers import compare

    slow, fast = make_answers(4.0, 2.0, 3.0), make_answers(1.0, 2.0, 1.5)
    found = compare((slow, fast))
    assert found["ratio"] == 2.0
    assert 1.0 <= found["low"] < 2.0 < found["high"] <= 4.0
    both = compare((slow, fast), (make_answers(3.0, 3.0, 3.0), make_answers(1.0, 1.0, 1.0)))
    np.testing.assert_allclose([both[name] for name in found], 3 * np.array([*found.values()]))
    assert compare((slow, slow)) == {"ratio": 1.0, "low": 1.0, "high": 1.0}


def test_texts_are_compared_up_to_their_end():
    from answers import count_same, cut

    assert cut([5, 6, 2, 2, 2], {2}) == [5, 6, 2]
    assert cut([5, 6], {2}) == [5, 6]
    ours = make_answers(1.0, texts=[[5, 2], [5]])
    assert count_same(ours, make_answers(1.0, texts=[[5, 2], [6]])) == 1
    assert make_answers(0.5, 1.0, texts=[[5, 2], [6]]).tokens_per_second == 2.0


def test_ways_take_turns_batch_by_batch():
    from answers import Answer, choose_fastest, take_turns

    calls = []

    def make(name, seconds):
        def answer(batch):
            calls.append((name, batch[0][0]))
            return Answer(seconds, batch)

        return answer

    ways = {name: make(name, seconds) for name, seconds in (("a", 2.0), ("b", 1.0))}
    batches = [[[1]], [[2]], [[3]]]
    found = take_turns(ways, batches)
    assert calls == [*[(n, 1) for n in "ab"], *[(n, 1) for n in "ab"], ("b", 2), ("a", 2)] + [
        (n, 3) for n in "ab"
    ]
    assert found["a"].seconds == [2.0] * 3
    assert found["b"].texts == [[1], [2], [3]]
    assert choose_fastest(ways, batches) == ("b", ways["b"])


def test_rows_of_a_batch_are_padded_on_the_left(monkeypatch):
    from answers import answer_by
    from transformers import GenerationConfig

    model = tiny_model().eval()
    config = GenerationConfig(max_new_tokens=5, pad_token_id=0, eos_token_id=None)
    answer = answer_by(model.generate, config)
    both = answer([[5, 6, 7, 8], [9, 10]])
    assert both.texts == [answer([row]).texts[0] for row in ([5, 6, 7, 8], [9, 10])]
    assert [len(text) for text in both.texts] == [5, 5]
    assert both.seconds > 0


def test_the_earlier_classes_answer_as_the_model_does(monkeypatch, tmp_path):
    from earlier_classes import load_ways

    class Speculation:
        def __init__(self, model, *, draft_layer, num_draft_tokens):
            self.generate = (model, draft_layer, num_draft_tokens)

    monkeypatch.setattr(depthmix, "SelfSpeculation", Speculation, raising=False)
    model = tiny_model().eval()
    model.save_pretrained(tmp_path / "model")
    norms = {layer: {"weight": torch.full((model.config.hidden_size,), 2.0)} for layer in (1, 2)}
    torch.save(norms, tmp_path / "norms.pt")
    ways = load_ways(str(tmp_path / "model"), str(tmp_path / "norms.pt"))
    inputs = prompts(2, 6, padded=True)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(**inputs, **options)
    for name in ("generate", "lazy_depth"):
        assert torch.equal(ways.pop(name)(**inputs, **options), expected)
    mixed = {name: way[1:] for name, way in ways.items()}
    assert mixed == {
        f"self_speculation, layer {layer}, {number} drafts": (layer, number)
        for layer in (1, 2)
        for number in (2, 4)
    }
    model = ways["self_speculation, layer 1, 2 drafts"][0]
    (mixture,) = [one for one in model.modules() if type(one).__name__ == "Mixture"]
    assert list(mixture.late_layers) == [1, 2, model.config.num_hidden_layers]
    assert mixture.norms["2"].weight.tolist() == [2.0] * model.config.hidden_size


def test_without_a_tuned_model_it_refuses(monkeypatch, tmp_path):
    import decode

    monkeypatch.setattr(sys, "argv", ["decode.py", "--tuned", str(tmp_path)])
    with pytest.raises(SystemExit, match="needs a tuned model, and none is here; train it once"):
        decode.main()


def test_texts_whose_models_are_not_here_are_left_out_and_none_is_refused(
    monkeypatch, tmp_path, capsys
):
    import decode_texts

    case = decode_texts.Case(records="gsm8k")
    with pytest.raises(SystemExit, match="needs tuned models, and none is here"):
        decode_texts.measure_all({"key": case}, {"gsm8k": tmp_path})
    assert "key is left out: train its model by `python" in capsys.readouterr().err


def run_toy(name, folder):
    output = folder / f"{name}.json"
    command = [sys.executable, BENCHMARKS / f"{name}.py", "--toy", "--output", output]
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, cwd=folder, timeout=300)
    return json.loads(output.read_text("utf-8"))


@pytest.mark.slow
def test_other_texts_are_measured_on_a_tiny_model(tmp_path):
    found = run_toy("decode_texts", tmp_path)
    assert found["ratios"].keys() == found["cases"].keys() == found["intervals"].keys()
    for case in found["cases"].values():
        if case["dtype"] == "float32":
            assert case["num_same"] == case["num_texts"] == 2
    sys.modules.pop("decode_tables", None)
    from decode_tables import texts_table

    assert texts_table(found).count("steps, float32 |") == 3


@pytest.mark.slow
def test_every_part_runs_on_a_tiny_model(tmp_path):
    found = run_toy("decode", tmp_path)
    assert found["ratios"].keys() == found["intervals"].keys()
    assert {*found["ratios"]} == {
        "fast_posthoc_over_generate",
        "fast_lossless_over_early_exit",
        "fast_lossless_b4_over_generate",
        "fast_lossy_over_generate",
        "fast_worst_over_dense",
        "dense_mode_over_base",
    }
    for group in (*found["batches"].values(), *found["foreign"].values()):
        for name, way in group.items():
            if name != "fast_lossy":
                assert way["num_same"] == way["num_texts"], name
    assert len(found["tuned"]["model"]["sha256"]) == 64
    assert found["threads"] == 1

    sys.modules.pop("decode_tables", None)
    from decode_tables import generation_ratios, generation_table

    table = generation_table(found)
    assert "`LazyDepth` before | batch 1" in table
    assert "the untuned model" in table
    assert generation_ratios(found).count("\n") == 1 + len(found["ratios"])


def test_problems_of_new_templates_are_asked_first_and_learnt_nowhere():
    from tuning_records import NUM_NEW, SPLITS

    training, held_out = SPLITS["new-templates"](240, NUM_NEW + 24)
    new, known = held_out[:NUM_NEW], held_out[NUM_NEW:]
    assert (len(training), len(known)) == (240, 24)
    prompts = [{record["prompt"] for record in part} for part in (training, new, known)]
    assert len(set.union(*prompts)) == sum(map(len, prompts))
    signs = ["% of them", " rows of ", " saves $", "dollars is that?"]  # of the last four templates
    for part, expected in ((training, 0), (known, 0), (new, NUM_NEW // 4)):
        counts = [sum(sign in record["prompt"] for record in part) for sign in signs]
        assert counts == [expected] * len(signs)


@needs_data
@pytest.mark.parametrize("name", ["gsm8k", "alpaca"])
def test_a_data_set_is_split_into_short_records_that_differ(name):
    from tuning_records import MAX_CHARACTERS, SPLITS

    training, held_out = SPLITS[name](32, 8)
    assert (len(training), len(held_out)) == (32, 8)
    texts = ["".join(record.values()) for record in training + held_out]
    assert max(map(len, texts)) <= MAX_CHARACTERS
    assert len({*texts}) == 40
    with pytest.raises(ValueError, match="`steps` needs 10000 records"):
        SPLITS[name](9992, 8)
