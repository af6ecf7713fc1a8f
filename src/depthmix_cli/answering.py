"""Commands that let a model answer."""

from __future__ import annotations

from typing import Any

from depthmix_cli.declarations import part, taking
from depthmix_cli.options import SPEC, Generation, Model


@taking(
    (SPEC, "adapter", "dtype"),
    (
        "depthmix.models.generation:generate",
        *("template", "top_k", "lazy", "fast", "exits", "verify"),
    ),
)
def generate(
    model: Model, prompts: list[str], *, generation: Generation = None, **options: Any
) -> None:
    """Print a model's answers to prompts."""
    from depthmix.models.generation import generate
    from depthmix.models.spec import ModelSpec

    spec = ModelSpec(name=model, **part(options, "adapter", "dtype"))
    print(*generate(spec, prompts, options=generation, **options), sep="\n\n")


@taking(
    (SPEC, "adapter", "dtype", "top_k"),
    ("depthmix.models.generation:chat", "system", "template", "depth"),
)
def chat(model: Model, *, generation: Generation = None, **options: Any) -> None:
    """Talk with a model; `/exit` or Ctrl-D ends."""
    from depthmix.models.generation import chat
    from depthmix.models.spec import ModelSpec

    spec = ModelSpec(name=model, **part(options, "adapter", "dtype", "top_k"))
    chat(spec, options=generation, **options)
