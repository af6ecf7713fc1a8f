#!/usr/bin/env bash
# SFTTrainer minimises the loss of another model where a family does more than project its states.
#
# trl 1.16.0, transformers 5.23.0, torch 2.13.0.
#
# Expected: the logged loss is the model's own, as it is for about a hundred families (Gemma 2's soft
# cap and Cohere's scale included), and falls as the model's own loss does.
# Seen: the trainer multiplies the backbone's last states with the output matrix itself. ModernBERT's
# decoder (the Ettin models) has a dense layer and a norm between the two: they are left out and get
# no gradient, and while the logged loss falls from 5.48 to 0.20 the model's own goes from 5.10 to
# 3.72 (Llama: both from 5.09 to 0.13). RecurrentGemma names its soft cap `logits_soft_cap`, which is
# not looked for: with a cap of 2, the logged loss falls to 0.34 and the model's own to 2.22. Nothing
# is said.
# Why it matters: these are small models that fit a desk, and the curve looks perfect. Compare the
# first logged loss with `model(**batch).loss`, or use `Trainer`, which asks the model.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0 \
    accelerate==1.15.0 trl==1.16.0 datasets==5.2.0 tokenizers==0.23.3
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(61))])}
words = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
)
text = "w3 w9 w4 w8 w5 w7 w6 w3 w5"
records = Dataset.from_dict({"text": [text] * 8})
input_ids = tokenizer(text + " </s>", return_tensors="pt").input_ids


def tune(family, **options):
    """Give the model's own loss before and after training, and the first and last logged loss."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        **options,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)

    @torch.no_grad()
    def own_loss():
        return model.eval()(input_ids=input_ids, labels=input_ids).loss.item()

    before = own_loss()
    arguments = SFTConfig(
        output_dir="out",
        max_steps=30,
        logging_steps=1,
        learning_rate=3e-3,
        per_device_train_batch_size=1,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=records, processing_class=tokenizer
    )
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [before, own_loss(), logged[0], logged[-1]]


results = {
    "llama": tune("llama"),
    "modernbert-decoder": tune("modernbert-decoder"),
    "recurrent_gemma": tune("recurrent_gemma", logits_soft_cap=2.0, num_key_value_heads=4,
                            lru_width=32, block_types=["recurrent", "attention"]),
}
for family, losses in results.items():
    print(family, "own loss {:.2f} to {:.2f}, logged {:.2f} to {:.2f}".format(*losses))
before, after, first, last = results["llama"]
assert abs(before - first) < 1e-3 and after < last + 0.1, "not as expected"
before, after, first, last = results["modernbert-decoder"]
assert abs(before - first) > 0.05 and last < 0.5 * first and after > last + 1, "it has changed"
before, after, first, last = results["recurrent_gemma"]
assert abs(before - first) > 0.05, "the behaviour has changed"
PY
