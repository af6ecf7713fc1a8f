"""What a run measures before and after training: evaluations, as `depthmix evaluate` makes them."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from depthmix.data.spec import EvaluationSpec
from depthmix.evaluation.folder import EvaluationFolder
from depthmix.evaluation.own_records import OWN_RECORDS, OwnRecords, prepare_own_records
from depthmix.evaluation.provenance import describe_model
from depthmix.evaluation.reading import load_evaluation
from depthmix.evaluation.result import PRETRAINED_NAME, TRAINING_NAME, EvaluationResult
from depthmix.evaluation.scoring import REPORTED_PACKAGES, keep, score
from depthmix.files.versions import list_versions
from depthmix.models.spec import ModelSpec
from depthmix.models.template import RunTemplate
from depthmix.training.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Own records on which a run measures its model."""

    spec: EvaluationSpec
    """What to measure, as the run's settings say."""

    own: OwnRecords
    """The records, ready to be asked."""

    versions: Mapping[str, str]
    """Versions of the packages that measure, as the run began."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured once, before it has a folder."""

    outcome: Mapping[str, Any]
    """What lm-eval returned."""

    seconds: float
    """Wall time."""


def plan_measure(
    config: RunConfig, template: RunTemplate, tokenizer: PreTrainedTokenizerBase
) -> Measure:
    """Prepare what a run measures, before anything is trained.

    Args:
        config: The run's settings, with `evaluation`.
        template: How its records become text.
        tokenizer: Its tokenizer.

    Returns:
        The records, ready to be asked.

    Raises:
        ValueError: If a record does not fit the metric.
        OSError: If there are no records.
        RuntimeError: If lm-eval or math-verify is needed, and not installed.
    """
    assert config.evaluation is not None  # or there were nothing to measure
    own = prepare_own_records(
        config.evaluation, template.template, tokenizer, variables=template.variables
    )
    if own.notice is not None and PartialState().is_main_process:
        print(own.notice, file=sys.stderr)
    return Measure(spec=config.evaluation, own=own, versions=list_versions(REPORTED_PACKAGES))


def measure(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, plan: Measure
) -> Measured:
    """Measure a model in memory, and leave it and the random numbers as they are.

    Args:
        model: The model, tuned or not.
        tokenizer: Its tokenizer.
        plan: What to measure.

    Returns:
        The outcome.
    """
    started = time.monotonic()
    outcome = score(model, tokenizer, plan.own.configs, batch_size=plan.spec.batch_size)
    return Measured(outcome=outcome, seconds=time.monotonic() - started)


def keep_measured(
    measured: Measured | None, plan: Measure | None, config: RunConfig, run: Path, **facts: Any
) -> EvaluationResult | None:
    """Keep what was measured of a run's model, and read it as others will.

    Args:
        measured: The outcome; `None` where nothing was measured.
        plan: What was measured.
        config: The run's settings.
        run: Its folder, which holds its adapter. The tuned model's evaluation lies in
            `evaluation/training` there, the pretrained one's in `pretrained/evaluation/training`.
        facts: `is_tuned`, and `num_devices` among which the batches were divided.

    Returns:
        The evaluation; `None` where nothing was measured.

    Raises:
        OSError: If the folder cannot be written.
    """
    if measured is None or plan is None:
        return None
    tuned = ModelSpec(name=str(run), dtype=config.model.dtype)
    spec = tuned if facts["is_tuned"] else config.model
    place = run if facts["is_tuned"] else run / PRETRAINED_NAME
    settings = describe_model(spec, num_devices=facts["num_devices"])
    settings |= {"protocol": "default", "layer": "ensemble", "limit": plan.spec.num_items}
    settings |= {"num_fewshot": None, "evaluation_seed": 0}
    path = place / "evaluation" / TRAINING_NAME
    folder = EvaluationFolder(path, settings, overwrite=True)
    folder.begin()
    keep(
        folder,
        OWN_RECORDS,
        measured.outcome,
        data=plan.own.data,
        metrics={OWN_RECORDS: plan.own.metric},
        versions=plan.versions,
        seconds=measured.seconds,
    )
    return load_evaluation(path)
