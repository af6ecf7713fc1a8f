"""The command that the package adds to `depthmix`."""

from __future__ import annotations

import json

import pytest

import depthmix_cli
from depthmix_cli.flags import add_flags
from depthmix_replication.command import reproduce
from fresh import run_fresh


def test_reproduce_lists_its_runs(tmp_path, capsys):
    command = ["reproduce", "fig6", "fig7", "--scale", "toy", "--workspace", str(tmp_path)]
    assert depthmix_cli.main([*command, "--seeds", "3, 4", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "to train  toy, arc_easy, LoRA_¬K + MoDE, seed 4  (fig6, fig7)" in said
    assert "8 runs, 8 of them to do, about" in said
    assert not (tmp_path / "runs").exists()
    assert depthmix_cli.main([*command, "--seeds", "three"]) == 1
    assert "`seeds` must be" in capsys.readouterr().err
    assert depthmix_cli.main([*command, "--subjects", "arc_easy,arc_hard"]) == 1
    assert "arc_hard is none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--workspace", "file", "`workspace` must be a folder, and {}/file is a file"),
        ("--workspace", "file/inner", "`workspace` must be a folder, and {}/file is a file"),
        ("--results", "file", "`results` must be a folder, and {}/file is a file"),
        ("--data-dir", "file", "must be an existing folder, got {}/file"),
        ("--seeds", "1,-1", "`seeds` must be from 0 to 4294967295, got -1."),
        ("--seeds", "1,1", "`seeds` must differ, got 1, 1;"),
        ("--seeds", "", "`seeds` must not be empty; leave it out"),
        ("--seeds", " , ", "`seeds` must not be empty; leave it out"),
        ("--subjects", "", "`subjects` must not be empty; leave it out"),
        ("--model", "", "`model` must not be empty; leave it out"),
    ],
)
def test_a_list_of_runs_refuses_what_the_runs_would(tmp_path, capsys, flag, value, said):
    (tmp_path / "file").touch()
    given = str(tmp_path / value) if value.startswith("file") else value
    command = ["reproduce", "fig6", "--scale", "toy", "--dry-run", f"{flag}={given}"]
    assert depthmix_cli.main(command) == 1
    told = capsys.readouterr()
    assert not told.out
    assert told.err.startswith("depthmix: ")
    assert told.err.count("\n") == 1
    assert said.format(tmp_path) in told.err


def test_help_is_quick_since_nothing_heavy_is_imported():
    printing = "print({'torch', 'depthmix', 'submitit'} & {*sys.modules})"
    code = f"import sys, depthmix_cli; depthmix_cli.main(); {printing}"
    assert "Run experiments of the paper" in run_fresh(code, "--help").stdout
    shown = run_fresh(code, "reproduce", "--help").stdout
    assert all(word in shown for word in ("--scale", "--dry-run", "--slurm", "--judge"))
    assert shown.endswith("set()\n")


def test_a_list_of_runs_imports_nothing_heavy(tmp_path):
    size = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 99, "num_hidden_layers": 30}
    (tmp_path / "config.json").write_text(json.dumps(size))
    heavy = ("torch", "transformers", "peft", "trl", "datasets", "scipy", "matplotlib", "submitit")
    code = f"import sys, depthmix_cli; depthmix_cli.main(); print({{*{heavy}}} & {{*sys.modules}})"
    for name, lines in (("table2", 49), ("fig1", 6)):
        arguments = ("reproduce", name, "--scale", "small", "--model", tmp_path, "--dry-run")
        *listed, total, imported = run_fresh(code, *arguments, folder=tmp_path).stdout.splitlines()
        assert total.startswith(f"{len(listed)} runs, {len(listed)} of them to do, about")
        assert len(listed) == lines
        assert imported == "set()"
    assert {path.name for path in tmp_path.iterdir()} == {"config.json"}


def test_flags_are_added():
    assert add_flags("pass `launcher=slurm`", reproduce) == "pass `--launcher slurm`"
