"""From files as they are published to records in each data set's schema."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

Row = Any
"""One row as its file holds it: an object, or a list of texts."""

Files = Mapping[str, list[Row]]
"""The rows of a split's files, by path."""

Records = list[dict[str, Any]]

LETTERS = "ABCDE"

CHOICE_PROMPT = re.compile(
    r"Please choose the correct answer to the question: (?P<question>.*)"
    r"\n\n(?P<choices>Answer1: .*)\n\nAnswer format: \S+",
    re.DOTALL,
)
"""LLM-Adapters' prompt for multiple choice."""

TRUE_FALSE_PROMPT = re.compile(
    r"Please answer the following question with true or false, question: (?P<question>.*)"
    r"\n\nAnswer format: true/false",
    re.DOTALL,
)
"""LLM-Adapters' prompt for BoolQ."""

AQUA_PROMPT = re.compile(
    r"(?P<question>.*?)(?: Answer Choices:|\nOptions:)\s\(A\) (?P<A>.*?)\s\(B\) (?P<B>.*?)"
    r"\s\(C\) (?P<C>.*?)\s\(D\) (?P<D>.*?)\s\(E\) (?P<E>.*)",
    re.DOTALL,
)
"""AQuA's question with its options, in LLM-Adapters' and in FLAN's layout."""


def read_rows(path: Path) -> list[Row]:
    """Read a published file by its suffix.

    Args:
        path: JSON, JSONL, CSV (with a header) or TSV (without).

    Returns:
        One object per row; a list of texts for TSV.

    Raises:
        ValueError: If the file cannot be parsed.
    """
    text = path.read_text(encoding="utf-8-sig")  # TruthfulQA begins with a byte-order mark
    lines = text.split("\n")
    if path.suffix == ".json":
        return json.loads(text)
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in lines if line.strip()]
    if path.suffix == ".csv":
        return list(csv.DictReader(text.splitlines(keepends=True)))
    assert path.suffix == ".tsv", path
    return [line.split("\t") for line in lines if line]


def _arithmetic(row: Row) -> dict[str, Any]:
    if "original_text" in row:  # MAWPS, train
        question, answer = row["original_text"], str(row["ans"])
        return {"question": question, "answer": answer, "equation": row["equation"]}
    return _with_instruction(row, question=row["instruction"], answer=row["answer"])


def _gsm8k(row: Row) -> dict[str, Any]:
    if "instruction" not in row:
        return dict(row)
    number = row["answer"].removesuffix(".0")
    return _with_instruction(row, question=row["instruction"], answer=f"#### {number}")


def _aqua(row: Row) -> dict[str, Any]:
    if isinstance(row, list):  # FLAN's copy writes a line end as two characters
        text, answer, rationale = (field.replace("\\n", "\n") for field in row)
        return {**_split_options(text), "answer": answer.strip("()"), "rationale": rationale}
    if "options" in row:
        return {
            "question": row["question"],
            "options": [option.split(")", 1)[1] for option in row["options"]],
            "answer": row["correct"],
            "rationale": row["rationale"],
        }
    return _with_instruction(row, **_split_options(row["instruction"]), answer=row["answer"])


def _split_options(text: str) -> dict[str, Any]:
    """Part AQuA's question from its five options."""
    found = _match(AQUA_PROMPT, text)
    return {"question": found["question"], "options": [found[letter] for letter in LETTERS]}


def _arc(row: Row) -> dict[str, Any]:
    found = _match(CHOICE_PROMPT, row["instruction"])
    texts = re.split(r"\s*Answer\d: ", found["choices"])[1:]
    labels = list(LETTERS[: len(texts)])
    key = LETTERS[int(row["answer"].removeprefix("answer")) - 1]
    choices = {"text": texts, "label": labels}
    return _with_instruction(row, question=found["question"], choices=choices, answerKey=key)


def _openbookqa(row: Row) -> dict[str, Any]:
    record = _arc(row)
    return {"question_stem": record.pop("question"), **record}


