#!/usr/bin/env bash
# Texts packed into one row see each other unless the cache is off, and in some families even then.
#
# transformers 5.23.0, torch 2.13.0.
#
# Expected: position ids that start again at 0, without an attention mask, mark several texts in one
# row, and each is read as if alone; no setting of the cache changes a model's logits.
# Seen: with `use_cache=False` the second text's logits are those that it has alone. With
# `use_cache=True`, the default of most configurations, every model reads the texts before it, in
# training mode, too. gpt_oss, AFMoE and Falcon, which have attention alone and take position ids, do
# so even without a cache, since these are not handed on to the mask. Nothing is said.
# Why it matters: packing is the usual way to fill a batch with short records. A loop of one's own
# trains on what leaks over unless it passes `use_cache=False`; for the named families a trainer that
# passes it, and packs on request, leaks as well.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from transformers import AutoConfig, AutoModelForCausalLM

first, second = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1)).split(1)
packed = torch.cat([first, second], dim=1)
position_ids = torch.arange(7).repeat(2)[None]


def leak(family, **options):
    """Give how far the second text's logits are from those that it has alone, in both settings."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        **options,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
        alone = model(input_ids=second, use_cache=False).logits
        errors = []
        for setting in ({"use_cache": False}, {"use_cache": True}):
            logits = model(input_ids=packed, position_ids=position_ids, **setting).logits[:, 7:]
            errors.append((logits - alone).abs().max().item())
    return errors


experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_experts": 4}
kept_apart = {
    "llama": leak("llama"),
    "qwen3": leak("qwen3", head_dim=8),
    "gemma2": leak("gemma2", head_dim=8),
}
leaking = {
    "gpt_oss": leak("gpt_oss", head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "afmoe": leak("afmoe", head_dim=8, num_shared_experts=1, **experts),
    "falcon": leak("falcon"),
}
for family, (without, with_cache) in (kept_apart | leaking).items():
    print(f"{family}: off by {without:.2g} without a cache, {with_cache:.2g} with one")
assert all(without < 1e-4 for without, _ in kept_apart.values()), "not as expected"
assert all(with_cache > 0.01 for _, with_cache in kept_apart.values()), "the behaviour has changed"
assert all(without > 0.01 for without, _ in leaking.values()), "the behaviour has changed"
PY
