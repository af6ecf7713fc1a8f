"""What a run is made of before there is a trainer: tokenizer, model, records as tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from depthmix.data.records import load_published, to_instructions
from depthmix.data.selection import Selection, select_records
from depthmix.data.spec import DataSpec
from depthmix.data.templates import to_training_dataset
from depthmix.models.loading import load_model, load_tokenizer
from depthmix.models.template import RunTemplate, learn_template
from depthmix.models.vocabulary import stop_at
from depthmix.training.config import RunConfig
from depthmix.training.measuring import Measure, plan_measure
from depthmix.training.tokenizer import (
    adopt_options,
    clone_template,
    find_ends,
    find_template_source,
)


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a run is made of."""

    model: PreTrainedModel
    """The model to tune, without an adapter."""

    tokenizer: PreTrainedTokenizerBase
    """Its tokenizer, as the run's options change it."""

    new_tokens: Sequence[int]
    """Ids of tokens that the model did not have."""

    selection: Selection
    """Which records are trained on."""

    records: Sequence[Mapping[str, Any]]
    """These records, as they are trained on."""

    template: RunTemplate
    """How they became text."""

    train_dataset: Dataset
    """Their tokens."""

    eval_dataset: Dataset | None
    """Tokens of the records for validation during training, if there are some."""

    measure: Measure | None
    """What is measured before and after training, if anything is."""

    @property
    def digest(self) -> str:
        """Hash of the records, by which they are told from others."""
        text = json.dumps(self.records, ensure_ascii=False, default=str)
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def gather(config: RunConfig, *, test_sets: Sequence[str] | None = None) -> Material:
    """Read the records, the tokenizer and the model of a run.

    Args:
        config: The run's settings.
        test_sets: What to leave out instead of `data.without`, as for `select_records`.

    Returns:
        What the run is made of. Records are read and rendered before the model is loaded, unless
        its tokenizer brings tokens for which the model has to make room.

    Raises:
        ValueError: If a setting or a record does not fit, or the model has an adapter.
        OSError: If something cannot be found.
        RuntimeError: If lm-eval or math-verify is needed, and not installed.
    """
    tokenizer, early, new_tokens = _open_tokenizer(config)
    write = choose_form(config.data)
    selection = select_records(config.data, test_sets=test_sets)
    records = write(selection.records, config.data.train)
    template = learn_template(records, config.data.template)
    tokenise = partial(_tokenise, config=config, template=template, tokenizer=tokenizer)
    train_dataset = tokenise(records, numbers=selection.numbers)
    held_out = _read_held_out(config.data)
    eval_dataset = None if held_out is None else tokenise(write(held_out, config.data.eval))
    measure = None if config.evaluation is None else plan_measure(config, template, tokenizer)
    model = early or _load_pretrained(config)  # which is made ready before it is handed on
    stop_at(model, find_ends(train_dataset, tokenizer))
    return Material(
        model=model,
        tokenizer=tokenizer,
        new_tokens=new_tokens,
        selection=selection,
        records=records,
        template=template,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        measure=measure,
    )


def _open_tokenizer(
    config: RunConfig,
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel | None, Sequence[int]]:
    """Load the tokenizer as the run's options change it.

    Where it takes tokens over from another one, the model, which has to make room for them, is
    loaded with it, and the ids of these tokens are given.
    """
    tokenizer, model, new_tokens = load_tokenizer(config.model), None, []
    if (source := find_template_source(config.training)) is not None:
        model = _load_pretrained(config)
        new_tokens = clone_template(model, tokenizer, source, config)
    adopt_options(tokenizer, config.training)
    return tokenizer, model, new_tokens


def _read_held_out(section: DataSpec) -> Sequence[Mapping[str, Any]] | None:
    """Read the records for validation during training, if there are to be some."""
    if section.eval is None:
        return None
    return load_published(section.eval, split=section.eval_split, limit=section.limit)


def choose_form(section: DataSpec) -> Callable[..., list[dict[str, Any]]]:
    """Choose how records of named data sets are written, before any is read.

    Args:
        section: Source and template.

    Returns:
        A function of records, as `load_published` reads them, and of their source.

    Raises:
        ValueError: If the template needs a benchmark, and the source has none.
        RuntimeError: If it needs lm-eval, which is not installed.
    """
    if section.template != "lm-eval":
        return to_instructions
    from depthmix.evaluation.tasks.demonstrations import (  # needs lm-eval
        check_benchmark,
        to_demonstrations,
    )

    for option in ("train", "eval"):
        source = getattr(section, option)
        if source is not None:
            check_benchmark(source, f"data.{option}")
    return to_demonstrations


def _tokenise(
    records: Sequence[Mapping[str, Any]],
    *,
    config: RunConfig,
    template: RunTemplate,
    tokenizer: PreTrainedTokenizerBase,
    numbers: Sequence[int] | None = None,
) -> Dataset:
    """Turn records into tokens as the run's options say."""
    return to_training_dataset(
        records,
        config.data.template,
        tokenizer,
        numbers=numbers,
        variables=template.variables,
        marks_assistant=config.training.get("assistant_only_loss", False),
    )


def _load_pretrained(config: RunConfig) -> PreTrainedModel:
    """Load the model to tune, which must have no adapter yet."""
    model = load_model(config.model)
    if isinstance(model, PeftModel):
        raise ValueError(
            f"`model.name` must be a pretrained model, and {config.model.name} is an adapter; name "
            "the model under it, or merge the adapter into it first."
        )
    return model
