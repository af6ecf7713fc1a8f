"""What a run remembers of how its records became text, for those who ask its model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from depthmix.data.chat_templates import Conversation
from depthmix.data.forms import Form, Record, find_form, share_variables, write_alpaca_turns
from depthmix.data.rendering import Prompt, tokenise_prompt
from depthmix.data.spec import Template, TrainingTemplate
from depthmix.data.templates import render_prompt
from depthmix.files.drafts import write_whole
from depthmix.files.runs import RUN_CONFIG_NAME
from depthmix.models.saved_adapters import find_run_file
from depthmix.models.sources import find_base
from depthmix.models.spec import ModelSpec

TEMPLATE_NAME = "template.json"
"""File of a run that says how its records became text."""


@dataclass(frozen=True, kw_only=True)
class RunTemplate:
    """How a run's model is asked: as it was trained."""

    template: TrainingTemplate = "auto"
    """How records become text, by their form."""

    form: Form = "prompt"
    """Form of the training records: what a question that comes as bare text stands for."""

    variables: Mapping[str, Any] = field(default_factory=dict)
    """`chat_template_kwargs` of all training records."""

    @property
    def is_chat(self) -> bool:
        """Whether the chat template writes bare text."""
        return self.template == "chat" or self.form == "messages"

    @property
    def is_alpaca(self) -> bool:
        """Whether Alpaca's prompt stands around bare text."""
        by_form = self.template == "auto" and self.form == "instruction"
        return self.template == "alpaca" or by_form

    def render(self, text: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        """Render a question as the run's training records were.

        Args:
            text: The question, or the beginning of a text.
            tokenizer: The run's.

        Returns:
            What the model reads.

        Raises:
            ValueError: If there is no chat template to write it.
        """
        record: dict[str, Any] = {"prompt": text}
        if self.is_chat:
            record = {"prompt": [{"role": "user", "content": text}]}
        elif self.form == "instruction":
            record = {"instruction": text}
        template = "chat" if self.is_chat else self.template
        return render_prompt(record, template, tokenizer, variables=self.variables)

    def converse(
        self, messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase
    ) -> Prompt:
        """Render a conversation that the model is to go on with.

        Args:
            messages: What was said, first perhaps by the system, last by the user.
            tokenizer: The run's.

        Returns:
            What the model reads: by the chat template, as a series of Alpaca's prompts, or of
            prompts as they are the last alone, since nothing was learnt that joins them.

        Raises:
            ValueError: If there is no chat template to write it, or none and yet a system message.
        """
        if self.is_chat:
            given = Conversation(messages=messages, variables=self.variables)
            return tokenise_prompt(given, tokenizer)
        if messages[0]["role"] == "system":
            raise ValueError(
                "`system` must be left out for this run, which was trained without a chat "
                'template that has a place for it; leave it out, or say `template="chat"`.'
            )
        if not self.is_alpaca:
            return self.render(messages[-1]["content"], tokenizer)
        said = {
            role: [message["content"] for message in messages if message["role"] == role]
            for role in ("user", "assistant")
        }
        return tokenise_prompt(write_alpaca_turns(said["user"], said["assistant"]), tokenizer)


def learn_template(records: Sequence[Record], template: TrainingTemplate) -> RunTemplate:
    """Describe how training records are rendered.

    Args:
        records: The records.
        template: `data.template`.

    Returns:
        What the run is to remember.
    """
    form = find_form(records)
    return RunTemplate(template=template, form=form, variables=share_variables(records))


def save_template(template: RunTemplate, folder: Path) -> Path:
    """Keep a run's template beside its settings.

    Args:
        template: What it remembers.
        folder: Of the run.

    Returns:
        The written file.
    """
    content = json.dumps(asdict(template), indent=2) + "\n"
    return write_whole(folder / TEMPLATE_NAME, content)


def recall_template(
    spec: ModelSpec, template: Template | None = None, *, otherwise: Template = "auto"
) -> RunTemplate:
    """Say how a model is asked.

    Args:
        spec: The model; a run, or a checkpoint of one, remembers how it was trained.
        template: What is asked for instead; `None` takes the run's.
        otherwise: What a model takes that is no run.

    Returns:
        The template. Runs of earlier versions remember `data.template` alone.

    Raises:
        ValueError: If the run's file is damaged.
    """
    adapter = find_base(spec).adapter
    found = RunTemplate(template=otherwise)
    if adapter is not None:
        found = _read_template(Path(adapter).expanduser()) or found
    if template is None:
        return found
    form = found.form if template == "auto" else "prompt"
    return RunTemplate(template=template, form=form, variables=found.variables)


def _read_template(folder: Path) -> RunTemplate | None:
    """Read what a run remembers; None for an adapter that is none."""
    path = find_run_file(folder, TEMPLATE_NAME) or find_run_file(folder, RUN_CONFIG_NAME)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
        if path.name == RUN_CONFIG_NAME:
            return RunTemplate(template=content.get("data", {}).get("template", "auto"))
        return RunTemplate(**content)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"Cannot read {path}: {type(error).__name__}, {error}; pass `template`, or copy the "
            "run again."
        ) from error
