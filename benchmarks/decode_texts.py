"""Fast generation on other texts than those of `decode.py`, and in bfloat16.

Each model is one that `tuned_model.py --records NAME` trained, merged, with exits that were put on
it when it was finished; it is calibrated on held-out records, and asked others. Where a model is
not there the rest is measured, and that is said.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from answers import compare, count_same, split, take_turns
from results import parse_arguments, rounded, write_results
from toy_subject import TOY_HELD_OUT, make_toy
from transformers.utils.logging import disable_progress_bar
from tuned_model import find_tuned_model, name_folder
from tuned_subject import Subject, describe_plan, engine_of, find_exit_folder


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one model is asked."""

    records: str
    """What it was tuned on."""

    dtype: str = "float32"
    """Type of its weights."""

    num_prompts: int = 12
    """Prompts that are measured."""

    num_calibrating: int = 120
    """Records that calibrate."""

    max_new_tokens: int = 64
    """Tokens of an answer at most."""


CASES = {
    "fast_lossless_over_generate": Case(records="new-templates"),
    "fast_lossless_text_over_generate": Case(
        records="gsm8k", num_calibrating=60, max_new_tokens=128
    ),
    "fast_lossless_instructions_over_generate": Case(
        records="alpaca", num_calibrating=60, max_new_tokens=128
    ),
    "fast_lossless_bfloat16_over_generate": Case(records="problems", dtype="bfloat16"),
}
"""By the key of the ratio."""


def measure(case: Case, subject: Subject) -> dict[str, Any]:
    """Calibrate a model, and compare fast generation with its own, prompt by prompt in turn."""
    held_out = subject.tuned.held_out
    prompts = [list(one.prompt) for one in subject.ask(held_out, slice(0, case.num_prompts))]
    calibrator = subject.calibrate(subject.ask(held_out, slice(-case.num_calibrating, None)))
    chosen = calibrator.choose()
    fast = subject.fast(chosen.plan)
    ways = {"generate": subject.own_way(), "fast": subject.way_of(fast)}
    found = take_turns(ways, split(prompts, 1))
    return {
        **rounded(compare((found["generate"], found["fast"])).items()),
        "tokens_per_second": rounded([("fast", found["fast"].tokens_per_second)])["fast"],
        "num_same": count_same(found["generate"], found["fast"]),
        "num_texts": len(prompts),
        "expected": asdict(chosen.expected),
        "plan": describe_plan(chosen.plan),
        "engine": engine_of(fast),
    }


def measure_all(cases: Mapping[str, Case], folders: Mapping[str, Path]) -> dict[str, Any]:
    """Measure the models that are there.

    Raises:
        SystemExit: If none is.
    """
    measured = {}
    for key, case in cases.items():
        try:
            tuned = find_tuned_model(folders[case.records])
        except FileNotFoundError:
            command = f"python benchmarks/tuned_model.py --records {case.records}"
            print(f"{key} is left out: train its model by `{command}`.", file=sys.stderr)
            continue
        print(f"Measuring {case.records} in {case.dtype}", flush=True)
        exits = find_exit_folder(tuned, None)
        subject = Subject(tuned, exits, case.max_new_tokens, dtype=case.dtype)
        measured[key] = {**asdict(case), **subject.about(), **measure(case, subject)}
    if not measured:
        raise SystemExit("This benchmark needs tuned models, and none is here.")
    return measured


def main() -> None:
    """Measure, write."""
    arguments = parse_arguments(__doc__ or "", "decode_texts", threads=1)
    disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    cases = CASES
    folders = {case.records: name_folder(case.records) for case in cases.values()}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.toy:
            toy = make_toy(Path(folder)).base.parent
            small = {"num_prompts": 2, "num_calibrating": TOY_HELD_OUT - 5, "max_new_tokens": 6}
            cases = {key: replace(case, **small) for key, case in cases.items()}
            folders = dict.fromkeys(folders, toy)
        elif arguments.quick:
            cases = {key: replace(case, num_prompts=4) for key, case in cases.items()}
        measured = measure_all(cases, folders)
    ratios = {key: one["ratio"] for key, one in measured.items()}
    intervals = {key: [one["low"], one["high"]] for key, one in measured.items()}
    write_results(arguments, {"ratios": ratios, "intervals": intervals, "cases": measured})


if __name__ == "__main__":
    main()
