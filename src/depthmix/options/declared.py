"""The options that a dataclass of another library declares, read from its source.

Importing these libraries takes seconds. What only names or checks the settings of a run, such as a
list of runs, need not wait for them: plain types stand in the source as they are.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, Optional, Union

PLAIN = {
    **{kind.__name__: kind for kind in (bool, int, float, str, list, tuple, dict)},
    **{"None": None, "Any": Any, "Literal": Literal, "Optional": Optional, "Union": Union},
}
"""Names in a type that need no import."""


@dataclass(frozen=True)
class DeclaredOption:
    """An option as its class declares it."""

    kind: Any
    """Its type; `MISSING` where only its library knows it. An enumeration beside text is text."""

    default: Any
    """Its default where that is a plain value, else `MISSING`."""


@functools.cache
def list_declared(module: str, name: str) -> dict[str, DeclaredOption]:
    """Read the options of a dataclass and of those that it inherits from. Nothing is imported.

    Args:
        module: Where the class is defined.
        name: Name of the class.

    Returns:
        Its options by name; none where the class is not found.
    """
    found: dict[str, DeclaredOption] = {}
    definition, tree = _find_class(module, name)
    if definition is None or tree is None:
        return found
    for base in reversed(definition.bases):  # as Python does: what comes later in the order first
        if isinstance(base, ast.Name):
            found |= list_declared(*_find_origin(module, tree, base.id))
    for line in definition.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            kind = _read_type(module, tree, line.annotation)
            found[line.target.id] = DeclaredOption(kind, _read_default(line.value))
            if _is_no_argument(line.value):
                del found[line.target.id]
    return found


def _find_class(module: str, name: str) -> tuple[ast.ClassDef | None, ast.Module | None]:
    """Find the definition of a class, with its file."""
    path = _find_file(module)
    tree = None if path is None else _parse(path)
    for node in [] if tree is None else tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node, tree
    return None, tree


@functools.cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def _find_file(module: str) -> Path | None:
    """Find the file of a module in its package's folder, without importing the package."""
    top, *parts = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        return None
    for folder in spec.submodule_search_locations:
        place = Path(folder, *parts)
        for path in (place.with_suffix(".py"), place / "__init__.py"):
            if path.is_file():
                return path
    return None


def _find_origin(module: str, tree: ast.Module, name: str) -> tuple[str, str]:
    """Find where a name in a module is defined: there, or where it is imported from."""
    for node in tree.body:
        if not isinstance(node, ast.ImportFrom):
            continue
        for alias in node.names:
            if (alias.asname or alias.name) == name:
                parents = module.split(".")[: -node.level] if node.level else []
                origin = ".".join([*parents, *([node.module] if node.module else [])])
                return _follow(origin, alias.name)
    return module, name


def _follow(module: str, name: str) -> tuple[str, str]:
    """Follow a name through a package that only hands it on."""
    definition, tree = _find_class(module, name)
    if definition is not None or tree is None:
        return module, name
    path = _find_file(module)
    inside = f"{module}.__init__" if path is not None and path.name == "__init__.py" else module
    origin, original = _find_origin(inside, tree, name)
    if origin != inside:
        return origin, original
    guess = next(_list_lazily(module, tree, name), None)  # as transformers hands its names on
    return guess or (module, name)


def _list_lazily(module: str, tree: ast.Module, name: str) -> Iterator[tuple[str, str]]:
    """List the modules that a package says to hold a name, in a table of lazy imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                names = value.elts if isinstance(value, ast.List | ast.Tuple) else ()
                own = [one.value for one in names if isinstance(one, ast.Constant)]
                if isinstance(key, ast.Constant) and name in own:
                    yield f"{module}.{key.value}", name


def _read_type(module: str, tree: ast.Module, node: ast.expr) -> Any:
    """Read a type that is made of plain ones; `MISSING` for any other."""
    if isinstance(node, ast.BinOp) and isinstance(node.left, ast.Name):
        name, beside = node.left.id, node.right
        is_text = isinstance(beside, ast.Name) and beside.id == "str"
        if is_text and name not in PLAIN and _is_enumeration(*_find_origin(module, tree, name)):
            return str
    for part in ast.walk(node):
        known = isinstance(part, ast.Name) and part.id in PLAIN
        joins = ast.Subscript | ast.BinOp | ast.BitOr | ast.Tuple | ast.Constant | ast.Load
        if not known and not isinstance(part, joins):
            return MISSING
    return eval(compile(ast.Expression(node), "type", "eval"), {"__builtins__": {}}, PLAIN)


def _is_enumeration(module: str, name: str) -> bool:
    """Tell whether a class is an enumeration of texts."""
    definition, _ = _find_class(module, name)
    bases = [] if definition is None else definition.bases
    return any(isinstance(base, ast.Name) and base.id.endswith("Enum") for base in bases)


def _read_default(node: ast.expr | None) -> Any:
    """Read a default: a plain value, by itself or in a call of `field`."""
    if isinstance(node, ast.Call):
        named = {word.arg: word.value for word in node.keywords}
        node = named.get("default")
    return node.value if isinstance(node, ast.Constant) else MISSING


def _is_no_argument(node: ast.expr | None) -> bool:
    """Tell whether a class sets the field by itself."""
    words = node.keywords if isinstance(node, ast.Call) else ()
    return any(word.arg == "init" for word in words)
