"""Commands that take a finished run elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from depthmix_cli.declarations import part, taking
from depthmix_cli.options import SPEC, Model


@taking(
    (
        "depthmix.exports.export:export",
        *("layer", "data", "template", "num_records", "max_lost", "dtype", "overwrite"),
    ),
    (SPEC, "adapter", "top_k"),
)
def export(
    model: Model,
    output: Path,
    *,
    form: Literal["transformers", "vllm", "layer", "plain"],
    **options: Any,
) -> None:
    """Write a run for other engines, LoRA merged, and check there that it is the run.

    `depthmix export runs/arc arc --form transformers`

    `depthmix export runs/arc arc-28 --form layer --layer 28 --data held-out.jsonl`
    """
    from depthmix.exports.export import export
    from depthmix.models.spec import ModelSpec

    spec = ModelSpec(name=model, **part(options, "adapter", "top_k"))
    exported = export(spec, output, form=form, **options)
    print(exported, f"Saved in {exported.folder}.", sep="\n")
