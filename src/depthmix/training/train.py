"""One training run, from its configuration to a saved adapter and its measurements."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import PeftModel
from pydantic import TypeAdapter
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from depthmix.adapters.baseline import to_lora
from depthmix.adapters.config import MoDEConfig
from depthmix.adapters.ledger import parameter_ledger
from depthmix.data.audit import warn_of_leaks
from depthmix.data.records import load_published, to_instructions
from depthmix.data.selection import select_records
from depthmix.data.spec import DataSpec, EvaluationSpec
from depthmix.data.templates import check_label_tokens, load_evaluation_records, to_training_dataset
from depthmix.depth.layer_choice import LayerChoice, choose_on_records
from depthmix.evaluation.scoring import Evaluation, choice_likelihood, exact_match
from depthmix.files.drafts import DRAFT_SUFFIX, move_into, taking_room
from depthmix.models.loading import load_model, load_tokenizer
from depthmix.models.template import RunTemplate, learn_template, save_template
from depthmix.models.vocabulary import save_ends, stop_at
from depthmix.trainers.checkpoints import ADAPTER_NAMES, CheckpointLimit, keep_best
from depthmix.trainers.mixin import MoDESFTTrainer
from depthmix.training.config import RunConfig
from depthmix.training.folder import TrainResult, save_result
from depthmix.training.start import (
    OnBegin,
    Start,
    begin,
    check_resumed,
    find_start,
    read_beginning,
    removed_if_refused,
)
from depthmix.training.tokenizer import (
    adopt_options,
    clone_template,
    find_ends,
    find_template_source,
    train_tokens,
)
from depthmix.versions import list_versions

REPORTED_PACKAGES = ("depthmix", "torch", "transformers", "peft", "trl")
"""Packages whose versions stand in the results."""


def train(
    config: RunConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
    test_sets: Sequence[str] | None = None,
) -> TrainResult:
    """Tune a model as configured, evaluate it before and after, and save the adapter.

    Args:
        config: The run's settings.
        overwrite: Delete the run that the output folder holds.
        resume: Go on with the run in the output folder: from its newest whole checkpoint, or from
            the first step where it was interrupted before there was one. It ends at the weights
            and the log of a run without the interruption; after the last step it only finishes.
        test_sets: What to leave out instead of `data.without`, as for `select_records`.

    Returns:
        Measurements, also written to `results.json` in the output folder.

    Raises:
        ValueError: If a setting, a record or the model does not fit, or a run that is resumed began
            with other settings or records, or its checkpoint lacks what it needs; nothing is
            written then.
        FileExistsError: If the output folder holds a run and neither flag says what to do.
        OSError: If the output folder cannot be written, or is full; `resume` goes on then.
        FloatingPointError: If the loss or a gradient is not finite; the last checkpoint is kept.
        RuntimeError: If the template needs lm-eval, which is not installed.
    """
    started, versions = time.monotonic(), list_versions(REPORTED_PACKAGES)
    if config.model.adapter is not None:
        raise ValueError(
            "`model.adapter` must be left out in training, which makes a new adapter; go on with "
            "an unfinished run by `resume=True`, or merge the adapter into its model first."
        )
    if "output_dir" not in config.training:
        raise ValueError(
            "`training` must hold `output_dir`, the folder of the run; `load_run_config` fills it."
        )
    if config.mode.get("revision") not in (None, config.model.revision):
        raise ValueError(
            f"`mode.revision` must be left out, got {config.mode['revision']!r}: it is that of the "
            "model under the adapter, which `model.revision` names."
        )
    if config.training.get("resume_from_checkpoint") is not None:
        raise ValueError(
            "`training.resume_from_checkpoint` must be left out, got "
            f"{config.training['resume_from_checkpoint']!r}; `resume` goes on from the newest "
            "checkpoint in `training.output_dir`."
        )
    output_dir = Path(config.training["output_dir"])
    start = find_start(output_dir, overwrite=overwrite, resume=resume, training=config.training)
    if resume and not start.clears:
        check_resumed(config, output_dir)
    with (
        taking_room(output_dir, "training.output_dir", then="go on by `resume`"),
        removed_if_refused(output_dir),
    ):
        return _train(config, output_dir, start, test_sets, started, versions)


def _train(
    config: RunConfig,
    output_dir: Path,
    start: Start,
    test_sets: Sequence[str] | None,
    started: float,
    versions: dict[str, str],
) -> TrainResult:
    """Do what `train` says, from where it starts."""
    tokenizer, model, new_tokens = load_tokenizer(config.model), None, []
    if (source := find_template_source(config.training)) is not None:
        model = _load_pretrained(config)  # which has to make room for tokens before they are read
        new_tokens = clone_template(model, tokenizer, source, config)
    adopt_options(tokenizer, config.training)
    data = config.data
    write = choose_form(data)
    selection = select_records(data, test_sets=test_sets)
    records = write(selection.records, data.train)
    template = learn_template(records, data.template)
    options: dict[str, Any] = {
        "variables": template.variables,
        "marks_assistant": config.training.get("assistant_only_loss", False),
    }
    train_dataset = to_training_dataset(
        records, data.template, tokenizer, numbers=selection.numbers, **options
    )
    eval_dataset = None
    if data.eval is not None:
        held_out = write(
            load_published(data.eval, split=data.eval_split, limit=data.limit), data.eval
        )
        eval_dataset = to_training_dataset(held_out, data.template, tokenizer, **options)
    items = None
    if (asked := config.evaluation) is not None:
        shared = {"variables": template.variables}
        items = load_evaluation_records(asked, data.template, tokenizer, **shared)
    model = model or _load_pretrained(config)
    stop_at(model, find_ends(train_dataset, tokenizer))
    arguments = _training_arguments(config, output_dir)
    mode, choice = MoDEConfig(**config.mode), None
    train_tokens(mode, model, new_tokens)
    mode.revision = config.model.revision  # says beside the adapter which weights are under it
    kept = {} if start.checkpoint is None else read_beginning(output_dir)
    digest = _digest(records)
    if kept.get("records", digest) != digest:
        raise ValueError(
            f"`data.train` must hold the records with which the run in {output_dir} began, and "
            f"{data.train} gives others now; put them back, or start the run again by `overwrite`."
        )
    if mode.late_layers == "auto" and kept.get("layer_choice") is not None:
        choice = TypeAdapter(LayerChoice).validate_python(kept["layer_choice"])
        mode = replace(mode, late_layers=list(choice.late_layers))
    elif mode.late_layers == "auto":
        choice = choose_on_records(
            model.to(arguments.device),  # pyrefly: ignore[bad-argument-type]
            tokenizer,
            records,
            mode,
            template=data.template,
            max_length=arguments.max_length,
            keeps_end=arguments.truncation_mode == "keep_end",
            variables=template.variables,
        )
        model.to("cpu")  # pyrefly: ignore[bad-argument-type]
        [choice] = broadcast_object_list([choice])  # rounding must not part the processes
        mode = replace(mode, late_layers=list(choice.late_layers))
        if arguments.process_index == 0:
            print(choice, file=sys.stderr)
    first_late_layer = mode.resolve_late_layers(model.config.get_text_config().num_hidden_layers)[0]
    trainer = MoDESFTTrainer(
        model=model,
        args=arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=mode if config.method == "mode" else to_lora(mode, model),
    )
    assert isinstance(trainer.train_dataset, Dataset)
    check_label_tokens(trainer.train_dataset, selection.numbers)
    limit = config.training.get("save_total_limit") or 0
    if limit > 0:
        trainer.add_callback(CheckpointLimit(limit))
    tuned = trainer.model
    assert isinstance(tuned, PeftModel)
    ledger = parameter_ledger(
        tuned,
        first_late_layer=first_late_layer,
        final_norm=mode.final_norm,
        decoder_layers=mode.decoder_layers,
    )
    is_main = trainer.is_world_process_zero()
    if is_main:
        warn_of_leaks(
            selection.records,
            data.train,
            split=data.split,
            evaluation=config.evaluation.data if config.evaluation else None,
            num_items=config.evaluation.num_items if config.evaluation else None,
        )
        if data.without:
            print(
                f"{selection.num_dropped:,} of {selection.num_given:,} training records ask a "
                f"question of {', '.join(data.without)} and are left out; "
                f"{len(selection.records):,} are used.",
                file=sys.stderr,
            )
        print(*start.notices, sep="\n", end="\n" * bool(start.notices), file=sys.stderr)
    facts = {"records": digest, "layer_choice": None if choice is None else asdict(choice)}
    # Only when optimiser, data and checkpoint are in place, and before a reporter opens its files.
    trainer.callback_handler.callbacks.insert(
        0, OnBegin(partial(_begin, config, output_dir, start, facts, template, tuned))
    )

    before = None
    if config.evaluation is not None and config.evaluation.before and items is not None:
        with tuned.disable_adapter():
            before = evaluate(tuned, tokenizer, items, config.evaluation)
    checkpoint = None if start.checkpoint is None else str(start.checkpoint)
    metrics = dict(trainer.train(resume_from_checkpoint=checkpoint).metrics)
    if eval_dataset is not None:
        metrics |= trainer.evaluate()
    after = None
    if config.evaluation is not None and items is not None:
        after = evaluate(tuned, tokenizer, items, config.evaluation)
    draft = output_dir / f".adapter{DRAFT_SUFFIX}"
    trainer.save_model(str(draft), _internal_call=True)
    if is_main:
        move_into(draft, output_dir, last=ADAPTER_NAMES[::-1])
    if arguments.push_to_hub:
        trainer.push_to_hub(commit_message="Model save", revision=arguments.hub_revision)
    metrics["total_seconds"] = time.monotonic() - started
    result = TrainResult(
        output_dir=output_dir,
        metrics=metrics,
        log_history=trainer.state.log_history,
        ledger=ledger,
        data=selection.counts,
        before=before,
        after=after,
        choice=choice,
        num_devices=trainer.accelerator.num_processes
        // trainer.get_tp_size()
        * max(trainer.args.n_gpu, 1),
        versions=versions,
    )
    if is_main:
        save_result(result)
        if limit == 1 and trainer.state.best_model_checkpoint is not None:
            keep_best(output_dir, Path(trainer.state.best_model_checkpoint))
    return result


def _begin(
    config: RunConfig,
    output_dir: Path,
    start: Start,
    facts: dict[str, Any],
    template: RunTemplate,
    tuned: PeftModel,
) -> None:
    """Write down how a run begins, and how its model is to be asked."""
    begin(config, output_dir, start, facts)
    save_template(template, output_dir)
    save_ends(tuned, output_dir)


def _load_pretrained(config: RunConfig) -> PreTrainedModel:
    """Load the model to tune, which must have no adapter yet."""
    model = load_model(config.model)
    if isinstance(model, PeftModel):
        raise ValueError(
            f"`model.name` must be a pretrained model, and {config.model.name} is an adapter; name "
            "the model under it, or merge the adapter into it first."
        )
    return model


def evaluate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    items: list[dict[str, Any]],
    section: EvaluationSpec,
) -> Evaluation:
    """Judge a model on evaluation records by the section's metric.

    Args:
        model: The model, tuned or not.
        tokenizer: Its tokenizer.
        items: Records from `load_evaluation_records`.
        section: The metric and its settings.

    Returns:
        The outcome, item by item.
    """
    if section.metric == "choices":
        return choice_likelihood(model, tokenizer, items, batch_size=section.batch_size)
    return exact_match(
        model,
        tokenizer,
        items,
        max_new_tokens=section.max_new_tokens,
        batch_size=section.batch_size,
    )


def _digest(records: Sequence[Mapping[str, Any]]) -> str:
    """Tell training records from others."""
    text = json.dumps(records, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


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


def _training_arguments(config: RunConfig, output_dir: Path) -> SFTConfig:
    """Build TRL's arguments; where the file is silent, a CPU gets what a CPU can do well."""
    has_gpu, given = torch.cuda.is_available(), config.training
    defaults: dict[str, Any] = {
        "logging_nan_inf_filter": False,
        # TRL's own default and older files have names that transformers warns of.
        "activation_checkpointing": given.get("gradient_checkpointing", has_gpu),
        "activation_checkpointing_kwargs": given.get("gradient_checkpointing_kwargs"),
    }
    if not has_gpu:
        # Adapters are float32 over a bfloat16 trunk, and their products are slow unless autocast.
        defaults |= {
            "use_cpu": not torch.backends.mps.is_available(),
            "bf16": config.model.dtype == "bfloat16",
            "dataloader_pin_memory": False,
        }
    arguments: dict[str, Any] = {**defaults, **config.training, "output_dir": str(output_dir)}
    arguments.pop("save_total_limit", None)  # `CheckpointLimit` sees to it
    try:
        return SFTConfig(**arguments)
    except ValueError as error:
        reason = " ".join(str(error).split())
        named = [name for name, value in arguments.items() if reason.startswith(f"{value} is not")]
        option = f"training.{named[0]}" if named else "training"
        raise ValueError(f"`{option}` is refused by TRL: {reason}") from error
