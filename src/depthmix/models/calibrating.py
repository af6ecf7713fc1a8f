"""A model's exits calibrated: how they draft best on this machine, and what that gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from depthmix.adapters.exit_files import (
    CALIBRATION_NAMES,
    PLAN_NAME,
    UNVERIFIED_PLAN_NAME,
)
from depthmix.data.records import load_records
from depthmix.data.spec import Template
from depthmix.decoding.draft_plan import DraftPlan
from depthmix.decoding.fast_generation import FastGeneration
from depthmix.decoding.predictors import check_made_for
from depthmix.depth.calibration import WORTHWHILE
from depthmix.depth.calibrator import Calibrator, Found, list_tested
from depthmix.depth.costs import Costs
from depthmix.depth.unverified import check_promise
from depthmix.files.drafts import taking_room, write_whole
from depthmix.method.parts import find_parts
from depthmix.method.placement import to_accelerator
from depthmix.models.fast import find_own_exits, hash_exits
from depthmix.models.loading import load_model, load_tokenizer
from depthmix.models.own_texts import read_questions, write_continuations
from depthmix.models.sources import find_base
from depthmix.models.spec import ModelSpec, to_spec
from depthmix.models.speed import Measurement, measure_speed
from depthmix.models.template import recall_template
from depthmix.options.types import check_number

NUM_TEXTS, NUM_UNVERIFIED_TEXTS = 64, 400
"""Texts of a calibration where no number is asked for; a promise about texts needs many."""

FEWEST_TEXTS = 8
"""Texts that a calibration needs at least: two in each of its parts."""

MOST_RECORDS = 4096
"""Records that are read at most, whose answers tell which tokens may be drafted."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How exits draft best; `str` says what to expect, and what was measured."""

    found: Found
    """The plan, and what texts say of it that have not chosen it."""

    measured: Measurement
    """What the plan gave on some of these texts' prompts, generated in both ways."""

    costs: Costs
    """Times of the model's parts here."""

    path: Path
    """The saved plan."""

    @property
    def plan(self) -> DraftPlan:
        """The plan that was saved."""
        return self.found.plan

    def to_dict(self) -> dict[str, Any]:
        """Give what was found as JSON has it."""
        own = {name: asdict(getattr(self, name)) for name in ("found", "measured")}
        return {**own, "costs": self.costs.to_dict()}

    def __str__(self) -> str:
        return "\n".join(_describe(self))


def calibrate(
    model: str | Path | ModelSpec,
    data: str | Path,
    *,
    exits: str | Path | None = None,
    template: Template | None = None,
    num_texts: int | None = None,
    max_new_tokens: int = 128,
    texts_unchanged: float | None = None,
    num_measured: int = 8,
) -> Calibration:
    """Find out how a model's exits draft best here: `calibrate("runs/arc", "held-out.jsonl")`.

    The model answers the prompts of some records by itself, since that is what will be drafted. One
    pass over these texts says how sure each exit is of each token, and whether it is right; the
    times of layers, head and exits are measured. A simulated cascade then tries exits, thresholds
    and draft vocabularies. A half of the texts chooses; the other half tells what to expect, and on
    some of its prompts both ways to generate are measured in turn. The plan lies beside the exits,
    as `plan.json`. Where it gains less than `WORTHWHILE` it says "stay dense", and fast generation
    is the model's own.

    Args:
        model: A model as `load_model` takes it, with exits (`depthmix add-exits`).
        data: Records such as the model will be asked, in any form of training or evaluation, which
            it was not trained on: a file, a named data set (its split `test`) or one on the hub.
        exits: Folder of the exits; by default that beside the adapter or the model.
        template: How a prompt becomes text; by default as in the run's training, and for other
            models `auto`.
        num_texts: Records that are answered at most; by default 64, and 400 for drafts that
            nothing verifies.
        max_new_tokens: Tokens of an answer at most.
        texts_unchanged: By default the top verifies drafts. A share, such as 0.98, chooses
            thresholds for drafts that nothing verifies (`FastGeneration(…, verify=False)`), so that
            at least this share of the texts stays the same, but for a chance of 5 % that it does
            not. That plan is `unverified_plan.json`.
        num_measured: Prompts on which both ways to generate are measured.

    Returns:
        The plan, and what it gives.

    Raises:
        ValueError: If there are too few records, or one asks nothing, or an option does not fit.
        OSError: If model, exits or data cannot be found, or the plan cannot be written.
    """
    check_number("num_texts", num_texts, at_least=FEWEST_TEXTS)
    check_number("num_measured", num_measured, at_least=1)
    check_number("max_new_tokens", max_new_tokens, at_least=2)
    verify = texts_unchanged is None
    spec = to_spec(model)
    tokenizer, asked = load_tokenizer(spec), recall_template(spec, template)
    records = load_records(str(data), split="test", limit=MOST_RECORDS)
    if len(records) < FEWEST_TEXTS:
        raise ValueError(
            f"`data` must hold at least {FEWEST_TEXTS} records, of which a half chooses how to "
            f"draft and the other half tells what that gives, got {len(records)} in {data}."
        )
    wanted = min(num_texts or (NUM_TEXTS if verify else NUM_UNVERIFIED_TEXTS), len(records))
    if texts_unchanged is not None:
        check_promise(texts_unchanged, len(list_tested(wanted)))
    options: dict[str, Any] = {"source": str(data), "variables": asked.variables}
    questions = read_questions(records, asked.template, tokenizer, **options)
    loaded = to_accelerator(load_model(spec)).eval()
    own_exits, folder = find_own_exits(loaded, find_base(spec), exits)
    backbone, _ = find_parts(loaded)
    check_made_for(own_exits, backbone, verify=verify)  # before anything takes long
    prompts = [question.prompt for question in questions]
    calibrator = Calibrator(
        backbone=backbone,
        exits=own_exits,
        texts=write_continuations(
            loaded, tokenizer, prompts[:wanted], max_new_tokens=max_new_tokens
        ),
        answers=[question.answer for question in questions],
    )
    found = (
        calibrator.choose()
        if texts_unchanged is None
        else calibrator.choose_unverified(texts_unchanged)
    )
    found = replace(found, plan=replace(found.plan, exits_sha256=hash_exits(folder)))
    measured = measure_speed(
        loaded,
        FastGeneration(loaded, own_exits, replace(found.plan, stay_dense=False), verify=verify),
        tokenizer,
        [prompts[number] for number in found.told_by[:num_measured]],
        max_new_tokens=max_new_tokens,
    )
    dense = found.plan.stay_dense or measured.speed_up < WORTHWHILE
    calibration = Calibration(
        found=replace(found, plan=replace(found.plan, stay_dense=dense)),
        measured=measured,
        costs=calibrator.costs,
        path=folder / (PLAN_NAME if verify else UNVERIFIED_PLAN_NAME),
    )
    _save(calibration)
    return calibration


