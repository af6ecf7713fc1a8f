"""One training run, from its configuration to a saved adapter and its measurements."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from accelerate.utils import broadcast_object_list

from depthmix.data.audit import warn_of_leaks
from depthmix.evaluation.result import EvaluationResult
from depthmix.files.drafts import DRAFT_SUFFIX, move_into, taking_room
from depthmix.files.versions import list_versions
from depthmix.method.norm import active_mixture
from depthmix.method.parts import find_parts
from depthmix.models.template import save_template
from depthmix.models.vocabulary import save_ends
from depthmix.training.card import explain_loading
from depthmix.training.config import RunConfig
from depthmix.training.fast import HELD_OUT_NAME, make_fast, save_held_out
from depthmix.training.folder import TrainResult, save_result
from depthmix.training.material import Material, gather
from depthmix.training.measuring import Measured, keep_measured, measure
from depthmix.training.setup import Setup, build
from depthmix.training.start import (
    OnBegin,
    Start,
    begin,
    check_new,
    check_resumed,
    find_start,
    removed_if_refused,
)
from depthmix.training.trainers.checkpoints import ADAPTER_NAMES, keep_best

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

    With `preset="fast"` exits are then put on the finished run and calibrated (`make_fast`); if
    that is interrupted, the run itself is finished, and `resume` goes on from there.

    Args:
        config: The run's settings.
        overwrite: Delete the run that the output folder holds.
        resume: Go on with the run in the output folder: from its newest whole checkpoint, or from
            the first step where it was interrupted before there was one. It ends at the weights
            and the log of a run without the interruption; after the last step it only finishes.
        test_sets: What to leave out instead of `data.without`, as for `select_records`.

    Returns:
        Measurements, also written to `results.json` in the output folder, with the evaluations
        in `evaluation/training` and `pretrained/evaluation/training`.

    Raises:
        ValueError: If a setting, a record or the model does not fit, or a run that is resumed began
            with other settings or records, or its checkpoint lacks what it needs; nothing is
            written then.
        FileExistsError: If the output folder holds a run and neither flag says what to do.
        OSError: If the output folder cannot be written, or is full; `resume` goes on then.
        FloatingPointError: If the loss or a gradient is not finite; the last checkpoint is kept.
        RuntimeError: If evaluation or the template needs lm-eval, which is not installed.
    """
    started, versions = time.monotonic(), list_versions(REPORTED_PACKAGES)
    output_dir = check_new(config)
    start = find_start(output_dir, overwrite=overwrite, resume=resume, training=config.training)
    if resume and not start.clears:
        check_resumed(config, output_dir)
    with (
        taking_room(output_dir, "training.output_dir", then="go on by `resume`"),
        removed_if_refused(output_dir),
    ):
        material = gather(config, test_sets=test_sets)
        setup = build(config, output_dir, start, material)
        _announce(config, output_dir, start, material, setup)
        before = _measure(material, setup, tuned=False)
        metrics = _run(start, material, setup)
        after = _measure(material, setup, tuned=True)
        _save_adapter(output_dir, setup)
        evaluations = _keep(config, output_dir, material, setup, before, after)
        metrics = {**metrics, "total_seconds": time.monotonic() - started}
        result = _finish(output_dir, material, setup, metrics, evaluations, versions)
    if config.preset != "fast" or not setup.trainer.is_world_process_zero():
        return result
    num_records, num_layers = len(material.records), find_parts(setup.tuned)[0].num_hidden_layers
    del material, setup  # the finished run is loaded again, as it lies in its folder
    options = {"num_records": num_records, "num_hidden_layers": num_layers}
    added, calibration = make_fast(config, output_dir, **options)
    return replace(result, added=added, calibration=calibration)


