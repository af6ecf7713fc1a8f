#!/usr/bin/env bash
# An activated LoRA (aLoRA) is not the same adapter under self-speculation or without a cache.
#
# peft 0.21.2, transformers 5.23.0, torch 2.13.0.
#
# Expected: greedy decoding gives the same tokens with a cache, with `use_cache=False`, and with
# `assistant_early_exit`, whose drafts are all checked by the full model.
# Seen: with a cache they are the tokens of a plain loop of forward passes, also with prompt lookup.
# With `use_cache=False`, and with `assistant_early_exit`, they are others: where the adapter sets in
# is counted from the end of the prompt, and that count is kept while the sequence grows, so the
# adapter is switched on later and later. No warning.
# Why it matters: self-speculation by an early exit is taken for lossless, and `use_cache=False` for
# slow only. An evaluation that uses either measures another adapter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0 peft==0.21.2 \
    accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from peft import LoraConfig, get_peft_model
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
)
base = LlamaForCausalLM(config)
prompts = torch.randint(9, 64, (6, 6), generator=torch.Generator().manual_seed(1))
prompts[:, 2:4] = torch.tensor([7, 8])
options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}


@torch.no_grad()
def loop(model, input_ids):
    for _ in range(options["max_new_tokens"]):
        mask = torch.ones_like(input_ids)
        token = model(input_ids=input_ids, attention_mask=mask).logits[:, -1:].argmax(-1)
        input_ids = torch.cat([input_ids, token], dim=1)
    return input_ids


def measure(**lora):
    """Give, for each way of decoding, the share of prompts continued as by plain forward passes."""
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **lora)
    model = get_peft_model(base, lora)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.eval()
    ways = {
        "cache": {},
        "prompt lookup": {"prompt_lookup_num_tokens": 2},
        "no cache": {"use_cache": False},
        "early exit": {"assistant_early_exit": 1},
    }
    shares = dict.fromkeys(ways, 0)
    for row in prompts.split(1):
        expected = loop(model, row)
        for name, way in ways.items():
            tokens = model.generate(input_ids=row, attention_mask=torch.ones_like(row), **options, **way)
            shares[name] += torch.equal(tokens, expected)
    model.unload()
    return {name: share / len(prompts) for name, share in shares.items()}


plain = measure()
activated = measure(alora_invocation_tokens=[7, 8])
print("continued as by forward passes: LoRA", plain, "aLoRA", activated)
assert min(plain.values()) > 0.99, "not as expected"
assert activated["cache"] > 0.99 and activated["prompt lookup"] > 0.99, "not as expected"
assert activated["no cache"] < 1 and activated["early exit"] < 1, "the behaviour has changed"
PY
