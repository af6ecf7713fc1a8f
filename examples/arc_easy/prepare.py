"""Write ARC-Easy for tuning: the answer's own text, or the letter-like form of LLM-Adapters.

`python examples/arc_easy/prepare.py --output runs/data/arc_easy` reads the data set by its name
(docs/data.md) and writes `FORM/train.jsonl` (prompt, completion) and `FORM/test.jsonl` (prompt,
choices, answer) for both forms, `text` and `paper`.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from depthmix.data.audit import audit
from depthmix.data.catalog import load_split
from depthmix.data.templates import ALPACA_PROMPT

TEST_SETS = ("arc_easy", "arc_challenge")
"""Test sets of which a training record may be a copy."""

NUM_TEST_ITEMS = 800
SEED = 0


def to_item(record: dict, form: str) -> dict:
    """Turn a record into prompt, choices and the index of the right one."""
    choices, answer = (
        record["choices"]["text"],
        record["choices"]["label"].index(record["answerKey"]),
    )
    if form == "text":
        prompt = f"Question: {record['question']}\nAnswer:"
        return {"prompt": prompt, "choices": [f" {choice}" for choice in choices], "answer": answer}
    return {
        "prompt": ALPACA_PROMPT.format(instruction=record["instruction"]),
        "choices": [f"the correct answer is answer{i}" for i in range(1, len(choices) + 1)],
        "answer": answer,
    }


def write(path: Path, rows: list[dict]) -> None:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def main() -> None:
    """Write both forms, without the training records whose question is a test question."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="local folder instead of public sources")
    parser.add_argument("--output", type=Path, default=Path("runs/data/arc_easy"))
    arguments = parser.parse_args()
    train, test = (
        load_split("arc_easy", split, data_dir=arguments.data_dir) for split in ("train", "test")
    )
    dropped = set(audit("arc_easy", TEST_SETS, data_dir=arguments.data_dir).leaking)
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
