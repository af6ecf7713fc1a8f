"""The word problems: right, varied, reproducible, and written once."""

import json
import re

import pytest

from depthmix_replication import problems
from depthmix_replication.problems import write_problems

STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


@pytest.fixture(scope="module")
def records():
    return problems.make_problems(2000, seed=1)


def test_every_step_is_right_and_the_last_is_the_answer(records):
    for record in records:
        *steps, conclusion = record["completion"].strip().removesuffix(".").split(". ")
        assert 2 <= len(steps) <= 3
        for step in steps:
            a, sign, b, result = STEP.fullmatch(step).groups()
            expected = {
                "+": int(a) + int(b),
                "-": int(a) - int(b),
                "*": int(a) * int(b),
                "/": int(a) / int(b),
            }[sign]
            assert int(result) == expected, record
        assert steps[-1].endswith(f"= {record['answer']}")
        assert conclusion == f"The answer is {record['answer']}"


def test_first_steps_use_numbers_of_the_question(records):
    for record in records:
        a, _, b, _ = STEP.search(record["completion"]).groups()
        numbers = {*re.findall(r"\d+", record["prompt"]), "100"}
        assert {a, b} <= numbers, record


def test_format(records):
    for record in records:
        assert record["prompt"].startswith("Question: ")
        assert record["prompt"].endswith("?\nAnswer:")
        assert len(record["prompt"] + record["completion"]) < 300


def test_same_seed_same_problems_and_a_longer_list_begins_alike(records):
    assert problems.make_problems(50, seed=1) == records[:50]
    assert problems.make_problems(50, seed=2) != records[:50]


def test_splits_share_no_question():
    train, held_out = problems.make_splits(500, 100, seed=0)
    assert (len(train), len(held_out)) == (500, 100)
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}


def test_unseen_problems_ask_nothing_that_was_asked():
    train, held_out = problems.make_splits(500, 100, seed=0)
    seen = [record["prompt"] for record in train + held_out]
    for seed in (0, 1):  # of the same seed all that come first are known
        unseen = problems.make_unseen(64, seed=seed, seen=seen)
        assert len({record["prompt"] for record in unseen} - {*seen}) == 64
    assert problems.make_unseen(64, seed=1, seen=[]) == problems.make_problems(64, seed=1)


def test_variety(records):
    assert len(problems.TEMPLATES) >= 12
    assert len({record["prompt"] for record in records}) == len(records)
    assert len({record["answer"] for record in records}) > 100
    shapes = {re.sub(r"\d+", "N", STEP.sub(r"\2", r["completion"])) for r in records}
    assert len(shapes) >= 8


def test_an_experiments_problems_are_written_once_and_share_no_question(tmp_path):
    training, held_out = (write_problems(tmp_path / "made", split) for split in ("train", "test"))
    lines = {path: path.read_text("utf-8").splitlines() for path in (training, held_out)}
    assert (len(lines[training]), len(lines[held_out])) == (4800, 300)
    prompts = {path: {json.loads(line)["prompt"] for line in lines[path]} for path in lines}
    assert prompts[training].isdisjoint(prompts[held_out])
    held_out.write_text("kept", "utf-8")
    assert write_problems(tmp_path / "made", "test").read_text("utf-8") == "kept"
