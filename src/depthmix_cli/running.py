"""A command that runs the commands of others, in which PEFT knows the method."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

DOOR = Path(__file__).parent / "door"
"""Folder with what Python runs at its start."""


def run(
    *command: Annotated[
        str,
        Parameter(
            allow_leading_hyphen=True,
            help="The command and its arguments, after `--`.",
        ),
    ],
) -> None:
    """Run another command so that it knows runs of depthmix, and its child processes, too.

    PEFT learns of the method as soon as it is imported there. For example:

    `depthmix run -- lm_eval --model hf --model_args pretrained=BASE,peft=runs/mode --tasks piqa`

    `depthmix run -- accelerate launch train.py`
    """
    if not command:
        raise ValueError(
            "`command` must be what is to be run, got nothing; write it after `--`, such as "
            "`depthmix run -- python script.py`."
        )
    # A command of this environment, whether or not that is activated.
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    program = shutil.which(command[0], path=os.pathsep.join(places))
    if program is None:
        raise ValueError(
            f"`command` must be a program that is there, got {command[0]!r}; install it in this "
            "environment, or give its path."
        )
    paths = [str(DOOR), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    sys.stdout.flush()
    os.execv(program, [program, *command[1:]])
