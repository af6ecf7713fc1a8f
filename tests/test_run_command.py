"""`depthmix run`: other people's commands know the method, child processes, too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from depthmix.training.card import PLACE, explain_loading
from depthmix_cli.running import DOOR, run

USE = """
import importlib.util, subprocess, sys
assert "depthmix" not in sys.modules
assert importlib.util.find_spec("peft") is not None  # as libraries ask before
assert "peft" not in sys.modules
import peft
print(peft.known, type(peft.__spec__.loader).__name__, peft.__loader__ is peft.__spec__.loader)
"""


@pytest.fixture
def folder(tmp_path):
    """A `peft` and a `depthmix` that take no time."""
    for name, text in {
        "peft/__init__.py": "known = False\n",
        "depthmix/__init__.py": "",
        "depthmix/adapters.py": "import peft\npeft.known = True\n",
        "use.py": USE,
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def start(folder, script):
    """Run a script as `depthmix run` does, without the installed depthmix in reach.

    `-S` keeps the environment's packages away; what Python would run at its start is imported.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(DOOR), str(folder)])}
    code = f"import sitecustomize, runpy; runpy.run_path({str(script)!r})"
    command = [sys.executable, "-S", "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_depthmix_follows_peft_and_leaves_it_as_it_was(folder):
    done = start(folder, folder / "use.py")
    assert done.stdout == "True SourceFileLoader True\n", done.stderr


def test_nothing_is_imported_without_peft(folder):
    (folder / "none.py").write_text("import sys; print('peft' in sys.modules, len(sys.argv))")
    assert start(folder, folder / "none.py").stdout.startswith("False")


def test_the_environments_own_start_is_run(folder):
    (folder / "sitecustomize.py").write_text("print('mine')\n")
    (folder / "none.py").write_text("")
    assert start(folder, folder / "none.py").stdout == "mine\n"


def test_an_environment_without_depthmix_is_told(folder):
    (folder / "depthmix" / "adapters.py").unlink()
    done = start(folder, folder / "use.py")
    assert done.returncode == 1
    assert "in whose environment depthmix is not installed" in done.stderr


def test_what_depthmix_itself_lacks_is_its_own_error(folder):
    (folder / "depthmix" / "adapters.py").write_text("import torch_is_not_here\n")
    done = start(folder, folder / "use.py")
    assert "No module named 'torch_is_not_here'" in done.stderr.splitlines()[-1]


def test_the_command_takes_this_process(monkeypatch):
    ran = []
    monkeypatch.setattr(os, "execv", lambda *given: ran.append(given))
    monkeypatch.setenv("PYTHONPATH", "theirs")
    run("python", "-c", "pass", "--model", "hf")
    ((program, command),) = ran
    assert program == command[0]
    assert Path(program).parent == Path(sys.executable).parent
    assert command[1:] == ["-c", "pass", "--model", "hf"]
    assert os.environ["PYTHONPATH"] == f"{DOOR}{os.pathsep}theirs"


@pytest.mark.parametrize(
    ("command", "match"),
    [((), "`command` must be what is to be run"), (("no-such-program",), "got 'no-such-program'")],
)
def test_what_cannot_be_run_is_refused(command, match):
    with pytest.raises(ValueError, match=match):
        run(*command)


@pytest.mark.slow
def test_a_process_and_its_children_open_a_run(tmp_path, adapter):
    script = tmp_path / "open.py"
    script.write_text(
        "import subprocess, sys\n"
        "if len(sys.argv) > 2:\n"
        "    sys.exit(subprocess.run([sys.executable, *sys.argv[:2]]).returncode)\n"
        "from peft import AutoPeftModelForCausalLM\n"
        "print(type(AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).base_model).__name__)\n"
    )
    command = [sys.executable, "-m", "depthmix", "run", "--", "python", script, adapter[0], "child"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("MoDEModel\n")


def test_the_card_says_how_a_run_is_loaded(tmp_path):
    explain_loading(tmp_path)
    assert list(tmp_path.iterdir()) == []
    path = tmp_path / "README.md"
    path.write_text(f"# Model\n\n{PLACE}\n\n## Training\n")
    explain_loading(tmp_path)
    text = path.read_text()
    assert "`KeyError: 'MODE_LORA'`" in text
    assert "[More Information Needed]" not in text
    assert text.endswith("## Training\n")
    explain_loading(tmp_path)
    assert path.read_text() == text
    path.write_text("# Mine\n")
    explain_loading(tmp_path)
    assert path.read_text().startswith("# Mine\n\n## Loading\n\nThe adapter holds a mixture")
