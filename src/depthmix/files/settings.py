"""Settings as files and command lines give them, read by the types of the class they are for."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import reduce
from importlib import import_module
from operator import or_
from types import NoneType
from typing import Any, get_args

from depthmix.libraries.extras import require
from depthmix.options.declared import list_declared
from depthmix.options.types import describe_type, explain_unknown, list_types, members

PART_OPTIONS = ("target_modules", "exclude_modules", "optim_target_modules")
"""Options that name parts of a model, in which a list holds the ends of names, and one text is a
regular expression for whole names."""


def read_options(section: str | None, given: Mapping[str, Any], owner: type) -> dict[str, Any]:
    """Read a section's values by the types of the dataclass that owns its options.

    Args:
        section: Name of the section, for messages; `None` at the top level.
        given: Values by option name, in which hyphens equal underscores; text is read as by
            `read_value`. One plain name for a part of the model is a list of it.
        owner: The dataclass.

    Returns:
        The same options with every value in its option's type.

    Raises:
        ValueError: If an option is unknown, or a value does not fit its type.
    """
    hints = list_types(owner)
    options = {option.name: option for option in fields(owner) if option.init}
    values = {}
    for name, value in underscored(given).items():
        key = f"{section}.{name}" if section else name
        if name not in options:
            raise ValueError(explain_unknown(key, name, owner, options))
        try:
            values[name] = _read_option(name, value, hints[name], options[name].default)
        except ValueError as error:
            kind = describe_type(hints[name])
            raise ValueError(f"`{key}` must be {kind}, got {value!r}.") from error
    return values


def read_declared(
    section: str | None, given: Mapping[str, Any], module: str, name: str
) -> dict[str, Any]:
    """Read a section's values as `read_options` does, without importing the class if possible.

    Args:
        section: Name of the section, for messages.
        given: Values by option name.
        module: Where the class is defined that owns the options. It is imported where an option's
            type is not to be seen in its source, or a value is wrong.
        name: Name of the class.

    Returns:
        As `read_options`.

    Raises:
        ValueError: As `read_options`.
    """
    declared, values = list_declared(module, name), underscored(given)
    kinds = [declared[option].kind if option in declared else MISSING for option in values]
    if MISSING not in kinds:
        with contextlib.suppress(ValueError):
            return {
                option: _read_option(option, value, kind, declared[option].default)
                for (option, value), kind in zip(values.items(), kinds, strict=True)
            }
    return read_options(section, given, getattr(import_module(module), name))


def _read_option(name: str, value: Any, hint: Any, default: Any) -> Any:
    """Read an option's value by its type."""
    read = read_value(value, hint, default=default)
    return _list_name(read) if name in PART_OPTIONS else read


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
                "file, or pass it."
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
    kinds = members(hint)
    if isinstance(value, bool) and not {bool, Any} & set(kinds):
        literals = [choice for kind in kinds for choice in get_args(kind)]
        if not any(value is choice for choice in literals):
            raise ValueError("A switch is no number.")  # pydantic would read `true` as 1
    if isinstance(value, str):
        if value.lower() in ("none", "null") and NoneType in kinds and default != "none":
            return None
        # Pydantic would keep the text wherever the option also accepts text.
        others = tuple(kind for kind in kinds if kind not in (str, NoneType))
        for reading in _readings(value, is_text=str in kinds) if others else ():
            with contextlib.suppress(ValueError):  # as pydantic's errors are
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


def _list_name(value: Any) -> Any:
    """Make a list of a plain name: as a regular expression it would match no whole name.

    `all-linear` is a word of PEFT's, and stays.
    """
    is_name = isinstance(value, str) and re.fullmatch(r"\w+(\.\w+)*", value)
    return [value] if is_name else value


def _readings(text: str, *, is_text: bool) -> list[Any]:
    """List what a text may stand for: itself, a YAML list or mapping, a comma-separated list."""
    require("lab", "An option that is given as text", "yaml")
    import yaml

    readings: list[Any] = [text]
    if text[:1] in ("[", "{"):
        with contextlib.suppress(yaml.YAMLError):  # a regular expression may begin so
            readings.append(yaml.safe_load(text))
    elif not is_text or re.fullmatch(r"[\w.-]+(\s*,\s*[\w.-]+)+", text):
        readings.append([part.strip() for part in text.split(",") if part.strip()])
    return readings


def _validate(value: Any, hint: Any) -> Any:
    """Read a value with pydantic; a class that it does not know only accepts its instances."""
    require("lab", "An option that is read from a file or a command line", "pydantic")
    from pydantic import TypeAdapter

    # In a tuple, since pydantic refuses `config` for a type that is itself a dataclass.
    adapter = TypeAdapter(tuple[hint], config={"arbitrary_types_allowed": True})
    return adapter.validate_python((value,))[0]
