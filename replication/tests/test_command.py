"""The command that the package adds to `depthmix`."""

from __future__ import annotations

import subprocess
import sys

import depthmix_cli
from depthmix_cli.flags import add_flags
from depthmix_replication.command import reproduce


def run_fresh(*arguments, printing):
    code = f"import sys, depthmix_cli; depthmix_cli.main(sys.argv[1:]); print({printing})"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


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


def test_help_is_quick_since_nothing_heavy_is_imported():
    heavy = "{'torch', 'depthmix', 'submitit'} & {*sys.modules}"
    assert "Run experiments of the paper" in run_fresh("--help", printing=heavy)
    shown = run_fresh("reproduce", "--help", printing=heavy)
    assert all(word in shown for word in ("--scale", "--dry-run", "--slurm", "--judge"))
    assert shown.endswith("set()\n")


def test_flags_are_added():
    assert add_flags("pass `launcher=slurm`", reproduce) == "pass `--launcher slurm`"
