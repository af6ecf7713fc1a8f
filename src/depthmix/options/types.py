"""Options given in Python: known by name, and of the type that their class says."""

from __future__ import annotations

import difflib
import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Options = TypeVar("Options", bound=type)

CHECKED = (bool, int, float, str, NoneType)
"""Types whose values are told apart; lists, tuples and dictionaries of them, too."""


def checked_options(owner: Options) -> Options:
    """Let a dataclass refuse unknown options and wrong types when it is made.

    What stands for a plain value becomes one: a number of NumPy's, a tensor of one element without
    dimensions, a path where text is asked for. Types of other libraries are left to these.

    Args:
        owner: The dataclass; all of its options are keywords.

    Returns:
        The same class. It raises a `TypeError` that names the option and what it must be.
    """
    make = owner.__init__

    @functools.wraps(make)
    def __init__(self: Any, **given: Any) -> None:
        known = {option.name for option in fields(owner) if option.init}
        unknown = [name for name in given if name not in known]
        # PEFT names its method when it reads a file, and drops what a later version has added
        # with a warning, which it knows by Python's own words.
        if unknown and "peft_type" not in given:
            raise TypeError(explain_unknown(unknown[0], unknown[0], owner, known))
        hints = list_types(owner)
        make(self, **{n: check_type(n, v, hints[n]) if n in hints else v for n, v in given.items()})

    owner.__init__ = __init__  # pyrefly: ignore[bad-assignment]
    return owner


def check_type(name: str, value: Any, hint: Any) -> Any:
    """Check a value against the type of its option.

    Args:
        name: The option, for messages.
        value: What was given.
        hint: The option's type; a `Literal` beside others asks for its choices' types alone here.

    Returns:
        The value, as a plain one where it stands for such.

    Raises:
        TypeError: If it has another type.
        ValueError: If the type is a `Literal`, and it is none of its choices.
    """
    value = _plain(value, hint)
    if get_origin(hint) is Literal:
        if not isinstance(value, str) or value not in get_args(hint):
            raise ValueError(
                f"`{name}` must be one of {', '.join(get_args(hint))}, got {value!r:.80}."
            )
        return value
    if is_checked(hint) and not _fits(value, hint):
        quoted = "; write it without quotes" if isinstance(value, str) else ""
        raise TypeError(
            f"`{name}` must be {describe_type(hint)}, got {value!r:.80}, which is "
            f"{type(value).__name__}{quoted}."
        )
    return value


def check_number(
    name: str,
    value: int | float | None,
    *,
    at_least: int | float | None = None,
    above: int | float | None = None,
    below: int | float | None = None,
    otherwise: str = "",
) -> None:
    """Check that a number is finite and within bounds.

    Args:
        name: The option, for messages.
        value: The number; `None` stands for none, and is right.
        at_least: Smallest right value.
        above: Value that it must exceed.
        below: Value that it must stay under.
        otherwise: What else to do, for the end of the sentence.

    Raises:
        ValueError: If it is not.
    """
    if value is None:
        return
    bounds = [
        *([] if at_least is None else [(f"at least {at_least:g}", value >= at_least)]),
        *([] if above is None else [(f"above {above:g}", value > above)]),
        *([] if below is None else [(f"below {below:g}", value < below)]),
    ]
    if not math.isfinite(value) or not all(holds for _, holds in bounds):
        finite = [] if math.isfinite(value) else ["finite"]
        wanted = " and ".join([*finite, *(words for words, _ in bounds)])
        end = f"; {otherwise}." if otherwise else "."
        raise ValueError(f"`{name}` must be {wanted}, got {value}{end}")


def is_checked(hint: Any) -> bool:
    """Tell whether a type is made of plain values, lists, tuples and dictionaries alone.

    Args:
        hint: The type.

    Returns:
        Whether `check_type` looks at it.
    """
    if get_origin(hint) is Literal or hint in (*CHECKED, list, tuple, dict, Any, Ellipsis):
        return True
    joined = (Union, UnionType, list, tuple, dict)
    return get_origin(hint) in joined and all(map(is_checked, get_args(hint)))


def explain_unknown(shown: str, name: str, owner: type, known: Iterable[str]) -> str:
    """Say in one sentence that a class has no such option, and which is meant.

    Args:
        shown: The option as it was given, with its section.
        name: The option alone.
        owner: The class.
        known: Its options.

    Returns:
        The sentence.
    """
    return f"`{shown}` is not an option of {owner.__name__}{suggest(name, known)}"


def suggest(name: str, names: Iterable[str]) -> str:
    """End a message about an unknown name with the nearest known one.

    Args:
        name: The unknown name.
        names: The known ones.

    Returns:
        `; did you mean …?`, or the known names where none is near and they are few, or a full stop.
    """
    names = list(names)
    if nearest := difflib.get_close_matches(name, names, n=1):
        return f"; did you mean `{nearest[0]}`?"
    return f"; choose from {', '.join(names)}." if len(names) < 10 else "."


def describe_type(hint: Any) -> str:
    """Say what an option accepts.

    Args:
        hint: Its type.

    Returns:
        Such as `int or list[int] or 'auto'`.
    """
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if hint is NoneType:
        return "none"
    if len(members(hint)) > 1:
        return " or ".join(map(describe_type, members(hint)))
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


@functools.cache
def list_types(owner: type) -> dict[str, Any]:
    """List the types of a class's options.

    Args:
        owner: The class.

    Returns:
        Types by option.
    """
    return get_type_hints(owner)


def members(hint: Any) -> tuple[Any, ...]:
    """List the types that a union joins; any other type is its only member.

    Args:
        hint: The type.

    Returns:
        The types.
    """
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _plain(value: Any, hint: Any) -> Any:
    """Give the plain value that a number of NumPy's, a small tensor or a path stands for."""
    if type(value) in (list, tuple, set):
        return type(value)(_plain(entry, hint) for entry in value)
    if isinstance(value, os.PathLike) and str in members(hint):
        return os.fspath(value)
    item: Callable[[], Any] | None = getattr(value, "item", None)
    return item() if item is not None and getattr(value, "ndim", None) == 0 else value


def _fits(value: Any, hint: Any) -> bool:
    """Tell whether a value has a type; a switch is no number, and a whole number is a float."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, member) for member in inner)
    if origin is Literal:
        return any(type(value) is type(choice) for choice in inner)
    if hint is Any:
        return True
    if origin is dict or hint is dict:
        pairs = value.items() if isinstance(value, Mapping) else [(None, None)]
        return isinstance(value, Mapping) and all(
            _fits(part, kind) for pair in pairs for part, kind in zip(pair, inner, strict=False)
        )
    if origin in (list, tuple) or hint in (list, tuple):
        if not isinstance(value, list | tuple | set):
            return False
        if origin is tuple and Ellipsis not in inner:
            return len(value) == len(inner) and all(map(_fits, value, inner))
        return not inner or all(_fits(entry, inner[0]) for entry in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
