#!/usr/bin/env bash
# lm-eval scores another model than the one it is given, where an adapter replaces a tied embedding.
#
# lm_eval 0.4.13, peft 0.21.2, transformers 5.23.0, torch 2.13.0.
#
# Expected: `HFLM` measures the adapted model, handed over in memory or as `pretrained=…,peft=…`.
# Seen: it ties the model's weights anew before it begins. If the base ties embedding and head, and the
# adapter has a trained `embed_tokens` in `modules_to_save`, that ends the adapter's embedding: logits
# are off by about their effect, in the caller's own model, too, and nothing is said. With a trained
# `lm_head`, or with `trainable_token_indices`, it is a KeyError or an AttributeError about `weight`.
# A merged model, a base that does not tie, and adapters that leave the embedding alone are scored as
# they are.
# Why it matters: small models tie, and new chat tokens are the reason to train embeddings: the score
# in the table is that of a model whose new tokens were never trained. Merge before evaluating.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0 peft==0.21.2 \
    accelerate==1.15.0 lm_eval==0.4.13 tokenizers==0.23.3
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
input_ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model):
    return model(input_ids=input_ids).logits


def measure(*, tied=True, merged=False, from_files=False, **options):
    """Give how far the logits that are scored are from the adapted model's, or the error's name."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    if from_files:
        model.save_pretrained("base")
        tokenizer.save_pretrained("base")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **options)
    model = get_peft_model(model, lora).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    if from_files:
        model.save_pretrained("adapter")
    if merged:
        model = model.merge_and_unload()
    expected = logits(model)
    try:
        if from_files:
            harness = HFLM(pretrained="base", peft="adapter", device="cpu", dtype="float32")
        else:
            harness = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu")
    except (AttributeError, KeyError) as error:
        return type(error).__name__
    return (logits(harness.model) - expected).abs().max().item()


embedding = {"modules_to_save": ["embed_tokens"]}
as_given = {
    "LoRA alone": measure(),
    "embedding, not tied": measure(tied=False, **embedding),
    "embedding, merged": measure(merged=True, **embedding),
}
changed = {
    "embedding": measure(**embedding),
    "embedding, from files": measure(from_files=True, **embedding),
}
raised = {
    "head": measure(modules_to_save=["lm_head"]),
    "tokens": measure(trainable_token_indices=[5, 6]),
}
print("logits off by, or error:", as_given | changed | raised)
assert max(as_given.values()) < 1e-4, "not as expected"
assert min(changed.values()) > 0.1, "the behaviour has changed"
assert raised == {"head": "KeyError", "tokens": "AttributeError"}, "the behaviour has changed"
PY
