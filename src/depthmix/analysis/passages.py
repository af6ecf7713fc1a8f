"""Texts that a run's model reads token by token, tuned and as it was before."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel

from depthmix.adapter_config import MoDEConfig
from depthmix.analysis.examples import Example
from depthmix.analysis.lens import Lens, look
from depthmix.analysis.lens_subjects import choose_layers
from depthmix.evaluation.provenance import UNTUNED, describe_model
from depthmix.models import load_model, load_tokenizer
from depthmix.run_config import RUN_CONFIG_NAME, ModelSection, load_run_config
from depthmix.run_folder import load_result

LONGEST_TITLE = 60
"""Characters of a passage that the menu of texts shows."""

NUM_PASSAGES = 2
"""Wins, and losses, that are read token by token where no text is given; items without either."""


def choose_passages(examples: Sequence[Example]) -> dict[str, str]:
    """Take the first wins and losses, each with its right answer, as texts to read.

    Args:
        examples: Items on which a run and a baseline part, or any items of the run.

    Returns:
        Texts by title, two of each kind at most.
    """
    chosen = [
        example
        for kind in ("win", "loss", "item")
        for example in [e for e in examples if e.kind == kind][:NUM_PASSAGES]
    ]
    passages: dict[str, str] = {}
    for example, title in zip(chosen, entitle([e.prompt for e in chosen]), strict=True):
        gap = "" if example.prompt[-1:].isspace() or example.reference[:1].isspace() else " "
        passages[f"{example.kind} {title}"] = f"{example.prompt}{gap}{example.reference}"
    return passages


def entitle(texts: Sequence[str]) -> list[str]:
    """Number texts, and name them by where they begin, or else begin to differ.

    Args:
        texts: The texts.

    Returns:
        A short title for each, all different.
    """
    lines = [" ".join(text.split()) for text in texts]
    # A template around every text names none of them.
    shared = os.path.commonprefix(lines) if len(lines) > 1 else ""  # noqa: RUF071  (of characters)
    start = shared.rfind(" ") + 1 if len(shared) > LONGEST_TITLE // 2 else 0
    titles = []
    for number, line in enumerate(lines, start=1):
        end = start + LONGEST_TITLE
        title = line[start:end].rstrip()
        titles.append(f"{number} · {'… ' * (start > 0)}{title}{' …' * (len(line) > end)}")
    return titles


def read_passages(
    run: Path, passages: dict[str, str], *, layers: str | Sequence[int] = "late"
) -> dict[str, dict[str, Lens]]:
    """Let a run's model read texts, tuned and as it was before.

    Args:
        run: Folder of a finished run.
        passages: Texts by title.
        layers: Layers to read out, as `show_lens` takes them. `late` are those of the mixture or,
            of a run without one, those that it would have; the pretrained model is then read out at
            its final layer alone.

    Returns:
        By title, the lens of the tuned model by its method's name, and the pretrained model's.

    Raises:
        ValueError: If a layer or text does not fit the model.
        OSError: If the model cannot be found.
    """
    config = load_run_config(run / RUN_CONFIG_NAME)
    section = ModelSection(name=str(run), dtype=config.model.dtype)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    model = load_model(section).to(accelerator or "cpu")  # pyrefly: ignore[bad-argument-type]
    assert isinstance(model, PeftModel)  # training saves an adapter
    tokenizer = load_tokenizer(section)
    final = model.config.get_text_config().num_hidden_layers
    is_late = layers == "late"
    if is_late and config.method != "mode":
        choice = load_result(run).choice
        mode = MoDEConfig(**config.mode)
        layers = mode.resolve_late_layers(final) if choice is None else choice.late_layers
    numbers = choose_layers(layers, [model])
    name = describe_model(section)["method"]
    lenses = {}
    for title, text in passages.items():
        tuned = look(model, tokenizer, text, layers=numbers)
        with model.disable_adapter():
            # Late layers are the mixture's; what was there before is the final layer's prediction.
            before = look(model, tokenizer, text, layers=[final] if is_late else numbers)
        lenses[title] = {name: tuned, UNTUNED: before}
    return lenses
