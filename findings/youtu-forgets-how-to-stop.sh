#!/usr/bin/env bash
# Loading a Youtu-LLM sets the padding token's weights to zero, and SFTTrainer pads with the end token.
#
# transformers 5.23.0, trl 1.16.0, torch 2.13.0.
#
# Expected: `save_pretrained` and `from_pretrained` return the same weights.
# Seen: for Youtu (`model_type` "youtu") the embedding of `pad_token_id` comes back as zeros, at every
# load; embedding and head are tied, so that token's logit is 0 as well. A tokenizer without a padding
# token is given the end token by `SFTTrainer`, which writes it into the model's configuration: the
# tuned model, saved and loaded, has lost its end token's weights. Llama returns unchanged.
# Why it matters: during the run all is well, and the loaded model has forgotten how to stop. Set a
# padding token of its own, or `config.pad_token_id = None`, before the model is saved.
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

END = 1
words = {word: i for i, word in enumerate(["<unk>", "</s>", *(f"w{i}" for i in range(30))])}
words = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
records = Dataset.from_dict({"text": ["w3 w4 w5", "w6 w7"]})


def tuned(family, **sizes):
    """Give the end token's weights after training, and after saving and loading."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=None,
        tie_word_embeddings=True,
        **sizes,
    )
    model = AutoModelForCausalLM.from_config(config)
    arguments = SFTConfig(
        output_dir="out",
        max_steps=1,
        per_device_train_batch_size=2,
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
    trainer.save_model(family)
    loaded = AutoModelForCausalLM.from_pretrained(family)
    rows = [m.get_output_embeddings().weight[END].detach().cpu() for m in (trainer.model, loaded)]
    return model.config.pad_token_id, rows[0].norm().item(), (rows[0] - rows[1]).norm().item(), rows


latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
          "v_head_dim": 8}
llama_pad, llama_norm, llama_change, _ = tuned("llama")
youtu_pad, youtu_norm, youtu_change, rows = tuned("youtu", **latent)
print(f"end token's weights: Llama {llama_norm:.3f}, changed by {llama_change:.3g} on loading; "
      f"Youtu {youtu_norm:.3f}, changed by {youtu_change:.3g}, loaded {rows[1].norm():.3g}")
assert llama_pad == youtu_pad == END and llama_change == 0 and youtu_norm > 0, "not as expected"
assert rows[1].norm() == 0, "the behaviour has changed"
PY
