#!/usr/bin/env bash
# DPO over a tuned adapter takes another model as its reference where the adapter tunes embeddings.
#
# trl 1.16.0, peft 0.21.2, transformers 5.23.0, torch 2.13.0.
#
# Expected: from a `PeftModel` without a reference, `DPOTrainer` makes a frozen copy of the adapter,
# named `ref`, so that policy and reference agree at the start and the first loss is ln 2 = 0.6931.
# Seen: plain LoRA, DoRA and `modules_to_save` start at ln 2. With `trainable_token_indices` the
# first loss is 0.558, with LoRA on `embed_tokens` 0.846: those weights' names end with the
# adapter's name, where the copy looks for it in the middle, so the reference has them as they were
# before any tuning. Nothing is said. The same lines stand in the trainers for KTO, GRPO and RLOO.
# Why it matters: whoever adds chat tokens in supervised tuning and goes on with DPO is held to a
# reference that has never seen them. Pass a loaded copy of the tuned model as `ref_model` instead.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0 peft==0.21.2 \
    accelerate==1.15.0 trl==1.16.0 datasets==5.2.0 tokenizers==0.23.3
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import math

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(29))]
words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
)
records = Dataset.from_dict({"prompt": ["w3 w4"], "chosen": [" w5 w6"], "rejected": [" w7 w3"]})


def first_loss(**options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
    )
    options = {"target_modules": ["q_proj", "v_proj"], **options}
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():  # an adapter that has been tuned
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    arguments = DPOConfig(
        output_dir="out",
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model=model, args=arguments, train_dataset=records, processing_class=tokenizer
    )
    trainer.train()
    return trainer.state.log_history[0]["loss"]


exact = {
    "plain LoRA": first_loss(),
    "DoRA": first_loss(use_dora=True),
    "modules_to_save": first_loss(modules_to_save=["lm_head"]),
}
off = {
    "trainable_token_indices": first_loss(trainable_token_indices=list(range(3, 12))),
    "LoRA on embed_tokens": first_loss(target_modules=["embed_tokens", "q_proj"]),
}
print({name: round(loss, 4) for name, loss in (exact | off).items()}, "ln 2:", math.log(2))
assert all(abs(loss - math.log(2)) < 1e-4 for loss in exact.values()), "not as expected"
assert all(abs(loss - math.log(2)) > 1e-3 for loss in off.values()), "the behaviour has changed"
PY