def _boolq(row: Row) -> dict[str, Any]:
    # lm-eval's prompt puts the question mark back.
    question = _match(TRUE_FALSE_PROMPT, row["instruction"])["question"].removesuffix("?")
    label = int(row["answer"] == "true")
    return _with_instruction(row, question=question, passage="", label=label)


def _hellaswag(row: Row) -> dict[str, Any]:
    if "endings" in row:  # labels are text on the hub
        return {**row, "label": int(row["label"])}
    return {
        "ind": row["id"],
        "activity_label": "",
        "ctx_a": row["question"],
        "ctx_b": "",
        "ctx": row["question"],
        "endings": list(row["choices"].values()),
        "label": list(row["choices"]).index(row["answer"]),
    }


def _truthfulqa(files: Files) -> Records:
    rows, targets = files.values()
    by_question = {target["question"].strip(): target for target in targets}
    records = []
    for row in rows:
        question = row["Question"].strip()
        record = {
            "type": row["Type"],
            "category": row["Category"],
            "question": question,
            "best_answer": row["Best Answer"].strip(),
            "correct_answers": _split_answers(row["Correct Answers"]),
            "incorrect_answers": _split_answers(row["Incorrect Answers"]),
            "source": row["Source"],
        }
        for name in ("mc1_targets", "mc2_targets"):
            choices = by_question[question][name]
            record[name] = {"choices": list(choices), "labels": list(choices.values())}
        records.append(record)
    return records


def _split_answers(text: str) -> list[str]:
    """List the answers that TruthfulQA separates by semicolons."""
    return [answer.strip() for answer in text.split(";") if answer.strip()]


def _mmlu(files: Files) -> Records:
    records = []
    for path, rows in files.items():
        subject = PurePosixPath(path).stem.rsplit("_", 1)[0]
        for row in rows:
            if "choices" in row:  # on the hub
                records.append(dict(row))
                continue
            choices = [row[f"choice{index}"] for index in range(4)]
            record = {"question": row["question"], "subject": subject, "choices": choices}
            records.append({**record, "answer": int(row["answer"])})
    return records


def _mt_bench(files: Files) -> Records:
    if len(files) == 1:  # the split of the judge's prompts
        return _each(dict)(files)
    questions, answers = files.values()
    references = {answer["question_id"]: answer["choices"][0]["turns"] for answer in answers}
    return [{**row, "reference": references.get(row["question_id"])} for row in questions]


def _math_10k(row: Row) -> dict[str, Any]:
    # `output` is a wrong answer that some model gave; `output_correct` is the rationale.
    return {
        "instruction": row["instruction"].strip(),
        "input": "",
        "output": row["output_correct"],
        "answer": str(row["answer_correct"]),
    }


def _with_instruction(row: Row, **fields: Any) -> dict[str, Any]:
    """Keep the text of LLM-Adapters' file, which its own protocol prompts with."""
    return {**fields, "instruction": row["instruction"]}


def _match(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    found = pattern.fullmatch(text)
    if found is None:
        raise ValueError(f"A record must have the published layout, got {text!r:.80}.")
    return found


def _each(parse: Callable[[Row], dict[str, Any]]) -> Callable[[Files], Records]:
    """Apply a parser of one row to all rows of all files."""
    return lambda files: [parse(row) for rows in files.values() for row in rows]


FORMS: dict[str, Callable[[Files], Records]] = {
    "alpaca": _each(dict),
    "aqua": _each(_aqua),
    "arc": _each(_arc),
    "arithmetic": _each(_arithmetic),
    "boolq": _each(_boolq),
    "gsm8k": _each(_gsm8k),
    "hellaswag": _each(_hellaswag),
    "math_10k": _each(_math_10k),
    "mmlu": _mmlu,
    "mt_bench": _mt_bench,
    "openbookqa": _each(_openbookqa),
    "truthfulqa": _truthfulqa,
}
"""Parser of each form that the catalogue names: rows by file in, records out."""
