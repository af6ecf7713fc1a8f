#!/usr/bin/env bash
# Speculation reads a prompt twice over a cache that is handed in, and answers something else.
#
# transformers 5.23.0, torch 2.13.0.
#
# Expected: greedy `generate` over a cache that holds the prompt's beginning gives the tokens that it
# gives without one, with and without drafts; so it is for plain decoding.
# Seen: with `prompt_lookup_num_tokens`, `assistant_early_exit` and `assistant_model` the first round
# reads the whole prompt, and not only what the cache lacks. What was cached stands there twice; the
# tokens differ from those of plain decoding from the first or soon after, and the cache that comes
# back is longer by as much as was handed in. Nothing is said. How much was cached does not matter: a
# single token does it, and so does the cache that speculation itself returned for the turn before.
# Why it matters: a chat keeps its cache between turns, and a shared system prompt is cached once.
# There the drafts, taken for lossless, change the answers from the second turn on. Hand in no cache.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM


def tiny(depth):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=depth,
        num_attention_heads=4,
        initializer_range=0.3,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


model = tiny(3)
prompts = torch.randint(3, 64, (8, 9), generator=torch.Generator().manual_seed(1))
options = {
    "max_new_tokens": 10,
    "do_sample": False,
    "eos_token_id": None,
    "return_dict_in_generate": True,
}
ways = {
    "plain": {},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "early exit": {"assistant_early_exit": 1},
    "assistant": {"assistant_model": tiny(1)},
}


def decode(input_ids, cache, way):
    mask = torch.ones_like(input_ids)
    return model.generate(input_ids, attention_mask=mask, past_key_values=cache, **options, **way)


def first_turn(cached, way):
    """Give the share of prompts continued as without a cache, and the excess length of the cache."""
    right, excess = 0, set()
    for prompt in prompts.split(1):
        cache = None
        if cached:
            cache = DynamicCache(config=model.config)
            with torch.no_grad():
                model(input_ids=prompt[:, :cached], past_key_values=cache)
        answer = decode(prompt, cache, way)
        right += torch.equal(answer.sequences, decode(prompt, None, {}).sequences)
        excess.add(answer.past_key_values.get_seq_length() - answer.sequences.shape[1] + 1)
    return right / len(prompts), excess


def second_turn(way):
    """Give the share of second questions answered as without the first turn's cache."""
    right = 0
    for prompt, question in zip(prompts.split(1), prompts.flip(0).split(1)):
        turn = decode(prompt, None, way)
        chat = torch.cat([turn.sequences, question], dim=1)
        answer = decode(chat, turn.past_key_values, way)
        right += torch.equal(answer.sequences, decode(chat, None, {}).sequences)
    return right / len(prompts)


for name, way in ways.items():
    shares = {cached: first_turn(cached, way) for cached in (0, 1, 8)}
    chat = second_turn(way)
    print(f"{name}: as without a cache, and cache too long by: {shares}; second turn {chat}")
    assert shares[0] == (1, {0}), "not as expected"
    if name == "plain":
        assert shares[1] == shares[8] == (1, {0}) and chat == 1, "not as expected"
    else:
        assert shares[1][0] < 1 and shares[8][0] < 1 and chat < 1, "the behaviour has changed"
        assert shares[1][1] == {1} and shares[8][1] == {8}, "the behaviour has changed"
PY
