"""Options of generation as everybody writes them: `--max-new-tokens 64`, without their section."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

SWITCHES = ("do_sample", "use_cache", "early_stopping")
"""Options that are on where nothing stands behind them."""


def spell_out(argv: Sequence[str], command: Callable[..., Any] | None) -> list[str]:
    """Write options of `GenerationConfig` with their section, where a command has one for them.

    Options of the command itself stay what they are: `--top-k` is the mixture's. What is nobody's
    stays, too, for the command to refuse, unless an option of generation is near.

    Args:
        argv: Arguments of the command line, the command's name first.
        command: The command, or None if it is not known.

    Returns:
        The arguments; `--do-sample` by itself got its `true`.

    Raises:
        ValueError: If a flag is unknown to the command and to `GenerationConfig`, and one of the
            latter's options is nearest.
    """
    own = {} if command is None else inspect.signature(command).parameters
    asked = len(list(takewhile(lambda word: word != "--", argv)))
    if "generation" not in own or {"--help", "-h"} & {*argv[:asked]}:
        return list(argv)
    names = {*own, "version", *(f"no_{name}" for name in own)}
    words: list[str] = []
    for place, word in enumerate(argv):
        flag, is_set, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if place >= asked or not flag.startswith("--") or "." in name or name in names:
            words.append(word)
        elif _is_option(name, names):
            words.append(f"--generation.{name.replace('_', '-')}{is_set}{value}")
            after = argv[place + 1].lower() if place + 1 < asked else ""
            if name in SWITCHES and not is_set and after not in ("true", "false"):
                words[-1] += "=true"
        else:
            words.append(word)
    return words


def _is_option(name: str, names: set[str]) -> bool:
    """Tell whether `GenerationConfig` has an option; refuse what only looks like one."""
    from difflib import get_close_matches

    from transformers import GenerationConfig

    options = {option for option in GenerationConfig().to_dict() if not option.startswith("_")}
    if name in options:
        return True
    nearest = get_close_matches(name, sorted(names | options), n=1)
    if nearest and nearest[0] not in names:
        flags = [one.replace("_", "-") for one in (name, nearest[0])]
        raise ValueError(f"`--{flags[0]}` is no option; did you mean `--{flags[1]}`?")
    return False
