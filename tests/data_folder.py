"""Data sets for tests: a folder of invented records in every published layout, and the real one."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from depthmix.data import catalog, instructions
from depthmix.data.schemas import read_rows


def _find_real_folder() -> Path | None:
    named = os.environ.get("DEPTHMIX_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    return folder if folder.is_dir() else None


REAL = _find_real_folder()

needs_data = pytest.mark.skipif(
    REAL is None, reason="needs the folder of data sets; name it by DEPTHMIX_DATA"
)


def _choice(question, texts, answer):
    listed = " ".join(f"Answer{n}: {text}" for n, text in enumerate(texts, start=1))
    names = "/".join(f"answer{n}" for n in range(1, len(texts) + 1))
    instruction = (
        f"Please choose the correct answer to the question: {question}\n\n{listed}\n\n"
        f"Answer format: {names}"
    )
    return _adapters(instruction, answer, f"the correct answer is {answer}")


def _true_false(question, answer):
    instruction = (
        f"Please answer the following question with true or false, question: {question}\n\n"
        "Answer format: true/false"
    )
    return _adapters(instruction, answer, f"the correct answer is {answer}")


def _adapters(instruction, answer, output="some model's answer"):
    return {"instruction": instruction, "input": "", "output": output, "answer": answer}


def _lines(records):
    return "\n".join(map(json.dumps, records)) + "\n"


WORD_PROBLEM = "Ann has 3 tickets . Bob has 4 . How many tickets are there ?"
OPTIONS = " Answer Choices: (A) 1 (B) 2 km (C) 3 (D) 4 (E) 5"
TSV_REST = (
    r"\nWell?\nOptions:\n(A) 1\n(B) 2 km\n(C) 3\n(D) 4\n(E) 5" + "\t(C)\t" + r"Add.\nDone." + "\n"
)
SWAG_CHOICES = {"A": "they land.", "B": "they eat.", "C": "they sing.", "D": "they rust."}
FISH = _choice("What do fish breathe with?", ["gills", "lungs", "skin"], "answer1")
SKY = _choice("Which is\nblue?", ["sky", "grass", "coal", "milk", "snow"], "answer1")

CONTENTS = {
    "addsub/test.json": json.dumps([_adapters(WORD_PROBLEM, "7")]),
    "aqua/test.json": json.dumps([_adapters("How far is it?" + OPTIONS, "B")]),
    "aqua/train.tsv": "".join(f"{n} + 1?{TSV_REST}" for n in (1, 2, 3, 3)),
    "aqua/validation.jsonl": _lines(
        [
            {
                "question": "How near?",
                "options": ["A)1", "B)2", "C)3 (a)", "D)4", "E)5"],
                "rationale": "Look.",
                "correct": "E",
            }
        ]
    ),
    "gsm8k/test.json": json.dumps([_adapters("Ann has 1,000 eggs. Half break?", "500.0")]),
    "gsm8k/train.jsonl": _lines(
        [
            {
                "question": "Ann sold 48/2 clips. And then?",
                "answer": "48/2 = <<48/2=24>>24 clips.\nIt is 1,024.\n#### 1,024",
            }
        ]
    ),
    "mawps/train.json": json.dumps(
        [
            {"original_text": WORD_PROBLEM, "equation": "X=(3.0+4.0)", "ans": 7.0, "id": 1},
            {"original_text": "How old ?", "equation": "X=2.5", "ans": 2.5, "id": 2},
        ]
    ),
    "mawps/test.json": json.dumps([_adapters("How much is 2.5 ?", "2.5")]),
    "multiarith/test.json": json.dumps(
        [_adapters(" Ann has 3 tickets. Bob has 4. How many tickets are there? ", "7.0")]
    ),
    "singleeq/test.json": json.dumps([_adapters("One?", "1.0")]),
    "svamp/test.json": json.dumps([_adapters("Two?", "2.0")]),
    "math_10k_partial/train.json": json.dumps(
        [
            {
                "instruction": "Two?\n ",
                "output": "It is 9.",
                "answer_given": 9.0,
                "output_correct": "It is 2.",
                "answer_correct": 2.0,
            }
        ]
    ),
    "arc-easy/train.json": json.dumps([FISH]),
    "arc-easy/test.json": json.dumps([FISH, SKY]),
    "arc-challenge/train.json": json.dumps([SKY]),
    "arc-challenge/test.json": json.dumps([FISH]),
    "boolq/train.json": json.dumps([_true_false("is it?", "false")]),
    "boolq/test.json": json.dumps([_true_false("is water wet?", "true")]),
    "openbookqa/train.json": json.dumps([FISH]),
    "openbookqa/test.json": json.dumps([SKY]),
    "hellaswag/train.json": json.dumps(
        [{"question": "Birds", "choices": SWAG_CHOICES, "answer": "C", "id": 5}]
    ),
    "hellaswag/test.json": json.dumps(
        [{"question": "Cats", "choices": SWAG_CHOICES, "answer": "B", "id": 6}]
    ),
    "hellaswag/validation.jsonl": _lines(
        [
            {
                "ind": 4,
                "activity_label": "Flying",
                "ctx_a": "Birds rise.",
                "ctx_b": "then",
                "ctx": "Birds rise. then",
                "label": 0,
                "endings": list(SWAG_CHOICES.values()),
            }
        ]
    ),
    "truthfulqa/test.csv": (
        "\ufeffType,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
        'Adversarial,Myths,"Is it, or not? ",No,No; It is not,"Yes; Sure, it is;",nowhere\n'
    ),
    "truthfulqa/mc_task.json": json.dumps(
        [
            {
                "question": "Is it, or not?",
                "mc1_targets": {"No": 1, "Yes": 0},
                "mc2_targets": {"No": 1, "It is not": 1, "Yes": 0},
            }
        ]
    ),
    "mt_bench/question.jsonl": _lines(
        [
            {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
            {"question_id": 111, "category": "math", "turns": ["2 + 2?", "And 1?"]},
        ]
    ),
    "mt_bench/reference_answer_gpt-4.jsonl": _lines(
        [{"question_id": 111, "choices": [{"index": 0, "turns": ["4", "5"]}]}]
    ),
    "mt_bench/judge_prompts.jsonl": _lines(
        [
            {"name": f"{kind}{turns}", "system_prompt": "Judge.", "prompt_template": "Rate."}
            for kind in ("single-v1", "single-math-v1")
            for turns in ("", "-multi-turn")
        ]
    ),
    "alpaca/train.json": json.dumps(
        [{"instruction": "Write.", "input": "", "output": "No."}, {**FISH, "input": "x"}]
    ),
    "alpaca/validation.json": json.dumps([{"instruction": "B", "input": "", "output": "b"}]),
    "alpaca/train_demo.json": json.dumps([{"instruction": "C", "input": "", "output": "c"}]),
}
"""Content of each published file, by path. MAWPS shares a question with two tests, which write it
differently."""


def _content(path):
    if path in CONTENTS:
        return CONTENTS[path]
    assert path.startswith("mmlu/")
    return f'question,choice0,choice1,choice2,choice3,answer\n"{path}, so?",a,"b, c",d,e,1\n'


@pytest.fixture
def small_data(tmp_path, monkeypatch):
    """Write the folder, and let the catalogue expect what it holds."""
    folder = tmp_path / "data"
    monkeypatch.delenv("DEPTHMIX_DATA", raising=False)
    monkeypatch.setenv("DEPTHMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(instructions, "NUM_AQUA", 2)
    for name, data_set in catalog.CATALOG.items():
        splits = {}
        for split, part in data_set.splits.items():
            files = tuple(_write(folder, file) for file in part.files)
            records = sum(file.records for file in files)
            if data_set.form in ("truthfulqa", "mt_bench"):
                records = files[0].records
            elif data_set.form == "math7k":
                records = files[0].records + 2
            splits[split] = replace(part, files=files, records=records)
        monkeypatch.setitem(catalog.CATALOG, name, replace(data_set, splits=splits))
    return folder


def _write(folder, file):
    path = folder / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_content(file.path), "utf-8")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return replace(file, records=len(read_rows(path)), sha256=digest)
