#!/usr/bin/env bash
# PEFT merges into a weight once for every module that shares it: tied embeddings, replicated layers.
#
# peft 0.21.2, transformers 5.23.0, torch 2.13.0.
#
# Expected: where PEFT itself arranges the sharing, `merge_and_unload` gives the adapted model's
# logits, or refuses. `ensure_weight_tying=True` trains one adapter for embedding and head of a tied
# model; `layer_replication` makes a deeper model of layers that share their weights.
# Seen: embedding and head are merged one after the other into the one tensor, so the merged
# embedding has moved by exactly twice the adapter. With layers replicated, each copy's own adapter is
# added to the weight of all copies. Logits are off by about their own size, while saving and loading
# the adapter is exact. For tied weights a warning speaks of complications when the adapter is made;
# at the merge, and for replicated layers, nothing is said.
# Why it matters: small models tie their embeddings, and replicated layers are the cheap way to try
# more depth. Evaluations of the adapter are right, and the exported model is another one. Clone the
# weights before the merge.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0 peft==0.21.2 \
    accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

input_ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def base(tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=input_ids).logits


def measure(*, tied=False, target_modules=("q_proj", "v_proj"), **options):
    """Give how far a reloaded and a merged adapter are from the adapted model, and the merged model."""
    model = get_peft_model(base(tied), LoraConfig(target_modules=list(target_modules), **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    expected = logits(model.eval())
    model.save_pretrained("adapter")
    reloaded = PeftModel.from_pretrained(base(tied), "adapter").eval()
    delta = None
    if tied:
        delta = model.base_model.model.model.embed_tokens.get_delta_weight("default").detach()
    merged = model.merge_and_unload()
    errors = [(logits(other) - expected).abs().max().item() for other in (reloaded, merged)]
    return *errors, merged, delta


_, plain, _, _ = measure()
reloaded_tied, tied, merged, delta = measure(
    tied=True, target_modules=["embed_tokens"], ensure_weight_tying=True
)
moved = merged.model.embed_tokens.weight.detach() - base(True).model.embed_tokens.weight.detach()
times = (moved.norm() / delta.norm()).item()
reloaded_copies, copies, _, _ = measure(layer_replication=[[0, 2], [1, 3]])
print(f"merged logits off by: plain {plain:.2g}, tied {tied:.2g} (weight moved {times:.3f} times "
      f"the adapter), replicated {copies:.2g}; reloaded {reloaded_tied:.2g}, {reloaded_copies:.2g}")
assert max(plain, reloaded_tied, reloaded_copies) < 1e-4, "not as expected"
assert abs(times - 2) < 1e-3 and tied > 0.5 and copies > 0.5, "the behaviour has changed"
PY
