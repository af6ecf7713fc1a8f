#!/usr/bin/env bash
# PEFT's `add_weighted_adapter` combines rsLoRA, DoRA, biases and trained tokens wrongly, in silence.
#
# peft 0.21.2, transformers 5.23.0, torch 2.13.0.
#
# Expected: with `combination_type="cat"`, which is exact, the combined adapter adds the weighted sum
# of what its parts add, or the call is refused, as it is for `modules_to_save`.
# Seen: exact for plain LoRA, with different ranks and `alpha`, too. With `use_rslora` the result is
# too large by the square root of the new rank (4 for two adapters of rank 8). With `lora_bias` the
# biases are lost, with `use_dora` the magnitudes, and with `trainable_token_indices` the combination
# of one adapter with weight 1 has the base model's rows in place of the trained ones.
# Why it matters: a weighted combination is the usual way to mix adapters without training, and rsLoRA
# the usual choice at high rank: the mixture is too strong by a factor that grows with its parts.
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

WEIGHTS = {"first": 0.7, "second": 0.4}


def adapted(**options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config)
    for name in WEIGHTS:
        lora = LoraConfig(target_modules=["v_proj"], **options)
        if name == "first":
            model = get_peft_model(model, lora, adapter_name=name)
        else:
            model.add_adapter(name, lora)
        model.set_adapter(name)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


@torch.no_grad()
def combined_to_sum(**options):
    """Give the relative error of the combination's output, and its size relative to the sum."""
    model = adapted(**options)
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    states = torch.randn(16, 32)
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "both", "cat")
    added = {}
    for name in (*WEIGHTS, "both"):
        model.set_adapter(name)
        added[name] = layer(states) - layer.base_layer(states)
    total = sum(weight * added[name] for name, weight in WEIGHTS.items())
    return ((added["both"] - total).norm() / total.norm()).item(), (
        added["both"].norm() / total.norm()
    ).item()


@torch.no_grad()
def tokens_kept():
    """Give how far the logits of one adapter, combined with weight 1 alone, are from its own."""
    model = adapted(trainable_token_indices=[5, 6])
    model.add_weighted_adapter(["first"], [1.0], "alone", "cat")
    input_ids = torch.tensor([[5, 6, 5, 6]])
    model.set_adapter("first")
    own = model(input_ids=input_ids).logits
    model.set_adapter("alone")
    return (model(input_ids=input_ids).logits - own).abs().max().item()


plain, _ = combined_to_sum()
rslora, ratio = combined_to_sum(use_rslora=True)
bias, _ = combined_to_sum(lora_bias=True)
dora, _ = combined_to_sum(use_dora=True)
tokens = tokens_kept()
print(f"relative error: plain {plain:.2g}, rsLoRA {rslora:.2g} ({ratio:.2f} times too large), "
      f"lora_bias {bias:.2g}, DoRA {dora:.2g}; trained tokens: logits off by {tokens:.2g}")
assert plain < 1e-5, "not as expected"
assert abs(ratio - 4) < 1e-3, "the behaviour has changed for rsLoRA"
assert bias > 0.05 and dora > 0.05 and tokens > 0.1, "the behaviour has changed"
PY
