"""Models that are loaded once, and then looked through on as many texts as wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import nn
from transformers import PreTrainedTokenizerBase

from depthmix.data.rendering import Prompt, retokenise
from depthmix.data.spec import Template
from depthmix.decoding.draft_plan import DraftPlan
from depthmix.decoding.predictors import check_made_for, check_plan
from depthmix.depth.lens import Lens
from depthmix.depth.lens import look as read_out
from depthmix.files.settings import read_value
from depthmix.method.exits import Exits
from depthmix.method.found_exits import find_exits
from depthmix.method.norm import active_mixture
from depthmix.method.parts import find_parts
from depthmix.method.placement import to_accelerator
from depthmix.models.fast import find_exit_folder, find_own_exits, read_plan
from depthmix.models.loading import load_model, load_tokenizer
from depthmix.models.sources import find_base
from depthmix.models.spec import ModelSpec, to_spec
from depthmix.models.template import RunTemplate, recall_template

Choice = Literal["all", "late"] | list[int]
"""Layers to read out."""


@dataclass(frozen=True, kw_only=True)
class Subjects:
    """One model or two, and the layers of them that are read out."""

    models: dict[str, tuple[nn.Module, PreTrainedTokenizerBase]]
    """Models with their tokenizers, by name, on the accelerator if there is one."""

    layers: Sequence[int] | None
    """Layers to read out; `None` stands for all."""

    drafting: dict[str, tuple[Exits, DraftPlan]] = field(default_factory=dict)
    """Exits and how they draft, of the models that have some and are to show them."""

    template: RunTemplate = field(default_factory=lambda: RunTemplate(template="plain"))
    """How a text becomes what they read."""

    def look(self, text: str) -> dict[str, Lens]:
        """Let each model read a text, as the first one's chat template writes it, if one does.

        Args:
            text: What they read.

        Returns:
            What each depth predicts, by the name of the model.

        Raises:
            ValueError: If a layer or the text does not fit a model.
        """
        _, first = next(iter(self.models.values()))
        prompt = self.template.render(text, first)
        return {
            name: read_out(
                model,
                tokenizer,
                retokenise(prompt, tokenizer),
                layers=self.layers,
                drafting=self.drafting.get(name),
            )
            for name, (model, tokenizer) in self.models.items()
        }


def load_subjects(
    models: Sequence[str | Path | ModelSpec],
    *,
    layers: str | Sequence[int] = "all",
    template: Template | None = None,
    drafts: bool = False,
) -> Subjects:
    """Load models to look through.

    Args:
        models: One model or two, as `load_model` takes them, whose tokenizers give the same tokens.
        layers: Layers to read out: `all`, the `late` ones of the models' mixtures, or numbers, as
            text with commas between them.
        template: How a text becomes what the models read; `None` takes that of the first which is a
            run, and otherwise `plain`.
        drafts: Also load exits that lie beside the models, to show what they would draft.

    Returns:
        The models, by the names that they were asked for.

    Raises:
        ValueError: If a model is named twice, there are no late layers, or exits do not fit.
        OSError: If a model cannot be found.
    """
    specs = [to_spec(model) for model in models]
    names = [spec.adapter or spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise ValueError(
            f"`models` must be different models, got {names[0]} twice; leave one of them out."
        )
    loaded = [to_accelerator(load_model(spec)) for spec in specs]
    return Subjects(
        models={
            name: (model, load_tokenizer(spec))
            for name, model, spec in zip(names, loaded, specs, strict=True)
        },
        layers=choose_layers(layers, loaded),
        drafting={
            name: found
            for name, model, spec in zip(names, loaded, specs, strict=True)
            if drafts and (found := _find_drafting(model, spec)) is not None
        },
        template=_choose_template(specs, template),
    )


def look(
    model: str | Path | ModelSpec | nn.Module,
    text: str | Prompt,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    layers: str | Sequence[int] = "all",
    template: Template | None = None,
    top: int = 5,
) -> Lens:
    """Read what each depth of a model predicts in a text: `look("runs/arc", "Plants breathe")`.

    Args:
        model: A name or a spec, as `load_model` takes it, or a model in memory, on the device where
            it is to run.
        text: What it reads.
        tokenizer: That of a model in memory; one that is loaded brings its own.
        layers: Layers to read out: `all`, the `late` ones of its mixture, or numbers.
        template: How the text becomes what a loaded model reads; `None` takes a run's own, and
            otherwise the text as it is.
        top: How many of the likeliest tokens to keep.

    Returns:
        The predictions by depth, and the routing weights of a mixture.

    Raises:
        TypeError: If a model in memory comes without a tokenizer or with a template, or a name with
            a tokenizer.
        ValueError: If the text, a layer or a part of the model does not fit.
        OSError: If the model cannot be found.
    """
    if isinstance(model, nn.Module):
        if tokenizer is None or template is not None:
            raise TypeError(
                "`tokenizer` must come with a model in memory, and `template` without one; pass "
                "`tokenizer` and the text as the model is to read it."
            )
        return read_out(model, tokenizer, text, layers=choose_layers(layers, [model]), top=top)
    if tokenizer is not None:
        raise TypeError(
            "`tokenizer` must be left out for a model that is loaded by its name, with its own."
        )
    subjects = load_subjects([model], layers=layers, template=template)
    ((loaded, own),) = subjects.models.values()
    prompt = subjects.template.render(text, own) if isinstance(text, str) else text
    return read_out(loaded, own, prompt, layers=subjects.layers, top=top)


def _find_drafting(model: nn.Module, spec: ModelSpec) -> tuple[Exits, DraftPlan] | None:
    """Find a model's exits and how they draft, where there are some that are worth it."""
    base = find_base(spec)
    if find_exit_folder(base) is None and find_exits(model) is None:
        return None
    exits, folder = find_own_exits(model, base)
    plan = read_plan(folder) or DraftPlan.for_all(exits.layers)
    if plan.stay_dense:
        return None
    backbone, _ = find_parts(model)
    check_plan(plan, exits, backbone)
    check_made_for(exits, backbone, verify=True)
    return exits, plan


def _choose_template(specs: Sequence[ModelSpec], template: Template | None) -> RunTemplate:
    """Choose one template for all models, which read the same tokens."""
    plain = RunTemplate(template="plain")
    found = [recall_template(spec, template, otherwise="plain") for spec in specs]
    return next((one for one in found if one != plain), plain)


def choose_layers(layers: str | Sequence[int], models: Sequence[nn.Module]) -> Sequence[int] | None:
    """Number the layers that are to be read out.

    Args:
        layers: As `load_subjects` takes them.
        models: The models, of which some may have a mixture.

    Returns:
        Their numbers; `None` stands for all.

    Raises:
        ValueError: If there are no late layers, or the layers cannot be read.
    """
    try:
        choice = read_value(layers, Choice)
    except ValueError as error:
        raise ValueError(
            f"`layers` must be `all`, `late`, or numbers with commas between them, got {layers!r}."
        ) from error
    if choice != "late":
        return None if choice == "all" else choice
    mixtures = [mixture for model in models if (mixture := active_mixture(model)) is not None]
    if not mixtures:
        raise ValueError(
            "`layers` can be `late` only where a model has a mixture, and none has; say `all`, or "
            "name layers by number."
        )
    return sorted({layer for mixture in mixtures for layer in mixture.late_layers})
