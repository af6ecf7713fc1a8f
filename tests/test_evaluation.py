"""Evaluation: judging answers, intervals, and the likelihoods against a naive loop."""

import copy
import math
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from depthmix.evaluation.scoring import (
    Evaluation,
    choice_likelihood,
    exact_match,
)


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<unk>", "</s>", "<pad>", *(f"w{n}" for n in range(97))]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=1.0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def evaluation(correct):
    correct = tuple(map(bool, correct))
    return Evaluation(metric="exact_match", correct=correct, responses=("",) * len(correct))


def test_accuracy_and_wilson_interval():
    result = evaluation([True] * 3 + [False] * 7)
    z, p, n = 1.959964, 0.3, 10
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    radius = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert result.accuracy == pytest.approx(p)
    assert result.interval.low == pytest.approx(centre - radius, abs=1e-6)
    assert result.interval.high == pytest.approx(centre + radius, abs=1e-6)


PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11", "w12 w13", "w3 w14"]


def test_exact_match_batched_equals_plain_generate(model, tokenizer):
    responses = []
    for prompt in PROMPTS:
        input_ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(6):
            next_token = model(input_ids).logits[:, -1].argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, next_token], dim=1)
            if next_token.item() == tokenizer.eos_token_id:
                break
        new_tokens = input_ids[0, len(prompt.split()) :]
        responses.append(tokenizer.decode(new_tokens, skip_special_tokens=True))
    records = [
        {"prompt": prompt, "answer": response if index else "something else"}
        for index, (prompt, response) in enumerate(zip(PROMPTS, responses, strict=True))
    ]
    result = exact_match(model, tokenizer, records, max_new_tokens=6, batch_size=2)
    assert result.responses == tuple(responses)
    assert result.correct == (False, True, True, True, True)
    assert len(set(responses)) == len(responses)


def test_choice_likelihood_equals_naive_loop(model, tokenizer):
    pytest.importorskip("lm_eval")
    records = [
        {
            "prompt": prompt,
            "choices": [" w20", " w21 w22 w23", " w24 w5555 w6"],
            "answer": number % 3,
        }
        for number, prompt in enumerate([*PROMPTS, "w9 w8 "])
    ]
    acc, acc_bytes, nll, preferred = [], [], [], []
    for record in records:
        sums = []
        for choice in record["choices"]:
            input_ids = tokenizer(record["prompt"] + choice, return_tensors="pt")["input_ids"]
            log_probs = model(input_ids).logits.float().log_softmax(-1)[0]
            start = len(record["prompt"].split())
            tokens = range(start, input_ids.shape[1])
            sums.append(sum(log_probs[t - 1, input_ids[0, t]].item() for t in tokens))
        answer = record["answer"]
        best = max(range(3), key=lambda c: sums[c] / len(record["choices"][c].encode()))
        acc.append(max(range(3), key=sums.__getitem__) == answer)
        acc_bytes.append(best == answer)
        nll.append(-sums[answer] / len(record["choices"][answer].split()))
        preferred.append(record["choices"][best])
    result = choice_likelihood(model, tokenizer, records, batch_size=4)
    assert result.correct == tuple(acc_bytes)
    assert result.responses == tuple(preferred)
    assert result.measures["acc"] == pytest.approx(np.mean(acc))
    assert result.measures["acc_bytes"] == result.accuracy
    assert result.measures["nll"] == pytest.approx(np.mean(nll), rel=1e-4)
    assert len(set(preferred)) > 1


@pytest.mark.parametrize("metric", [exact_match, choice_likelihood])
def test_model_and_tokenizer_are_left_as_they_were(model, tokenizer, metric):
    if metric is choice_likelihood:
        pytest.importorskip("lm_eval")
    records = [{"prompt": "w1", "choices": [" w2"], "answer": 0}]
    model.train()
    model.model.norm.eval()
    try:
        metric(model, tokenizer, records, batch_size=1)
        modes = {name for name, module in model.named_modules() if not module.training}
    finally:
        model.eval()
    assert modes == {"model.norm"}
    assert tokenizer.padding_side == "right"
    assert tokenizer.pad_token is None


@pytest.mark.parametrize("metric", [exact_match, choice_likelihood])
def test_an_untrained_adapter_changes_nothing(model, tokenizer, metric):
    if metric is choice_likelihood:
        pytest.importorskip("lm_eval")
    records = [{"prompt": prompt, "choices": [" w2", " w3 w4"], "answer": 1} for prompt in PROMPTS]
    expected = metric(model, tokenizer, records)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"]))
    assert metric(adapted, tokenizer, records) == expected


def test_records_are_checked(model, tokenizer):
    with pytest.raises(ValueError, match="must hold at least one item"):
        exact_match(model, tokenizer, [])
    with pytest.raises(ValueError, match="record 0 lacks answer; it has prompt"):
        exact_match(model, tokenizer, [{"prompt": "w1"}])
    with pytest.raises(ValueError, match="index of one of the 2 choices, counted from 0, got 2"):
        choice_likelihood(
            model, tokenizer, [{"prompt": "w1", "choices": [" w2", " w3"], "answer": 2}]
        )


def test_missing_lm_eval_names_the_extra(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RuntimeError, match=r"needs lm-eval, .*`pip install 'depthmix\[eval\]'`"):
        choice_likelihood(
            model, tokenizer, [{"prompt": "w1", "choices": [" w2", " w3"], "answer": 0}]
        )
