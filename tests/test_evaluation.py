"""Own records on a model in memory: answers and likelihoods against naive loops."""

import copy
import math
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from depthmix.evaluation.result import TaskResult
from depthmix.evaluation.scoring import find_intervals, score
from depthmix.evaluation.tasks import records_config


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


def ask(model, tokenizer, records, metric, *, max_new_tokens=128, batch_size=16):
    """Measure records that are tokenised as texts; give lm-eval's samples and means."""
    configs = records_config(records, metric=metric, max_new_tokens=max_new_tokens)
    outcome = score(model, tokenizer, configs, batch_size=batch_size)
    return outcome["samples"]["records"], outcome["results"]["records"]


def test_a_task_says_its_mean_with_wilsons_interval():
    scores = {("t", str(item), 0): float(item < 3) for item in range(10)}
    result = TaskResult(metric="exact_match,stated", scores=scores)
    z, p, n = 1.959964, 0.3, 10
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    radius = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert result.mean == pytest.approx(p)
    assert result.interval.low == pytest.approx(centre - radius, abs=1e-6)
    assert result.interval.high == pytest.approx(centre + radius, abs=1e-6)
    assert str(result) == "30.0% right (95 % interval 10.8% to 60.3%)"


PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11", "w12 w13", "w3 w14"]


def test_exact_match_batched_equals_plain_generate(model, tokenizer):
    pytest.importorskip("lm_eval")
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
    samples, means = ask(model, tokenizer, records, "exact_match", max_new_tokens=6, batch_size=2)
    assert [sample["resps"][0][0] for sample in samples] == responses
    assert [sample["exact_match"] for sample in samples] == [0, 1, 1, 1, 1]
    assert means["exact_match,stated"] == 0.8
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
    samples, means = ask(model, tokenizer, with_ids(records, tokenizer), "choices", batch_size=4)
    assert [sample["acc_bytes"] for sample in samples] == acc_bytes
    assert [sample["nll"] for sample in samples] == pytest.approx(nll, rel=1e-4)
    assert means["acc,none"] == pytest.approx(np.mean(acc))
    assert means["acc_bytes,none"] == pytest.approx(np.mean(acc_bytes))
    assert means["nll,none"] == pytest.approx(np.mean(nll), rel=1e-4)
    low, high = find_intervals(samples)["nll,none"]
    assert low < np.mean(nll) < high
    texts, _ = ask(model, tokenizer, records, "choices", batch_size=4)
    assert [sample["acc_bytes"] for sample in texts] == acc_bytes
    assert "nll" not in texts[0]
    assert len(set(preferred)) > 1


def test_loss_equals_naive_loop(model, tokenizer):
    pytest.importorskip("lm_eval")
    texts = [("w1 w2", "w3 w4 w5"), ("w1 w2", "w6"), ("w7", "w8 w9"), ("", "w10 w11")]
    records, expected = [], []
    for prompt, completion in texts:
        prompt_ids = tokenizer(prompt)["input_ids"]
        ids = [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
        row = {"prompt": prompt, "completion": completion}
        records.append({**row, "prompt_ids": prompt_ids, "completion_ids": ids})
        given = prompt_ids or [tokenizer.eos_token_id]  # something must predict the first token
        log_probs = model(torch.tensor([given + ids])).logits.float().log_softmax(-1)[0]
        nll = [-log_probs[len(given) - 1 + at, token].item() for at, token in enumerate(ids)]
        expected.append(np.mean(nll))
    samples, means = ask(model, tokenizer, records, "loss", batch_size=2)
    assert [sample["nll"] for sample in samples] == pytest.approx(expected, rel=1e-4)
    assert means["nll,none"] == pytest.approx(np.mean(expected), rel=1e-4)
    long = {**records[0], "completion_ids": [3] * 65}
    with pytest.raises(ValueError, match=r"texts of at most 64 tokens.*one has 65"):
        ask(model, tokenizer, [long], "loss")


def with_ids(records, tokenizer):
    """Add the tokens that rendering gives."""
    return [
        {
            **record,
            "prompt_ids": tokenizer(record["prompt"])["input_ids"],
            "choice_ids": [tokenizer(choice)["input_ids"] for choice in record["choices"]],
        }
        for record in records
    ]


@pytest.mark.parametrize("metric", ["exact_match", "choices"])
def test_model_and_tokenizer_are_left_as_they_were(model, tokenizer, metric):
    pytest.importorskip("lm_eval")
    records = [{"prompt": "w1", "choices": [" w2"], "answer": 0}]
    model.train()
    model.model.norm.eval()
    try:
        ask(model, tokenizer, records, metric, batch_size=1, max_new_tokens=4)
        modes = {name for name, module in model.named_modules() if not module.training}
    finally:
        model.eval()
    assert modes == {"model.norm"}
    assert tokenizer.padding_side == "right"
    assert tokenizer.pad_token is None


@pytest.mark.parametrize("metric", ["exact_match", "choices"])
def test_an_untrained_adapter_changes_nothing(model, tokenizer, metric):
    pytest.importorskip("lm_eval")
    records = [{"prompt": prompt, "choices": [" w2", " w3 w4"], "answer": 1} for prompt in PROMPTS]
    expected = ask(model, tokenizer, records, metric, max_new_tokens=4)[1]
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"]))
    assert ask(adapted, tokenizer, records, metric, max_new_tokens=4)[1] == expected


def test_missing_lm_eval_names_the_extra(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RuntimeError, match=r"needs lm-eval, .*`pip install 'depthmix\[eval\]'`"):
        score(model, tokenizer, [], batch_size=1)
