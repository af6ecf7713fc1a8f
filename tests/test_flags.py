"""Messages of the library name Python's arguments; the command line adds its flags."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import trl

import depthmix
import depthmix_cli
from depthmix_cli.app import PLACES, load_command
from depthmix_cli.flags import add_flags
from depthmix_cli.measuring import compare, evaluate
from depthmix_cli.tuning import info, train
from fresh import run_fresh


@pytest.mark.parametrize(
    ("command", "message", "shown"),
    [
        (evaluate, "`top_k` must be 1.", "`top_k` must be 1. On the command line: `--top-k`."),
        (evaluate, "`top_k`, `top_k`.", "`top_k`, `top_k`. On the command line: `--top-k`."),
        (evaluate, "pass `overwrite=True`, or another `output`.",
         "pass `--overwrite`, or another `output`. On the command line: `--output`."),
        (evaluate, "`judge.base_url`", "`judge.base_url` On the command line: `--judge.base-url`."),
        (evaluate, "`model.top_k` and `seed`.",
         "`model.top_k` and `seed`. On the command line: `--top-k`, `--seed`."),
        (evaluate, "`model.name` must, and `models`", "`model.name` must, and `models`"),
        (evaluate, "`judge` is for", "`judge` is for"),
        (evaluate, "`other` and `RUN` and `a b`", "`other` and `RUN` and `a b`"),
        (train, "`training.output_dir`.",
         "`training.output_dir`. On the command line: `--training.output-dir`."),
        (train, "`late_layers`.", "`late_layers`. On the command line: `--mode.late-layers`."),
        (train, "use `adapt=all`.", "use `--mode.adapt all`."),
        (train, "`learning_rate`.",
         "`learning_rate`. On the command line: `--training.learning-rate`."),
        (train, "`train_late_norms=False`", "`--mode.train-late-norms false`"),
        (info, "`late_layers`.", "`late_layers`. On the command line: `--mode.late-layers`."),
        (compare, "`late_layers` must", "`late_layers` must"),
        (evaluate, "pass `protocol=llm-adapters`", "pass `--protocol llm-adapters`"),
        (evaluate, "`overwrite=False`", "`--no-overwrite`"),
        (None, "`top_k` must", "`top_k` must"),
    ],
)  # fmt: skip
def test_flags_are_added(command, message, shown):
    assert trl.SFTConfig  # known by then, since TRL imports its names when they are asked for
    assert add_flags(message, command) == shown
    assert add_flags(shown, command) == shown


def test_the_library_names_no_flag():
    """Of what is raised, that is: commands to copy are commands."""
    folder = Path(depthmix.__file__).parent
    for path in folder.rglob("*.py"):
        text = path.read_text("utf-8")
        for found in re.finditer(r"raise \w+\((?:[^()]|\([^()]*\))*\)", text):
            flags = re.findall(r"[ `](--[a-z][\w.-]*)", found[0])
            assert set(flags) <= {"--no-deps"}, (path, found[0])


def test_an_error_of_the_system_names_the_flag_of_its_path(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    record = '{"prompt": "1 =", "completion": " 1"}'
    for name in ("t.jsonl", "i.jsonl"):
        (tmp_path / name).write_text(record)
    assert depthmix_cli.main(["audit", "t.jsonl", "i.jsonl", "--drop", "file/x.jsonl"]) == 1
    assert "`--drop` cannot be used: file/x.jsonl (Not a directory); choose another place." in (
        capsys.readouterr().err
    )


def test_every_command_is_known_by_its_name():
    commands = {name: load_command(name) for name in PLACES}
    assert [one.__name__.replace("_", "-") for one in commands.values()] == list(commands)
    assert all(list(inspect.signature(one).parameters) for one in commands.values())


def test_a_command_imports_no_other_command():
    code = """
import sys, depthmix_cli
depthmix_cli.main(["audit", "gone.jsonl", "gone.jsonl"])
found = [name for name in sys.modules if name.startswith("depthmix_cli.")]
print({"depthmix_cli.tuning", "depthmix_cli.answering", "depthmix_cli.looking"} & {*found})
"""
    assert run_fresh(code).stdout.endswith("set()\n")


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["generate", "m", "Hi", "--lazy", "--fast"],
         "On the command line: `--lazy`, `--fast`."),
        (["evaluate", "m"], "On the command line: `--tasks`, `--records`."),
        (["train", "--mode.target-module", "x"],
         "`mode.target_module` is not an option of MoDEConfig; did you mean `target_modules`? On "
         "the command line: `--mode.target-modules`."),
        (["info", "m", "--mode.r", "0"], "`--mode.target-modules []` trains"),
    ],
)  # fmt: skip
def test_commands_add_theirs(arguments, shown, capsys, monkeypatch):
    monkeypatch.setattr("depthmix.training.inspection.load_model", lambda *_, **__: None)
    if arguments[0] == "train":
        arguments += ["--model.name", "m", "--data.train", "t"]
    assert depthmix_cli.main(arguments) == 1
    assert shown in capsys.readouterr().err
