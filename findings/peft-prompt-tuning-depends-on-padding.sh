#!/usr/bin/env bash
# Prompt tuning answers otherwise when a prompt is padded on the left, as in every batch.
#
# peft 0.21.2, transformers 5.23.0, torch 2.13.0.
#
# Expected: `generate` on a left-padded prompt with its attention mask gives the tokens that the
# prompt gives alone, as it does for the base model, LoRA and prefix tuning.
# Seen: with prompt tuning and p-tuning the tokens differ. The virtual tokens stand before the
# padding, and PEFT drops position ids, so the padding lies between the tuned prompt and the text and
# moves the text away from it by its own length. PEFT warns that position ids are ignored, padding or
# not, and of nothing else.
# Why it matters: an evaluation's score depends on the batch size and on which prompts share a batch.
# Evaluate such adapters one prompt at a time.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0 peft==0.21.2 \
    accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from peft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import LlamaConfig, LlamaForCausalLM

prompts = torch.randint(3, 64, (8, 6), generator=torch.Generator().manual_seed(1))
padding = torch.zeros(8, 5, dtype=torch.long)
mask = torch.ones_like(prompts)


def same_tokens(peft_config):
    """Give the share of prompts that are continued as they are alone."""
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
    model = LlamaForCausalLM(config)
    if peft_config is not None:
        model = get_peft_model(model, peft_config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    alone = model.eval().generate(input_ids=prompts, attention_mask=mask, **options)[:, 6:]
    padded = model.generate(
        input_ids=torch.cat([padding, prompts], dim=1),
        attention_mask=torch.cat([padding, mask], dim=1),
        **options,
    )[:, 11:]
    return (alone == padded).all(dim=1).float().mean().item()


virtual = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
shares = {
    "base": same_tokens(None),
    "LoRA": same_tokens(LoraConfig(task_type="CAUSAL_LM")),
    "prefix tuning": same_tokens(PrefixTuningConfig(**virtual)),
    "prompt tuning": same_tokens(PromptTuningConfig(**virtual)),
    "p-tuning": same_tokens(PromptEncoderConfig(**virtual)),
}
print("continued as alone:", shares)
assert shares["base"] == shares["LoRA"] == shares["prefix tuning"] == 1, "not as expected"
assert shares["prompt tuning"] < 1 and shares["p-tuning"] < 1, "the behaviour has changed"
PY
