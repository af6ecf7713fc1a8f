"""Texts that a run's model reads token by token, tuned and as it was before."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from depthmix.adapters.config import MoDEConfig
from depthmix.data.rendering import Prompt, continue_prompt, tokenise_prompt
from depthmix.data.spec import Template
from depthmix.depth.lens import Lens, look
from depthmix.evaluation.identity import UNTUNED
from depthmix.evaluation.provenance import describe_model
from depthmix.files.runs import RUN_CONFIG_NAME
from depthmix.method.placement import to_accelerator
from depthmix.models.loading import load_model, load_tokenizer
from depthmix.models.spec import ModelSpec
from depthmix.models.subjects import choose_layers
from depthmix.models.template import recall_template
from depthmix.pages.examples import Example
from depthmix.training.config import load_run_config
from depthmix.training.folder import load_record

LONGEST_TITLE = 60
"""Characters of a passage that the menu of texts shows."""

LONGEST_ANSWER = 400
"""Characters of a run's own answer that are read."""

NUM_PASSAGES = 2
"""Wins, and losses, that are read token by token where no text is given; items without either."""


@dataclass(frozen=True, kw_only=True)
class Passage:
    """An item with an answer: the run's own where it won, else the right one."""

    prompt: str
    """What a model read."""

    answer: str
    """The answer that follows."""

    prompt_ids: tuple[int, ...] | None = None
    """Tokens of a prompt that was rendered; `None` for a text."""

    def render_prompt(self, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        """Turn the prompt into tokens, as they were read.

        Args:
            tokenizer: The model's.

        Returns:
            The prompt alone.
        """
        prompt = tokenise_prompt(self.prompt, tokenizer)
        if self.prompt_ids is not None and self.prompt_ids != prompt.token_ids:
            return replace(prompt, token_ids=self.prompt_ids, is_chat=True)
        return prompt

    def render(self, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        """Turn it into tokens, those of the prompt as they were read.

        Args:
            tokenizer: The model's.

        Returns:
            Prompt and answer.
        """
        prompt = self.render_prompt(tokenizer)
        is_joined = prompt.is_chat or self.prompt[-1:].isspace() or self.answer[:1].isspace()
        answer = self.answer if is_joined else f" {self.answer}"
        ids = continue_prompt(prompt, answer, tokenizer)
        return replace(prompt, text=prompt.text + answer, token_ids=prompt.token_ids + ids)


def choose_passages(examples: Sequence[Example]) -> dict[str, Passage]:
    """Take the first wins and losses as texts to read.

    A win has the run's own answer, and anything else the right one.

    Args:
        examples: Items on which a run and a baseline part, or any items of the run.

    Returns:
        Passages by title, two of each kind at most.
    """
    chosen = [
        example
        for kind in ("win", "loss", "item")
        for example in [e for e in examples if e.kind == kind][:NUM_PASSAGES]
    ]
    titles = entitle([example.prompt for example in chosen])
    return {
        f"{example.kind} {title}": Passage(
            prompt=example.prompt, answer=_answer(example), prompt_ids=example.prompt_ids
        )
        for example, title in zip(chosen, titles, strict=True)
    }


def _answer(example: Example) -> str:
    """Choose the answer to read: what the run said where it won, without what it went on with."""
    if example.kind != "win" or not example.answers:
        return example.reference
    said = example.answers[0].text
    first = said.lstrip().partition("\n\n")[0].rstrip()
    lead = said[: len(said) - len(said.lstrip())] if "\n" not in said[:1] else ""
    return f"{lead}{first[:LONGEST_ANSWER]}" if first else example.reference


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
    run: Path,
    passages: Mapping[str, str | Passage],
    *,
    layers: str | Sequence[int] = "late",
    template: Template | None = None,
) -> dict[str, dict[str, Lens]]:
    """Let a run's model read texts, tuned and as it was before.

    Args:
        run: Folder of a finished run.
        passages: Items by title, or texts, which are rendered as the run's training was.
        layers: Layers to read out, as `show_lens` takes them. `late` are those of the mixture or,
            of a run without one, those that it would have; the pretrained model is then read out at
            its final layer alone.
        template: How texts become what the models read; `None` takes the run's own.

    Returns:
        By title, the lens of the tuned model by its method's name, and the pretrained model's.

    Raises:
        ValueError: If a layer or text does not fit the model.
        OSError: If the model cannot be found.
    """
    config = load_run_config(run / RUN_CONFIG_NAME)
    section = ModelSpec(name=str(run), dtype=config.model.dtype)
    model = to_accelerator(load_model(section))
    assert isinstance(model, PeftModel)  # training saves an adapter
    tokenizer = load_tokenizer(section)
    final = model.config.get_text_config().num_hidden_layers
    is_late = layers == "late"
    if is_late and config.method != "mode":
        choice = load_record(run).choice
        mode = MoDEConfig(**config.mode)
        layers = mode.resolve_late_layers(final) if choice is None else choice.late_layers
    numbers = choose_layers(layers, [model])
    name = describe_model(section)["method"]
    lenses = {}
    asked = recall_template(section, template)
    for title, passage in passages.items():
        text = (
            asked.render(passage, tokenizer)
            if isinstance(passage, str)
            else passage.render(tokenizer)
        )
        opening = 1
        if isinstance(passage, Passage):
            opening = len(passage.render_prompt(tokenizer).token_ids)
        tuned = replace(look(model, tokenizer, text, layers=numbers), opening=opening)
        with model.disable_adapter():
            # Late layers are the mixture's; what was there before is the final layer's prediction.
            before = look(model, tokenizer, text, layers=[final] if is_late else numbers)
        lenses[title] = {name: tuned, UNTUNED: before}
    return lenses
