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
from depthmix.training.fast import check_held_out, hold_out
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

    held_out: Sequence[Mapping[str, Any]] = ()
    """Records on which drafts are calibrated, where the run is to become fast."""

    @property
    def counts(self) -> dict[str, int]:
        """Number of training records by what became of them, for the run's results."""
        return self.selection.counts | ({"held_out": len(self.held_out)} if self.held_out else {})

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
    held_out: Sequence[Mapping[str, Any]] = ()
    if config.preset == "fast" and config.data.eval is None:
        selection, kept_back = hold_out(selection)
        held_out = write(kept_back.records, config.data.train)
    records = write(selection.records, config.data.train)
    template = learn_template(records, config.data.template)
    tokenise = partial(_tokenise, config=config, template=template, tokenizer=tokenizer)
    train_dataset = tokenise(records, numbers=selection.numbers)
    eval_dataset = None
    if config.data.eval is not None:
        validating = write(_read_validation(config.data), config.data.eval)
        eval_dataset = tokenise(validating)
        if config.preset == "fast":
            held_out = check_held_out(validating, source=config.data.eval)
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
        held_out=held_out,
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


def _read_validation(section: DataSpec) -> Sequence[Mapping[str, Any]]:
    """Read the records for validation during training."""
    assert section.eval is not None  # or there were none
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
