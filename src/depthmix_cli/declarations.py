"""What a command takes from the function that it calls: types, defaults and help, said there.

They are read from the function's source, since importing it takes seconds.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar

from cyclopts import Parameter, Token
from docstring_parser import parse

Command = TypeVar("Command", bound=Callable[..., None])

NAMES = {"Literal": typing.Literal, "Sequence": Sequence, "Path": Path}
"""Names in types that are neither Python's own nor the package's."""


def taking(*sources: tuple[str, ...]) -> Callable[[Command], Command]:
    """Give a command options of what it calls, which reach it as its `**options`.

    What the command declares itself stays; help that it lacks comes from there, too.

    Args:
        sources: Each the place of a function or a dataclass, its module and name with a colon
            between them, and the options to take from there; without any, all that have a default.

    Returns:
        A decorator. The command's signature then has these options behind its own.

    Raises:
        ValueError: If an option is not there.
    """

    def take(command: Command) -> Command:
        own = inspect.signature(command).parameters
        hints = typing.get_type_hints(command, include_extras=True)
        documented = {one.arg_name for one in parse(command.__doc__ or "").params}
        taken: dict[str, inspect.Parameter] = {}
        for place, *names in sources:
            found = read_declared(place)
            if unknown := [name for name in names if name not in found]:
                raise ValueError(f"`sources` must name options of {place}, got {unknown}.")
            every = [name for name, one in found.items() if one.default is not None]
            for name in names or every:
                if name not in own:
                    taken[name] = found[name].to_parameter(name)
            for name in own.keys() & found.keys() - documented:
                if typing.get_origin(hints[name]) is not Annotated:
                    hints[name] = Annotated[hints[name], Parameter(help=found[name].text)]
        kept = [one.replace(annotation=hints[name]) for name, one in own.items()]
        parameters = [
            *(one for one in kept if one.kind is not one.VAR_KEYWORD),
            *taken.values(),
        ]
        command.__annotations__ = {one.name: one.annotation for one in parameters}
        signature = inspect.Signature(parameters)
        command.__signature__ = signature  # pyrefly: ignore[missing-attribute]
        return command

    return take


def part(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """Take some of a command's options out of all that were given."""
    return {name: options.pop(name) for name in names if name in options}


@dataclass(frozen=True)
class Declared:
    """An option as the source declares it."""

    module: str
    """Where."""

    kind: ast.expr | None
    """Its type."""

    default: ast.expr | None
    """Its default, if it has one."""

    text: str | None
    """What it is."""

    def to_parameter(self, name: str) -> inspect.Parameter:
        """Make a command's option of it; what may be a text, among others, is one there."""
        none, kind = inspect.Parameter.empty, _read_type(self.module, self.kind)
        return inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=none if self.default is None else ast.literal_eval(self.default),
            annotation=Annotated[kind, Parameter(help=self.text)],
        )


@functools.cache
def read_declared(place: str) -> Mapping[str, Declared]:
    """Read what a function takes, or a dataclass, from its source. Nothing is imported.

    Args:
        place: Its module and its name, with a colon between them.

    Returns:
        What can be given by name, in the order of the source.

    Raises:
        LookupError: If the module does not define it.
    """
    module, _, name = place.partition(":")
    node = _find(module, name)
    if isinstance(node, ast.ClassDef):
        return dict(_read_fields(module, node))
    assert isinstance(node, ast.FunctionDef)  # or there were nothing to call
    texts = {one.arg_name: one.description for one in parse(ast.get_docstring(node) or "").params}
    arguments = [*node.args.args, *node.args.kwonlyargs]
    defaults = [*[None] * len(node.args.args), *node.args.kw_defaults]
    return {
        one.arg: Declared(module, one.annotation, default, texts.get(one.arg))
        for one, default in zip(arguments, defaults, strict=True)
    }


def _read_fields(module: str, node: ast.ClassDef) -> Iterator[tuple[str, Declared]]:
    """Read the fields of a dataclass, each of which has its docstring behind it."""
    for line, after in pairwise(node.body):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            text = ast.literal_eval(after.value) if isinstance(after, ast.Expr) else None
            text = text and inspect.cleandoc(text)
            yield line.target.id, Declared(module, line.annotation, line.value, text)


def _read_type(module: str, node: ast.expr | None) -> Any:
    """Read a type; text, where it is one of several."""
    if node is None:
        return Any
    used = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    known = vars(builtins) | NAMES
    known |= {name: _follow(module, name) for name in used - set(known)}
    kind = eval(compile(ast.Expression(node), module, "eval"), known)
    parts = typing.get_args(kind)
    if str in parts:
        return str | None if type(None) in parts else str
    if int in parts and any(typing.get_origin(one) is typing.Literal for one in parts):
        either = int | str | None if type(None) in parts else int | str
        return Annotated[either, Parameter(converter=_read_number_or_word)]
    return kind


def _read_number_or_word(_kind: Any, tokens: Sequence[Token]) -> int | str:
    """Read a number, or else a word, of which what is called says better what it must be."""
    (token,) = tokens
    try:
        return int(token.value)
    except ValueError:
        return token.value


def _follow(module: str, name: str) -> Any:
    """Read the type that a name of the package stands for."""
    for line in _parse(module).body:
        if isinstance(line, ast.ImportFrom) and name in [alias.name for alias in line.names]:
            return _follow(line.module or "", name)
    node = _find(module, name)
    assert isinstance(node, ast.Assign)  # a class would be a section, which a command has itself
    return _read_type(module, node.value)


def _find(module: str, name: str) -> ast.stmt:
    """Find where a module defines a name."""
    for line in _parse(module).body:
        if isinstance(line, ast.FunctionDef | ast.ClassDef) and line.name == name:
            return line
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == name:
            return line
    raise LookupError(f"{module} does not define {name}.")


@functools.cache
def _parse(module: str) -> ast.Module:
    """Parse a module of the package, without importing the package."""
    top, *parts = module.split(".")
    spec = find_spec(top)
    assert spec is not None  # this package, too, is installed by its name
    assert spec.origin is not None
    path = Path(spec.origin).parent.joinpath(*parts).with_suffix(".py")
    return ast.parse(path.read_text("utf-8"))
