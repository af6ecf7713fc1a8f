"""The flags of a command, added to what the library says of its arguments."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

TERM = re.compile(r"`(?P<name>[a-z_][a-z_0-9]*(?:\.[a-z_0-9]+)?)(?:=(?P<value>[\w.\[\]-]+))?`")
"""An argument in a message, or an argument with its value."""

OWNERS = {"mode": ("depthmix.adapters.config", "MoDEConfig"), "training": ("trl", "SFTConfig")}
"""Whose options a section holds, which the library also names without the section."""


def add_flags(message: str, command: Callable[..., Any] | None) -> str:
    """Say behind a message by which flags a command takes the arguments in it.

    Args:
        message: One sentence, with Python's arguments in backticks.
        command: The command that was run, or None if it is not known.

    Returns:
        The message, in which "`overwrite=True`" became a flag, and behind it the flags of what else
        it names.
    """
    if command is None:
        return message
    parameters = inspect.signature(command).parameters
    known = {name for name, one in parameters.items() if one.kind is one.KEYWORD_ONLY}
    flags: dict[str, None] = {}

    def replace(found: re.Match[str]) -> str:
        flag = _find_flag(found["name"], known)
        if flag is not None and found["value"] is not None:
            return f"`{_set_flag(flag, found['value'])}`"
        if flag is not None:
            flags[flag] = None
        return found[0]

    message = TERM.sub(replace, message)
    shown = set(re.findall(r"`(--[\w.-]+)", message))
    missing = ", ".join(f"`{flag}`" for flag in flags if flag not in shown)
    return f"{message} On the command line: {missing}." if missing else message


def _find_flag(name: str, known: set[str]) -> str | None:
    """Name the flag of an argument, if the command has one."""
    section, _, option = name.rpartition(".")
    if section in OWNERS and option not in (_list_options(section) or {option}):
        return None  # what there is no option for has no flag
    if section in known or (name in known and not _is_section(name)):
        found = name
    elif section == "model" and option in known:  # what other commands say of the model alone
        found = option
    elif not section:
        owners = (part for part in OWNERS if part in known and name in _list_options(part))
        owner = next(owners, None)
        if owner is None:
            return None
        found = f"{owner}.{name}"
    else:
        return None
    return "--" + found.replace("_", "-")


def _set_flag(flag: str, value: str) -> str:
    """Write a flag with its value: a switch by itself, anything else behind it."""
    if value == "True":
        return flag
    if value == "False":
        section, _, option = flag.removeprefix("--").rpartition(".")
        return f"--{section}.{option} false" if section else f"--no-{option}"
    return f"{flag} {value}"


def _is_section(name: str) -> bool:
    """Tell whether an argument is a section, which has no flag of its own."""
    return name in ("model", "data", "mode", "training", "evaluation", "judge", "mt_bench", "slurm")


def _list_options(section: str) -> set[str]:
    """List the options of a section, if the run came far enough to know them."""
    module, owner = OWNERS[section]
    found = sys.modules.get(module)
    # Not by `getattr` of what is not loaded yet: TRL imports its options when they are asked for.
    kind = vars(found).get(owner) if found is not None else None
    return {option.name for option in fields(kind)} if kind is not None else set()