def _save(calibration: Calibration) -> None:
    """Write how the plan was found, and then the plan, each whole or not at all."""
    path = calibration.path
    path.parent.mkdir(exist_ok=True)  # exits that the model was trained with have no folder yet
    way_out = "calibrate again"
    with taking_room(path.parent, "exits", then=way_out):
        content = json.dumps(calibration.to_dict(), indent=2)
        write_whole(path.with_name(CALIBRATION_NAMES[path.name]), content + "\n")
        write_whole(path, json.dumps(calibration.plan.to_dict()) + "\n")


def _describe(calibration: Calibration) -> Iterator[str]:
    """Say in words what was found."""
    found, measured = calibration.found, calibration.measured
    plan, expected, promise = found.plan, found.expected, found.promise
    known = "all tokens" if plan.vocabulary is None else f"{len(plan.vocabulary):,} tokens"
    pairs = zip(plan.exits, plan.thresholds, strict=True)
    drafts = ", ".join(f"layer {layer} from {threshold:g}" for layer, threshold in pairs)
    if promise is None:
        drafts += f"; together from {plan.joint_threshold:g}, {plan.max_drafts} at most"
    yield f"Drafts: {drafts}; among {known}, which are {found.coverage:.1%} of what is written."
    yield (
        f"Expected: {expected.speed_up:.2f} times as fast; {expected.drafted:.0%} of the tokens "
        f"drafted, {expected.acceptance:.1%} of the drafts right, {expected.layers_per_token:.1f} "
        f"layers a token (on {expected.num_texts:,} texts that chose nothing)."
    )
    if promise is not None:
        yield (
            f"Texts unchanged: {promise.target:.0%} asked for; {promise.num_changed:,} of "
            f"{promise.num_tested:,} tested texts changed, so at least {promise.lowest:.1%} stay "
            f"the same ({1 - promise.error:.0%} sure); {expected.texts_unchanged:.1%} of "
            f"{expected.num_texts:,} others did."
        )
    yield (
        f"Measured: {measured.speed_up:.2f} times as fast ({measured.lowest:.2f} to "
        f"{measured.highest:.2f} by prompt), {measured.dense_tokens_per_second:.1f} and "
        f"{measured.fast_tokens_per_second:.1f} tokens/s; {measured.num_same} of "
        f"{measured.num_texts} texts are the same."
    )
    if plan.stay_dense:
        yield "Stay dense: that is not worth it, and fast generation will be the model's own."
    yield f"Saved as {calibration.path}."
