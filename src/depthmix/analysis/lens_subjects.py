"""Models that are loaded once, and then looked through on as many texts as wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from depthmix.analysis.lens import Lens, look
from depthmix.attachment import find_mixture_norm
from depthmix.data.rendering import retokenise
from depthmix.models import load_model, load_tokenizer
from depthmix.options import read_value
from depthmix.run_config import ModelSection, Template
from depthmix.run_template import RunTemplate, recall_template

Choice = Literal["all", "late"] | list[int]
"""Layers to read out."""


@dataclass(frozen=True, kw_only=True)
class Subjects:
    """One model or two, and the layers of them that are read out."""

    models: dict[str, tuple[nn.Module, PreTrainedTokenizerBase]]
    """Models with their tokenizers, by name, on the accelerator if there is one."""

    layers: Sequence[int] | None
    """Layers to read out; `None` stands for all."""

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
            name: look(model, tokenizer, retokenise(prompt, tokenizer), layers=self.layers)
            for name, (model, tokenizer) in self.models.items()
        }


def load_subjects(
    sections: Sequence[ModelSection],
    *,
    layers: str | Sequence[int] = "all",
    template: Template | None = None,
) -> Subjects:
    """Load models to look through.

    Args:
        sections: One model or two, whose tokenizers give the same tokens.
        layers: Layers to read out: `all`, the `late` ones of the models' mixtures, or numbers, as
            text with commas between them.
        template: How a text becomes what the models read; `None` takes that of the first which is a
            run, and otherwise `plain`.

    Returns:
        The models, by the names that they were asked for.

    Raises:
        ValueError: If a model is named twice, or there are no late layers.
        OSError: If a model cannot be found.
    """
    names = [section.adapter or section.name for section in sections]
    if len(set(names)) < len(names):
        raise ValueError(
            f"`sections` must be different models, got {names[0]} twice; leave one of them out."
        )
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    models = [
        load_model(section).to(accelerator or "cpu")  # pyrefly: ignore[bad-argument-type]
        for section in sections
    ]
    return Subjects(
        models={
            name: (model, load_tokenizer(section))
            for name, model, section in zip(names, models, sections, strict=True)
        },
        layers=choose_layers(layers, models),
        template=_choose_template(sections, template),
    )


def _choose_template(sections: Sequence[ModelSection], template: Template | None) -> RunTemplate:
    """Choose one template for all models, which read the same tokens."""
    plain = RunTemplate(template="plain")
    found = [recall_template(section, template, otherwise="plain") for section in sections]
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
    norms = [norm for model in models if (norm := find_mixture_norm(model)) is not None]
    mixtures = [norm.active_mixture for norm in norms if norm.active_mixture is not None]
    if not mixtures:
        raise ValueError(
            "`layers` can be `late` only where a model has a mixture, and none has; say `all`, or "
            "name layers by number."
        )
    return sorted({layer for mixture in mixtures for layer in mixture.late_layers})
