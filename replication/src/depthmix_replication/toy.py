"""A tiny random model and invented records: enough to run every experiment, too little to learn."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from depthmix.files.drafts import DRAFT_SUFFIX, move_into, write_whole
from depthmix_replication.sizes import NUM_RECORDS, TOY_CONFIG

SEED = 0
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def write_toy_model(folder: Path) -> Path:
    """Write a random Llama with one token per byte, once.

    Args:
        folder: Where it goes.

    Returns:
        The folder.
    """
    if (folder / "config.json").is_file():
        return folder
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(BPE(vocab={sign: number for number, sign in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    assert len(tokenizer) == TOY_CONFIG["vocab_size"]
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        **TOY_CONFIG,
        max_position_embeddings=512,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config)
    draft = folder.with_name(f".{folder.name}{DRAFT_SUFFIX}")
    tokenizer.save_pretrained(draft)
    model.save_pretrained(draft)
    folder.mkdir(parents=True, exist_ok=True)
    move_into(draft, folder, last=("config.json",))
    return folder


def write_toy_records(folder: Path, kind: str, split: str) -> Path:
    """Write invented records, once: sums, to choose from or to generate.

    Args:
        folder: Where the file goes.
        kind: `choices` or `numbers`.
        split: `train` or `test`; they share no question.

    Returns:
        The file.
    """
    path = folder / f"{kind}-{split}.jsonl"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"{SEED} {kind} {split}")
    first = 0 if split == "train" else 50
    records = [_sum(kind, first + number, rng.randrange(50)) for number in range(NUM_RECORDS)]
    return write_whole(path, "".join(json.dumps(record) + "\n" for record in records))


def _sum(kind: str, a: int, b: int) -> dict[str, Any]:
    """Ask for a sum, with what training and both metrics need."""
    prompt, total = f"Question: {a} + {b}?\nAnswer:", a + b
    if kind == "numbers":
        return {"prompt": prompt, "completion": f" The answer is {total}.", "answer": str(total)}
    choices = [f" {total + shift}" for shift in (0, 1, 10, 11)]
    answer = (a + b) % len(choices)
    choices[0], choices[answer] = choices[answer], choices[0]
    return {
        "prompt": prompt,
        "completion": f" {total}",
        "choices": choices,
        "answer": answer,
    }
