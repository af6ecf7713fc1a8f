#!/usr/bin/env bash
# Hidden states and attentions of tokens drafted in the first round are those of the prompt's start.
#
# transformers 5.23.0, torch 2.13.0.
#
# Expected: `return_dict_in_generate` with `output_hidden_states` gives one entry per token, the
# states at its position, with drafts as without; so it is for `scores` and `logits`.
# Seen: there are as many entries, of the same shapes. Where the first round accepts k drafts, the
# entries 1 to k repeat what was read at the prompt's first k positions, exactly; only the rounds
# after it are right. So it is with `assistant_early_exit` and with `assistant_model`, and for
# `attentions`, too. Tokens, scores and logits are right, so nothing shows it.
# Why it matters: states of generated tokens are collected for probes, exits and distillation. The
# better the drafts, the more of them describe the prompt's first words instead. Collect them in a
# pass of one's own over the finished text.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    initializer_range=0.3,
    pad_token_id=0,
    attn_implementation="eager",
)
model = LlamaForCausalLM(config).eval()
with torch.no_grad():  # upper layers of small effect, so that an early exit's drafts are accepted
    for layer in model.model.layers[1:]:
        layer.mlp.down_proj.weight.mul_(0.1)
        layer.self_attn.o_proj.weight.mul_(0.1)
assistant = copy.deepcopy(model)  # its drafts are all accepted
options = {
    "max_new_tokens": 8,
    "do_sample": False,
    "eos_token_id": None,
    "return_dict_in_generate": True,
    "output_logits": True,
    "output_hidden_states": True,
    "output_attentions": True,
}
prompt = torch.randint(3, 64, (1, 6), generator=torch.Generator().manual_seed(1))
ways = {"early exit": {"assistant_early_exit": 1}, "assistant": {"assistant_model": assistant}}
mask = torch.ones_like(prompt)
plain = model.generate(prompt, attention_mask=mask, **options)


def distance(left, right):
    return max((a - b).abs().max().item() for a, b in zip(left, right))


for name, way in ways.items():
    drafted = model.generate(prompt, attention_mask=mask, **options, **way)
    assert torch.equal(plain.sequences, drafted.sequences), "not as expected"
    assert distance(plain.logits, drafted.logits) < 1e-4, "not as expected"
    wrong, prompts_own = [], []
    for entry in range(1, len(plain.hidden_states)):
        states = drafted.hidden_states[entry]
        if distance(plain.hidden_states[entry], states) > 1e-2:
            wrong.append(entry)
            start = [layer[:, entry - 1 : entry] for layer in plain.hidden_states[0]]
            prompts_own.append(distance(start, states) < 1e-4)
    attentions = max(map(distance, plain.attentions, drafted.attentions))
    print(f"{name}: entries with other states {wrong}, the prompt's own {prompts_own}; "
          f"attentions off by {attentions:.2f}")
    assert wrong and wrong == list(range(1, len(wrong) + 1)), "the behaviour has changed"
    assert all(prompts_own) and attentions > 0.1, "the behaviour has changed"
PY
