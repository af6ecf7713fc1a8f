"""Training records from named data sets: instruction, input and output."""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from depthmix.data.questions import same_letters
from depthmix.data.schemas import FORMS, LETTERS, Files, Records

Record = Mapping[str, Any]

CALCULATOR_MARK = re.compile(r"<<[^>]*>>")
"""What GSM8K's rationales hold for a calculator: `<<48/2=24>>`."""

UNKNOWN = re.compile(r"^\s*[A-Za-z]+\s*=\s*")
"""The unknown on the left of MAWPS's equations: `X=`, `x=`, `miles=`."""

OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
"""What MAWPS's equations are made of."""

RELATIVE_ERROR = Fraction(1, 10**6)
"""By how much an answer may be rounded and still equal its equation."""

NUM_AQUA = 1000
"""AQuA's records in MATH7K, as in the paper."""


def mix_math7k(files: Files) -> Records:
    """Build the closest to the paper's MATH7K that is public: GSM8K and AQuA, without MAWPS.

    All of GSM8K's training set, then 1,000 of AQuA's 2,142 training questions that differ in
    letters or digits, drawn with seed 0. The paper's mixture has ChatGPT's rationales; here they
    are the human ones.

    Args:
        files: Rows of GSM8K's training file, then of AQuA's.

    Returns:
        Records with `instruction`, `input` and `output`.
    """
    (gsm8k_path, gsm8k_rows), (aqua_path, aqua_rows) = files.items()
    gsm8k = FORMS["gsm8k"]({gsm8k_path: gsm8k_rows})
    aqua = {}
    for record in FORMS["aqua"]({aqua_path: aqua_rows}):
        aqua.setdefault(same_letters(record["question"]), record)
    drawn = random.Random(0).sample(list(aqua.values()), NUM_AQUA)
    return [from_gsm8k(record) for record in gsm8k] + [from_aqua(record) for record in drawn]


def from_gsm8k(record: Record) -> dict[str, Any]:
    """Take GSM8K's rationale without its calculator marks, and name the answer in words.

    Args:
        record: `question` and `answer`, which ends with `#### ` and the number.

    Returns:
        `instruction`, `input`, `output` and `answer`, the number.
    """
    rationale, number = record["answer"].rsplit("####", 1)
    number = number.strip().replace(",", "")
    steps = CALCULATOR_MARK.sub("", rationale).strip()
    return _instruction(record["question"], conclude(steps, number), number)


def from_aqua(record: Record) -> dict[str, Any]:
    """Put AQuA's options behind the question, and name the letter behind the rationale.

    Args:
        record: `question`, `options`, `answer` and perhaps `rationale`.

    Returns:
        `instruction`, `input`, `output` and `answer`, the letter.
    """
    options = zip(LETTERS, record["options"], strict=True)
    listed = " ".join(f"({letter}) {option}" for letter, option in options)
    instruction = f"{record['question']} Answer Choices: {listed}"
    steps = record.get("rationale", "").strip()
    return _instruction(instruction, conclude(steps, record["answer"]), record["answer"])


def from_arithmetic(record: Record) -> dict[str, Any]:
    """Answer a word problem by its number, after its equation where that gives the number.

    Some of MAWPS's equations are unsolved, such as `X-6=52`, round the number, or contradict it.

    Args:
        record: `question`, `answer` and perhaps `equation`, such as `X=((22.0-14.0)/4.0)`.

    Returns:
        `instruction`, `input`, `output` and `answer`, the number.
    """
    number = record["answer"].removesuffix(".0")
    expression = UNKNOWN.sub("", record.get("equation", ""))
    steps = f"{expression} = {number}." if _equals(expression, number) else ""
    return _instruction(record["question"], conclude(steps, number), record["answer"])


def from_choices(record: Record) -> dict[str, Any]:
    """Answer LLM-Adapters' multiple choice as its training files do.

    Args:
        record: `instruction`, `choices` and `answerKey`.

    Returns:
        `instruction`, `input`, `output` and `answer`, such as `answer3`.
    """
    answer = f"answer{record['choices']['label'].index(record['answerKey']) + 1}"
    return _instruction(record["instruction"], f"the correct answer is {answer}", answer)


def from_boolq(record: Record) -> dict[str, Any]:
    """Answer LLM-Adapters' question of yes or no as its training file does.

    Args:
        record: `instruction` and `label`.

    Returns:
        `instruction`, `input`, `output` and `answer`, `true` or `false`.
    """
    answer = "true" if record["label"] else "false"
    return _instruction(record["instruction"], f"the correct answer is {answer}", answer)


def from_hellaswag(record: Record) -> dict[str, Any]:
    """Ask for an ending in the manner of LLM-Adapters.

    Args:
        record: `ctx`, `endings`, `label` and perhaps an `activity_label`.

    Returns:
        `instruction`, `input`, `output` and `answer`, such as `ending3`.
    """
    start = f"{record['activity_label']}: {record['ctx']}".removeprefix(": ")
    listed = " ".join(
        f"Ending{number}: {ending}" for number, ending in enumerate(record["endings"], start=1)
    )
    instruction = (
        f"Please choose the correct ending to complete the given sentence: {start}\n\n{listed}\n\n"
        "Answer format: ending1/ending2/ending3/ending4"
    )
    answer = f"ending{record['label'] + 1}"
    return _instruction(instruction, f"the correct answer is {answer}", answer)


def conclude(steps: str, answer: str) -> str:
    """Name the answer in words, on a line of its own below the steps.

    Args:
        steps: What leads to the answer; may be empty.
        answer: A number or a letter.

    Returns:
        The rationale.
    """
    return f"{steps}\nThe answer is {answer}.".lstrip()


def _equals(expression: str, number: str) -> bool:
    """Tell whether a text is arithmetic that gives the number."""
    try:
        value = _evaluate(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return False
    return abs(value - Fraction(number)) <= RELATIVE_ERROR * abs(Fraction(number))


def _evaluate(node: ast.expr) -> Fraction:
    """Give the exact value of parsed arithmetic."""
    match node:
        case ast.BinOp(left, operation, right) if type(operation) in OPERATIONS:
            return OPERATIONS[type(operation)](_evaluate(left), _evaluate(right))
        case ast.UnaryOp(ast.USub(), operand):
            return -_evaluate(operand)
        case ast.Constant(int() | float() as number) if not isinstance(number, bool):
            return Fraction(repr(number))
    raise ValueError(f"{ast.unparse(node)} is not arithmetic.")


def _instruction(instruction: str, output: str, answer: str) -> dict[str, Any]:
    return {"instruction": instruction, "input": "", "output": output, "answer": answer}


INSTRUCTIONS: dict[str, Callable[[Record], dict[str, Any]]] = {
    "alpaca": dict,
    "aqua": from_aqua,
    "arc": from_choices,
    "arithmetic": from_arithmetic,
    "boolq": from_boolq,
    "gsm8k": from_gsm8k,
    "hellaswag": from_hellaswag,
    "math7k": dict,
    "math_10k": dict,
    "openbookqa": from_choices,
}
"""From a record in the schema of a form to an instruction; forms not named are not to train on."""
