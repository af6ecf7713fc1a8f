"""Free answers: sampling row by row, resumption, and what tells one model from another."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy import stats

from adapters import tuned_model
from checkpoints import make_model, make_tokenizer
from depthmix.data.rendering import tokenise_prompt
from depthmix.decoding.lazy_depth import LazyDepth
from depthmix.evaluation.answer_file import AnswerFile, fingerprint
from depthmix.evaluation.answering import SeededSampling, answer, derive_seed
from models import randomise, tiny_model

TEXTS = ["Ants", "What do plants breathe in?", "Q: 1 + 1", "A longer text than all of the others"]
PROMPTS = [tokenise_prompt(text, make_tokenizer()) for text in TEXTS]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_sampling_draws_from_the_softmax(temperature):
    num_draws = 4000
    logits = torch.tensor([1.0, -2.0, 0.5, 3.0, float("-inf")])
    sampling = SeededSampling([temperature] * num_draws, list(range(num_draws)))
    draws = sampling(torch.zeros(num_draws, 1, dtype=torch.long), logits.repeat(num_draws, 1))
    counts = torch.bincount(draws.argmax(-1), minlength=5).numpy()
    expected = (logits / temperature).softmax(-1).double().numpy() * num_draws
    assert counts[4] == 0
    expected = expected[:4] * counts.sum() / expected[:4].sum()
    assert stats.chisquare(counts[:4], expected).pvalue > 1e-3


def test_successive_draws_of_a_row_are_independent():
    sampling = SeededSampling([1.0], [7])
    logits = torch.zeros(1, 2)
    draws = np.array(
        [sampling(torch.zeros(1, 1, dtype=torch.long), logits).argmax().item() for _ in range(2000)]
    )
    table = np.histogram2d(draws[:-1], draws[1:], bins=2)[0]
    assert abs(draws.mean() - 0.5) < 0.04
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_a_row_at_temperature_zero_stays_as_it_is():
    scores = torch.randn(2, 9)
    result = SeededSampling([0.0, 1.0], [1, 1])(torch.zeros(2, 1, dtype=torch.long), scores)
    assert torch.equal(result[0], scores[0])
    assert not torch.equal(result[1], scores[1])


def test_greedy_answers_equal_plain_generate_row_by_row(model, tokenizer):
    expected = []
    for text in TEXTS:
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=8, pad_token_id=0)
        new_tokens = output[0, inputs["input_ids"].shape[1] :]
        expected.append(tokenizer.decode(new_tokens, skip_special_tokens=True).strip())
    assert answer(model, tokenizer, PROMPTS, max_new_tokens=8) == expected
    assert len(set(expected)) == len(TEXTS)


def test_a_sampled_answer_is_the_same_in_any_batch(model, tokenizer):
    options = {"temperatures": [0.7, 0.0, 30.0, 30.0], "seeds": [1, 2, 3, 4]}
    together = answer(model, tokenizer, PROMPTS, max_new_tokens=8, **options)
    for row, prompt in enumerate(PROMPTS):
        alone = {name: [values[row]] for name, values in options.items()}
        assert answer(model, tokenizer, [prompt], max_new_tokens=8, **alone) == [together[row]]
    others = answer(
        model, tokenizer, PROMPTS, max_new_tokens=8, **options | {"seeds": [5, 6, 7, 8]}
    )
    greedy = answer(model, tokenizer, PROMPTS, max_new_tokens=8)
    assert together[1] == others[1] == greedy[1]
    assert together[2] != others[2]
    assert together[3] != others[3]


def test_an_answer_ends_before_the_first_stop_string(model, tokenizer):
    (whole,) = answer(model, tokenizer, PROMPTS[:1], max_new_tokens=12)
    stop = whole[4:6]
    (cut,) = answer(
        model, tokenizer, PROMPTS[:1], max_new_tokens=12, stop_strings=[whole[7:9], stop]
    )
    assert cut == whole[: whole.find(stop)].strip()


def test_lazy_depth_gives_the_same_answers():
    tokenizer = make_tokenizer()
    model = tuned_model(make_model(tokenizer)).eval()
    expected = answer(model, tokenizer, PROMPTS, max_new_tokens=6)
    assert answer(LazyDepth(model), tokenizer, PROMPTS, max_new_tokens=6) == expected
    assert fingerprint(LazyDepth(model)) == fingerprint(model)


def test_model_and_tokenizer_are_left_as_they_were(model, tokenizer):
    model.train()
    try:
        answer(model, tokenizer, PROMPTS, max_new_tokens=2)
        assert model.training
    finally:
        model.eval()
    assert tokenizer.padding_side == "right"
    assert tokenizer.pad_token is None


def test_seeds_differ_by_each_number():
    seeds = {derive_seed(a, b, c) for a in range(4) for b in range(4) for c in range(4)}
    assert len(seeds) == 64
    assert derive_seed(0, 81, 1) == derive_seed(0, 81, 1)


def test_a_fingerprint_tells_models_apart():
    first = fingerprint(tiny_model())
    assert first == fingerprint(tiny_model())
    assert len(first) == 16
    assert first != fingerprint(tiny_model(seed=1))
    assert first != fingerprint(tiny_model().to(torch.bfloat16))
    tuned = tuned_model(tiny_model())
    before = fingerprint(tuned)
    randomise(tuned, seed=5, only_trainable=True)
    assert len({first, before, fingerprint(tuned)}) == 3


def test_answers_are_kept_line_by_line(tmp_path):
    path = tmp_path / "folder" / "answers.jsonl"
    AnswerFile(path, {"seed": 0}).add({3: ["first\nline", "zweite \u2028 ü"], 1: ["a"]})
    again = AnswerFile(path, {"seed": 0})
    assert again.answers == {3: ["first\nline", "zweite \u2028 ü"], 1: ["a"]}
    again.add({2: ["b"]})
    assert AnswerFile(path, {"seed": 0}).answers == again.answers
    assert path.read_text("utf-8").count("\n") == 3


def test_half_a_line_counts_for_nothing(tmp_path):
    path = tmp_path / "answers.jsonl"
    AnswerFile(path, {}).add({1: ["whole"]})
    whole = path.read_text("utf-8")
    path.write_text(whole + json.dumps({"item": 2, "turns": ["ha"]})[:-4], "utf-8")
    file = AnswerFile(path, {})
    assert file.answers == {1: ["whole"]}
    file.add({2: ["new"]})
    assert AnswerFile(path, {}).answers == {1: ["whole"], 2: ["new"]}


def test_answers_under_other_settings_are_refused(tmp_path):
    AnswerFile(tmp_path / "answers.jsonl", {"seed": 0}).add({1: ["a"]})
    with pytest.raises(ValueError, match=r"answers made under other settings, \{'seed': 0\}"):
        AnswerFile(tmp_path / "answers.jsonl", {"seed": 1})


@pytest.mark.parametrize("line", ["no JSON", "[1, 2]", '{"item": 1, "turns": []}'])
def test_a_damaged_file_is_refused(tmp_path, line):
    (tmp_path / "answers.jsonl").write_text(line + "\n", "utf-8")
    with pytest.raises(ValueError, match=r"Line 1 of .* is no answer"):
        AnswerFile(tmp_path / "answers.jsonl", {})
