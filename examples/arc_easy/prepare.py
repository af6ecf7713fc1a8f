"""Write ARC-Easy for tuning: the answer's own text, or the letter-like form of LLM-Adapters.

`python examples/arc_easy/prepare.py DATA_DIR --output runs/data/arc_easy` reads LLM-Adapters'
`arc-easy/train.json` and `test.json` and writes `FORM/train.jsonl` (prompt, completion) and
`FORM/test.jsonl` (prompt, choices, answer) for both forms.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

from datasets import load_dataset

PROBLEM = re.compile(
    r"Please choose the correct answer to the question: (?P<question>.*)\n\n"
    r"(?P<choices>Answer1: .*)\n\nAnswer format: .*",
    re.DOTALL,
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{}\n\n### Response:\n"
)
NUM_TEST_ITEMS = 800
SEED = 0


def to_item(record: dict, form: str) -> dict:
    """Split a record into prompt, choices and the index of the right one."""
    problem = PROBLEM.fullmatch(record["instruction"])
    assert problem is not None, record["instruction"]
    choices = re.split(r"\s*Answer\d: ", problem["choices"])[1:]
    answer = int(record["answer"].removeprefix("answer")) - 1
    if form == "text":
        prompt = f"Question: {problem['question']}\nAnswer:"
        return {"prompt": prompt, "choices": [f" {choice}" for choice in choices], "answer": answer}
    named = [f"the correct answer is answer{i}" for i in range(1, len(choices) + 1)]
    return {
        "prompt": ALPACA.format(record["instruction"]),
        "choices": named,
        "answer": answer,
    }


def write(path: Path, rows: list[dict]) -> None:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def main() -> None:
    """Write both forms, without the training records whose question is a test question."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_dir", type=Path, help="folder that holds arc-easy/ and leakage.json")
    parser.add_argument("--output", type=Path, default=Path("runs/data/arc_easy"))
    arguments = parser.parse_args()
    folder = arguments.data_dir / "arc-easy"
    train, test = (
        list(load_dataset("json", data_files=str(folder / name), split="train"))
        for name in ("train.json", "test.json")
    )
    leaking = json.loads((arguments.data_dir / "leakage.json").read_text("utf-8"))
    dropped = set(leaking["arc-easy/train.json"])
    train = [record for number, record in enumerate(train) if number not in dropped]
    test = random.Random(SEED).sample(test, NUM_TEST_ITEMS)
    for form in ("text", "paper"):
        items = [to_item(record, form) for record in train]
        rows = [
            {"prompt": item["prompt"], "completion": item["choices"][item["answer"]]}
            for item in items
        ]
        write(arguments.output / form / "train.jsonl", rows)
        write(arguments.output / form / "test.jsonl", [to_item(record, form) for record in test])
    print(f"{len(train)} training records ({len(dropped)} leaking ones dropped), {len(test)} items")


if __name__ == "__main__":
    main()
