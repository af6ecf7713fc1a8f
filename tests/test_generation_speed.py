import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints import save_checkpoint
from depthmix import attach, set_top_k
from depthmix.data.rendering import tokenise_prompt
from depthmix.decoding.lazy_depth import LazyDepth
from depthmix.evaluation.generation_speed import measure_generation
from depthmix.method.norm import active_mixture

PROMPTS = ("Question: 1 + 2?", "Another one")


def prompts(tokenizer):
    return [tokenise_prompt(text, tokenizer) for text in PROMPTS]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(save_checkpoint(tmp_path_factory.mktemp("toy")))


@pytest.fixture
def model(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(tokenizer.name_or_path).eval()
    attach(model, late_layers=3, router_init="gaussian")
    with torch.no_grad():
        active_mixture(model).router.weight.normal_(generator=torch.Generator().manual_seed(2))
    return model


def test_layers_are_those_that_ran(model, tokenizer):
    set_top_k(model, 2)
    speeds = measure_generation(
        model, tokenizer, prompts(tokenizer), top_ks=[1, 3], num_new_tokens=5
    )
    assert active_mixture(model).top_k == 2
    assert [speed.top_k for speed in speeds] == [1, 3]
    for speed in speeds:
        set_top_k(model, speed.top_k)
        layers = []
        for prompt in PROMPTS:
            lazy = LazyDepth(model)
            inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
            lazy.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
            layers.append(lazy.layers_per_pass)
        assert speed.layers_per_token == sum(layers) / len(layers)
        assert speed.tokens_per_second > 0
        assert speed.speedup > 0
    assert speeds[0].layers_per_token < speeds[1].layers_per_token == model.config.num_hidden_layers


def test_the_first_turn_only_warms_up(model, tokenizer, monkeypatch):
    clock = iter(
        [t for seconds in (100, 100, 4, 2, 8, 2) for t in (0.0, float(seconds))]  # dense, Top-1
    )
    monkeypatch.setattr(
        "depthmix.evaluation.generation_speed.time.perf_counter", lambda: next(clock)
    )
    (speed,) = measure_generation(
        model, tokenizer, prompts(tokenizer), top_ks=[1], num_new_tokens=4
    )
    assert speed.tokens_per_second == 4 / 2
    assert speed.speedup == 3  # median of 4 / 2 and 8 / 2


def test_what_cannot_be_timed_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="`prompts` must hold"):
        measure_generation(model, tokenizer, [], top_ks=[1])
    plain = AutoModelForCausalLM.from_pretrained(tokenizer.name_or_path)
    with pytest.raises(ValueError, match="`model` must have a mixture"):
        measure_generation(plain, tokenizer, prompts(tokenizer), top_ks=[1])
