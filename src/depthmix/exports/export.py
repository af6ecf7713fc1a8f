"""Write a finished run for other engines: merged, in one folder, and checked there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import AutoConfig

from depthmix.adapters.merged import check_exportable, take_apart
from depthmix.data.spec import Template
from depthmix.exports.card import EXITS_LEFT_OUT, write_card
from depthmix.exports.checking import (
    ExportCheck,
    ask_folder,
    ask_run,
    check_right,
    compare,
    describe,
)
from depthmix.exports.folders import write_layer, write_plain, write_transformers, write_vllm
from depthmix.exports.losses import ExportLoss, answering_alone, measure_loss, read_rows
from depthmix.files.drafts import drafting_folder, taking_room, write_whole
from depthmix.method.norm import active_mixture
from depthmix.method.parts import find_parts
from depthmix.models.loading import load_model, load_tokenizer
from depthmix.models.sources import find_base, resolve_model
from depthmix.models.spec import ModelSpec, to_spec
from depthmix.models.template import recall_template

ExportForm = Literal["transformers", "vllm", "layer", "plain"]
"""Who is to load it, and what it keeps."""

CHECK_NAME = "check.json"
"""File of an export with what it says to some prompts, for other engines to be held to."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """A run that was exported; `str` makes printable lines."""

    folder: Path
    """Where it lies."""

    form: ExportForm
    """Its form."""

    layer: int | None
    """The layer that answers alone; `None` where the mixture does."""

    check: ExportCheck
    """How far it is from the run, at that depth."""

    loss: ExportLoss | None
    """What it loses against the run as it predicts, where that was measured."""

    def __str__(self) -> str:
        lines = [str(self.check)]
        if self.form == "vllm":
            lines.append(
                f"vLLM itself was not asked: `python -m depthmix_vllm {self.folder}` does that, "
                "where the plug-in is installed."
            )
        if self.loss is not None:
            lines.append(str(self.loss))
        elif self.layer is not None:
            lines.append("What it loses is not known: name records as `data` to see it.")
        return "\n".join([*lines, EXITS_LEFT_OUT])


def export(
    model: str | Path | ModelSpec,
    output: str | Path,
    *,
    form: ExportForm,
    layer: int | Literal["final"] | None = None,
    data: str | None = None,
    template: Template | None = None,
    num_records: int = 64,
    max_lost: float = 0.1,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    overwrite: bool = False,
) -> Export:
    """Write a run for other engines: `export("runs/arc", "arc", form="transformers")`.

    LoRA weights are merged in float32 and then stored. What was written is loaded in a process of
    its own, and its logits and greedy tokens are compared with the run's; if it is another model,
    nothing of it is kept.

    Args:
        model: A run, an adapter or a model with a mixture, as `load_model` takes it.
        output: Folder to make; its name is the model's in the card.
        form: `transformers`: for `from_pretrained(…, trust_remote_code=True)`, with the mixture.
            `vllm`: what the plug-in depthmix-vllm serves, with the mixture. `layer`: one late layer
            by itself, an ordinary model with fewer layers. `plain`: an ordinary model, in which the
            final layer answers by the pretrained norm.
        layer: The late layer of `layer`, by number or `final`.
        data: Records on which `layer` and `plain` are compared with the run, as `data.eval` takes
            them; `plain` needs them where the run has a mixture.
        template: How they become text; by default as in the run's training.
        num_records: Records that are read at most.
        max_lost: Nats per token that `plain` may lose on them; more is refused.
        dtype: Type of the stored weights; `auto` keeps the base model's. A mixture's are float32.
        overwrite: Replace a folder that is there already.

    Returns:
        Where it lies, how it was checked, and what it loses.

    Raises:
        ValueError: If an option does not fit, the model cannot be exported in this form, or `plain`
            loses too much.
        FileExistsError: If the folder is there already.
        RuntimeError: If what was written cannot be loaded, or is another model than the run.
        OSError: If the model or the records cannot be found, or the folder cannot be written.
    """
    if form not in get_args(ExportForm):
        raise ValueError(f"`form` must be one of {', '.join(get_args(ExportForm))}, got {form!r}.")
    spec = find_base(to_spec(model))
    output = Path(output).expanduser()
    stored = _find_dtype(spec, dtype)
    with (
        drafting_folder(output, overwrite=overwrite) as draft,
        taking_room(draft, "output", then="export again"),
    ):
        run, tokenizer = load_model(spec, dtype="float32").eval(), load_tokenizer(spec)
        check_exportable(run)
        alone = _find_layer(run, form, layer)
        by_pretrained_norm = form == "plain"
        loss = None
        if alone is None:
            reference = ask_run(run, tokenizer)
        else:
            how = {"by_pretrained_norm": by_pretrained_norm}
            if data is not None:
                rows = read_rows(spec, data, template=template, limit=num_records)
                loss = measure_loss(run, rows, alone, **how)
            with answering_alone(run, alone, **how):
                reference = ask_run(run, tokenizer)
        if form == "plain":
            _check_loss(run, loss, max_lost)
        parts = take_apart(run)
        late_layers = parts.late_layers
        if form == "layer":
            assert alone is not None
            write_layer(parts, alone, draft, stored)
        else:
            write = {"transformers": write_transformers, "vllm": write_vllm, "plain": write_plain}
            write[form](parts, draft, stored)
        tokenizer.save_pretrained(draft)
        card = write_card(
            form,
            output.name,
            base=spec.name,
            layer=alone,
            late_layers=late_layers,
            template=recall_template(spec),
            loss=loss,
        )
        write_whole(draft / "README.md", card)
        del run, parts  # the process that loads the export needs the memory
        answer = ask_folder(reference, draft, form)
        check = compare(reference, answer, stored)
        check_right(check, form)
        write_whole(draft / CHECK_NAME, json.dumps(describe(reference, answer)) + "\n")
    return Export(folder=output, form=form, layer=alone, check=check, loss=loss)


def _find_layer(run: Any, form: ExportForm, layer: int | str | None) -> int | None:
    """Say which layer answers alone in an export; None where the mixture does."""
    mixture = active_mixture(run)
    backbone, _ = find_parts(run)
    last = backbone.num_hidden_layers
    if form != "layer" and layer is not None:
        raise ValueError(
            f"`layer` must be left out for the form {form!r}, got {layer}; only `layer` writes one "
            "layer by itself."
        )
    if form == "layer":
        late_layers = (last,) if mixture is None else mixture.late_layers
        chosen = last if layer == "final" else layer
        if chosen not in late_layers:
            raise ValueError(
                "`layer` must be `final` or one of the late layers "
                f"{', '.join(map(str, late_layers))}, which have learnt to answer, got {layer}."
            )
        assert isinstance(chosen, int)
        return chosen
    if form == "plain":
        return last
    if mixture is None:
        raise ValueError(
            f"`form` must be `plain` for a model without a mixture, which any engine can run, got "
            f"{form!r}."
        )
    return None


def _check_loss(run: Any, loss: ExportLoss | None, max_lost: float) -> None:
    """Refuse to leave a mixture out unseen, or at too high a price."""
    if active_mixture(run) is None:
        return
    if loss is None:
        raise ValueError(
            "`data` must name records for the form `plain` of a run with a mixture, so that it is "
            "known what is lost without it, got none; those of the run's evaluation are best."
        )
    if not loss.own_loss - loss.run_loss <= max_lost:
        raise ValueError(
            f"`max_lost` allows {max_lost:g} nats a token to be lost, and leaving the mixture out "
            f"loses more, so nothing is written; take the form `transformers`, or allow more. "
            f"{loss}"
        )


def _find_dtype(spec: ModelSpec, dtype: str) -> torch.dtype:
    """Say in which type weights are to be stored."""
    if dtype != "auto":
        found = getattr(torch, dtype)
    else:
        source = resolve_model(spec.name)
        config = AutoConfig.from_pretrained(
            source.directory_or_id,
            gguf_file=source.gguf_file,
            revision=spec.revision or "main",
        )
        found = getattr(config, "dtype", None) or torch.float32
    assert isinstance(found, torch.dtype)
    return found
