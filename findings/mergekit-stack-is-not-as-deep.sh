#!/usr/bin/env bash
# mergekit stacks layers of SmolLM3 and OLMo 3 that the written configuration then does not have, and
# drops biases that a Llama may carry.
#
# mergekit 0.1.5, transformers 5.23.0, peft 0.21.2, torch 2.13.0.
#
# Expected: layers 0 to 2 over layers 1 to 3 (`passthrough`) make a model of six layers with the
# logits of that stack, and a model merged with nothing (`linear`, weight 1) is itself; or a refusal.
# Seen: the stack is right for Llama. For SmolLM3 and OLMo 3 six layers are written and `config.json`
# keeps `num_hidden_layers` 4: what is loaded are the first four of them, 0, 1, 2 and 1 (Qwen2 and
# Gemma 2 end in an error). A Llama with `attention_bias` and `mlp_bias` loses its biases, and is
# completed with new ones on loading. mergekit itself says nothing.
# Why it matters: stacking is how a model is made deeper before it is tuned, and a tuned model of four
# layers trains as well as one of six. Read `num_hidden_layers` and the loading report after a merge.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0 \
    accelerate==1.15.0 peft==0.21.2 mergekit==0.1.5
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import copy
import json
from pathlib import Path

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import AutoConfig, AutoModelForCausalLM

input_ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def stack(base):
    slices = [{"sources": [{"model": base, "layer_range": r}]} for r in ([0, 3], [1, 4])]
    return {"merge_method": "passthrough", "slices": slices}


def itself(base):
    models = [{"model": base, "parameters": {"weight": 1.0}}]
    return {"merge_method": "linear", "models": models, "dtype": "float32"}


def tiny(family, **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        **options,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=input_ids, use_cache=False).logits


def merge(model, recipe, name):
    """Merge a model with itself; give the depth that the written configuration has."""
    base = Path(f"{name}-base").resolve()  # one for each, since mergekit keeps what it has read
    model.save_pretrained(base)
    options = MergeOptions(copy_tokenizer=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(recipe(str(base))), name, options)
    return json.loads(Path(name, "config.json").read_text())["num_hidden_layers"]


def stacked(model):
    deeper = copy.deepcopy(model)
    deeper.model.layers = torch.nn.ModuleList(
        copy.deepcopy(model.model.layers[i]) for i in (0, 1, 2, 1, 2, 3)
    )
    deeper.config.num_hidden_layers = 6
    return deeper


llama = tiny("llama")
llama_depth = merge(llama, stack, "llama")
loaded = AutoModelForCausalLM.from_pretrained("llama")
llama_error = (logits(loaded.eval()) - logits(stacked(llama))).abs().max().item()
print(f"llama: {llama_depth} layers, logits off by {llama_error:.2g}")

depths = {}
for family in ("smollm3", "olmo3"):
    model = tiny(family)
    written = merge(model, stack, family)
    loaded = AutoModelForCausalLM.from_pretrained(family).eval()
    fourth = loaded.model.layers[-1].mlp.up_proj.weight
    is_second = torch.equal(fourth, model.model.layers[1].mlp.up_proj.weight)
    depths[family] = (written, len(loaded.model.layers), is_second)
print("written depth, loaded depth, whether the loaded last layer is layer 1:", depths)

biased = tiny("llama", attention_bias=True, mlp_bias=True)
merge(biased, itself, "biased")
loaded, report = AutoModelForCausalLM.from_pretrained("biased", output_loading_info=True)
missing = [name for name in report["missing_keys"] if name.endswith("bias")]
change = (logits(loaded.eval()) - logits(biased)).abs().max().item()
print(f"Llama with biases: {len(missing)} of them lost, logits off by {change:.2f}")

assert llama_depth == 6 and llama_error < 1e-4, "not as expected"
assert all(depth == (4, 4, True) for depth in depths.values()), "the behaviour has changed"
assert len(missing) == 4 * 7 and change > 0.1, "the behaviour has changed"
PY
