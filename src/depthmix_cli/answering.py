"""Commands that let a model answer."""

from __future__ import annotations

import sys
from typing import Any

from depthmix_cli.declarations import part, taking
from depthmix_cli.options import SPEC, Generation, Model


@taking(
    (SPEC, "adapter", "dtype"),
    (
        "depthmix.models.generation:generate",
        *("template", "top_k", "lazy", "fast", "exits", "verify", "against_dense"),
    ),
)
def generate(
    model: Model, prompts: list[str], *, generation: Generation = None, **options: Any
) -> None:
    """Print a model's answers to prompts, and on standard error what `--fast` took."""
    from depthmix.models.generation import generate
    from depthmix.models.spec import ModelSpec

    spec = ModelSpec(name=model, **part(options, "adapter", "dtype"))
    speeds: list[object] = []
    answers = generate(spec, prompts, options=generation, on_speed=speeds.append, **options)
    print(*answers, sep="\n\n")
    print(*speeds, sep="", end="\n" if speeds else "", file=sys.stderr)


@taking(
    (SPEC, "adapter", "dtype", "top_k"),
    ("depthmix.models.generation:chat", "system", "template", "depth", "fast", "exits", "verify"),
)
def chat(model: Model, *, generation: Generation = None, **options: Any) -> None:
    """Talk with a model; `/exit` or Ctrl-D ends."""
    from depthmix.models.generation import chat
    from depthmix.models.spec import ModelSpec

    spec = ModelSpec(name=model, **part(options, "adapter", "dtype", "top_k"))
    chat(spec, options=generation, **options)
