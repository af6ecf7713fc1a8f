#!/usr/bin/env bash
# Over a bfloat16 model PEFT makes frozen parts of an adapter trainable, AdaLoRA's constant too.
#
# peft 0.21.2, transformers 5.23.0, torch 2.13.0.
#
# Expected: the base model's precision does not decide which of an adapter's parts are trained. An
# adapter that is loaded without `is_trainable=True` is frozen, and AdaLoRA's `ranknum`, a constant
# that is not saved, stays what it was set to.
# Seen: in float32 all that holds. Over a bfloat16 base PEFT makes the adapter float32 and wraps
# those parameters anew that lie in a `ParameterDict`, which makes them require gradients again: LoRA
# on embeddings, trainable tokens, IA3, LoHa, LoKr, VeRA and AdaLoRA come back trainable. AdaLoRA's
# `ranknum` is trained along (from 4 to between 3.4 and 3.8 in 50 steps here), is not saved, and the
# reloaded adapter's logits are off by more than 1.
# Why it matters: bfloat16 is what most models are loaded in. A frozen adapter under a new mixture or
# head is tuned with it by any optimizer that takes what requires gradients, and an AdaLoRA adapter
# is not what was evaluated during training.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0 peft==0.21.2 \
    accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def base(dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).to(dtype)


def trainable_after_loading(dtype, **options):
    get_peft_model(base(dtype), LoraConfig(**options)).save_pretrained("adapter")
    loaded = PeftModel.from_pretrained(base(dtype), "adapter")
    return [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]


def train_adalora(dtype):
    options = {"init_r": 4, "target_r": 4, "total_step": 200, "task_type": "CAUSAL_LM"}
    model = get_peft_model(base(dtype), AdaLoraConfig(target_modules=["q_proj", "v_proj"], **options))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    input_ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    for _ in range(50):
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ranks = [p.item() for name, p in model.named_parameters() if "ranknum" in name]
    model.eval().save_pretrained("adalora")
    reloaded = PeftModel.from_pretrained(base(dtype), "adalora").eval()
    with torch.no_grad():
        difference = model(input_ids=input_ids).logits - reloaded(input_ids=input_ids).logits
    return min(ranks), difference.abs().max().item()


on_embeddings = {"target_modules": ["embed_tokens", "q_proj"]}
with_tokens = {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]}
for dtype in (torch.float32, torch.bfloat16):
    names = trainable_after_loading(dtype, **on_embeddings)
    names += trainable_after_loading(dtype, **with_tokens)
    rank, difference = train_adalora(dtype)
    print(f"{dtype}: trainable after loading: {names}")
    print(f"    AdaLoRA's ranknum after training {rank:.2f}, reloaded logits off by {difference:.2g}")
    if dtype == torch.float32:
        assert not names and rank == 4 and difference < 1e-4, "not as expected"
    else:
        assert len(names) == 3 and rank < 3.9 and difference > 0.3, "the behaviour has changed"
PY