def _announce(
    config: RunConfig, output_dir: Path, start: Start, material: Material, setup: Setup
) -> None:
    """Say what is left out, leaks or goes on, and let the run write how it begins."""
    if setup.trainer.is_world_process_zero():
        selection, asked = material.selection, config.evaluation
        warn_of_leaks(
            selection.records,
            config.data.train,
            split=config.data.split,
            evaluation=asked.data if asked else None,
            num_items=asked.num_items if asked else None,
        )
        if config.data.without:
            print(
                f"{selection.num_dropped:,} of {selection.num_given:,} training records ask a "
                f"question of {', '.join(config.data.without)} and are left out; "
                f"{len(selection.records):,} are used.",
                file=sys.stderr,
            )
        if material.held_out and config.data.eval is None:
            print(
                f"{len(material.held_out):,} records are held out, on which drafts are calibrated "
                f"when the run is finished ({output_dir / HELD_OUT_NAME}); "
                f"{len(material.records):,} are trained on.",
                file=sys.stderr,
            )
        print(*start.notices, sep="\n", end="\n" * bool(start.notices), file=sys.stderr)
    # Only when optimiser, data and checkpoint are in place, and before a reporter opens its files.
    action = partial(_begin, config, output_dir, start, material, setup)
    setup.trainer.callback_handler.callbacks.insert(0, OnBegin(action))


def _begin(
    config: RunConfig, output_dir: Path, start: Start, material: Material, setup: Setup
) -> None:
    """Write down how a run begins, and how its model is to be asked."""
    choice = None if setup.choice is None else asdict(setup.choice)
    begin(config, output_dir, start, {"records": material.digest, "layer_choice": choice})
    save_template(material.template, output_dir)
    if material.held_out:
        save_held_out(material.held_out, output_dir)
    save_ends(setup.tuned, output_dir)


def _measure(material: Material, setup: Setup, *, tuned: bool) -> Measured | None:
    """Measure the tuned model, or the pretrained one under its adapter, where that is asked for."""
    plan = material.measure
    if plan is None or not (tuned or plan.spec.before):
        return None
    with nullcontext() if tuned else setup.tuned.disable_adapter():
        return measure(setup.tuned, material.tokenizer, plan)


def _run(start: Start, material: Material, setup: Setup) -> dict[str, float]:
    """Train, and validate where there is a data set for it; give the trainer's summary."""
    checkpoint = None if start.checkpoint is None else str(start.checkpoint)
    metrics = setup.trainer.train(resume_from_checkpoint=checkpoint).metrics
    validated = {} if material.eval_dataset is None else setup.trainer.evaluate()
    return {**metrics, **validated}


def _save_adapter(output_dir: Path, setup: Setup) -> None:
    """Put the adapter into the run's folder, whole."""
    trainer = setup.trainer
    draft = output_dir / f".adapter{DRAFT_SUFFIX}"
    trainer.save_model(str(draft), _internal_call=True)
    if trainer.is_world_process_zero():
        if active_mixture(setup.tuned) is not None:
            explain_loading(draft)
        move_into(draft, output_dir, last=ADAPTER_NAMES[::-1])
    if trainer.args.push_to_hub:
        trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)


def _keep(
    config: RunConfig,
    output_dir: Path,
    material: Material,
    setup: Setup,
    before: Measured | None,
    after: Measured | None,
) -> list[EvaluationResult | None]:
    """Keep both evaluations in the run's folder, and give them to all processes."""
    found: list[EvaluationResult | None] = [None, None]
    if setup.trainer.is_world_process_zero():
        found = [
            keep_measured(
                measured,
                material.measure,
                config,
                output_dir,
                is_tuned=is_tuned,
                num_devices=setup.num_devices,
            )
            for is_tuned, measured in ((False, before), (True, after))
        ]
    return broadcast_object_list(found)


def _finish(
    output_dir: Path,
    material: Material,
    setup: Setup,
    metrics: dict[str, float],
    evaluations: Sequence[EvaluationResult | None],
    versions: Mapping[str, str],
) -> TrainResult:
    """Write the results, which say that the run is finished."""
    trainer = setup.trainer
    before, after = evaluations
    result = TrainResult(
        output_dir=output_dir,
        metrics=metrics,
        log_history=trainer.state.log_history,
        ledger=setup.ledger,
        data=material.counts,
        before=before,
        after=after,
        choice=setup.choice,
        num_devices=setup.num_devices,
        versions=versions,
    )
    if trainer.is_world_process_zero():
        save_result(result)
        best = trainer.state.best_model_checkpoint
        if setup.checkpoint_limit == 1 and best is not None:
            keep_best(output_dir, Path(best))
    return result
