"""Options as files and command lines give them, read by the types of the class that owns them."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from functools import reduce
from operator import or_
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError


def read_options(section: str | None, given: Mapping[str, Any], owner: type) -> dict[str, Any]:
    """Read a section's values by the types of the dataclass that owns its options.

    Args:
        section: Name of the section, for messages; `None` at the top level.
        given: Values by option name, in which hyphens equal underscores; text is read as by
            `read_value`.
        owner: The dataclass.

    Returns:
        The same options with every value in its option's type.

    Raises:
        ValueError: If an option is unknown, or a value does not fit its type.
    """
    hints = get_type_hints(owner)
    options = {option.name: option for option in fields(owner) if option.init}
    values = {}
    for name, value in underscored(given).items():
        key = f"{section}.{name}" if section else name
        if name not in options:
            raise ValueError(
                f"`{key}` is not an option of {owner.__name__}{suggest(name, options)}"
            )
        try:
            values[name] = read_value(value, hints[name], default=options[name].default)
        except ValueError as error:
            raise ValueError(f"`{key}` must be {_describe(hints[name])}, got {value!r}.") from error
    return values


def build_section(section: str, given: Mapping[str, Any], owner: type) -> Any:
    """Read a section and make its dataclass, after checking that nothing required is missing.

    Args:
        section: Name of the section.
        given: Values by option name.
        owner: The dataclass.

    Returns:
        An instance of `owner`.

    Raises:
        ValueError: As `read_options`, and if a required option is missing.
    """
    values = read_options(section, given, owner)
    for option in fields(owner):
        required = option.default is MISSING and option.default_factory is MISSING
        if required and option.name not in values:
            raise ValueError(
                f"`{section}.{option.name}` is missing; set it in the section `{section}` of the "
                f"file, or pass `--{section}.{option.name.replace('_', '-')}`."
            )
    return owner(**values)


def read_value(value: Any, hint: Any, *, default: Any = MISSING) -> Any:
    """Read a value by the type of its option.

    Text is read as the option's type where that is not text itself: `"1e-4"`, `"true"`,
    `"[10, 20, 30]"`, `"q_proj,v_proj"` and, for options that may be absent, `"none"`. Where an
    option takes no text but a list, any text is one, with commas between its entries.

    Args:
        value: What a file or a command line says.
        hint: Type of the option.
        default: The option's default. If it is the text `"none"`, that text means itself.

    Returns:
        The value in the option's type.

    Raises:
        ValueError: If the value cannot be read so.
    """
    members = _members(hint)
    if isinstance(value, bool) and not {bool, Any} & set(members):
        literals = [choice for member in members for choice in get_args(member)]
        if not any(value is choice for choice in literals):
            raise ValueError("A switch is no number.")  # pydantic would read `true` as 1
    if isinstance(value, str):
        if value.lower() in ("none", "null") and NoneType in members and default != "none":
            return None
        # Pydantic would keep the text wherever the option also accepts text.
        others = tuple(member for member in members if member not in (str, NoneType))
        for reading in _readings(value, is_text=str in members) if others else ():
            with contextlib.suppress(ValidationError):
                return _validate(reading, reduce(or_, others))
    return _validate(value, hint)


def underscored(given: Mapping[str, Any]) -> dict[str, Any]:
    """Write names as Python does: `late-layers` becomes `late_layers`.

    Args:
        given: Values by name; the values stay as they are.

    Returns:
        The same values by the new names.
    """
    return {str(name).replace("-", "_"): value for name, value in given.items()}


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


def _readings(text: str, *, is_text: bool) -> list[Any]:
    """List what a text may stand for: itself, a YAML list or mapping, a comma-separated list."""
    readings: list[Any] = [text]
    if text[:1] in ("[", "{"):
        with contextlib.suppress(yaml.YAMLError):  # a regular expression may begin so
            readings.append(yaml.safe_load(text))
    elif not is_text or re.fullmatch(r"[\w.-]+(\s*,\s*[\w.-]+)+", text):
        readings.append([part.strip() for part in text.split(",") if part.strip()])
    return readings


def _validate(value: Any, hint: Any) -> Any:
    """Read a value with pydantic; a class that it does not know only accepts its instances."""
    # In a tuple, since pydantic refuses `config` for a type that is itself a dataclass.
    adapter = TypeAdapter(tuple[hint], config={"arbitrary_types_allowed": True})
    return adapter.validate_python((value,))[0]


def _members(hint: Any) -> tuple[Any, ...]:
    """List the types that a union joins; any other type is its only member."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _describe(hint: Any) -> str:
    """Say what an option accepts."""
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if hint is NoneType:
        return "none"
    if len(_members(hint)) > 1:
        return " or ".join(map(_describe, _members(hint)))
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
