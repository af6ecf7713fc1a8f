"""What is said of one run, as plain data: how it was trained, what it gained, what it answers."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from pathlib import Path

from pydantic_core import to_jsonable_python

from depthmix.adapters.ledger import Ledger
from depthmix.depth.lens import Lens
from depthmix.evaluation.identity import DEFAULT_SEED, UNTUNED
from depthmix.figures.curves import Panel
from depthmix.figures.training_panels import loss_panels, optimisation_panels, routing_panels
from depthmix.files.runs import RESULTS_NAME, RUN_CONFIG_NAME
from depthmix.pages.examples import Example, find_examples
from depthmix.pages.speed_section import SpeedSection, read_speed
from depthmix.pages.verdict import Verdict, judge_run
from depthmix.training.config import RunConfig, load_run_config
from depthmix.training.folder import TrainResult, load_record

METHODS = {"mode": "Mixture-of-Depths Ensemble", "lora": "LoRA without the mixture"}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the page says; `draw_report` makes its figures."""

    title: str
    """Heading of the page."""

    model: str
    """Name of the model that was trained."""

    method: str
    """How it was trained, in words."""

    facts: Mapping[str, str]
    """Further settings worth a line each: name and value, in words."""

    ledger: Ledger
    """Trained parameters by part."""

    trainable: tuple[Mapping[str, int], ...]
    """For each verdict, trained parameters by label of a method, of those that say it."""

    panels: Mapping[str, tuple[Panel, ...]]
    """What training logged: `losses`, `routing` and `optimisation`."""

    verdicts: tuple[Verdict, ...]
    """The run beside its baselines, once for each of its evaluations."""

    examples: tuple[Example, ...]
    """Wins and losses against the best baseline, in the first verdict."""

    passages: Mapping[str, Mapping[str, Lens]] = field(default_factory=dict)
    """Title of a text to what each depth predicts in it, by the name of the model."""

    speed: SpeedSection | None = None
    """What its exits and their calibration say; `None` where it has none."""

    missing: Mapping[str, str] = field(default_factory=dict)
    """Why a part of the page could not be made: `examples`, `passages`, `speed`."""

    seconds: float
    """Wall time of the run."""

    command: str
    """What to type to run it again."""

    config: str
    """The resolved configuration as JSON, without tokens of access."""

    def _repr_html_(self) -> str:
        """Show the page in a notebook, in a frame of its own."""
        from depthmix.pages.report_page import render_report

        page = escape(render_report(self), quote=True)
        return f'<iframe srcdoc="{page}" width="100%" height="800" frameborder="0"></iframe>'


def collect_report(
    run: Path,
    *,
    baselines: Sequence[Path] | None = None,
    title: str | None = None,
    command: str | None = None,
    num_examples: int = 3,
) -> Report:
    """Collect what can be said of a run without loading its model.

    Args:
        run: Folder of a finished run.
        baselines: Folders of runs to compare it with; `None` takes those in the same folder.
        title: Heading of the page; `None` makes one from the model's name.
        command: What to type to run it again; `None` takes `depthmix train` with the settings that
            the run has saved.
        num_examples: Wins, and losses, to show at most.

    Returns:
        The report, ready for `write_report`; `passages` are left to the caller. Where the items'
        texts cannot be read any more, there are no examples, and `missing` says why.

    Raises:
        ValueError: If a file of the run is damaged.
        OSError: If the run is not finished, or a baseline that was named is no run.
    """
    result, config = load_record(run), load_run_config(run / RUN_CONFIG_NAME)
    verdicts = judge_run(run, baselines)
    examples: tuple[Example, ...] = ()
    missing = {}
    if verdicts and verdicts[0].rivals:
        try:
            examples = find_examples(verdicts[0], verdicts[0].rivals[0], limit=num_examples)
        except (ValueError, OSError) as error:
            missing["examples"] = str(error)
    speed = None
    try:
        speed = read_speed(run)
    except (ValueError, OSError) as error:
        missing["speed"] = str(error)
    logs = [result.log_history]
    panels = {
        "losses": loss_panels(logs),
        "routing": routing_panels(logs),
        "optimisation": optimisation_panels(logs),
    }
    name = Path(config.model.name).name
    again = ["depthmix"]
    if result.num_devices > 1:
        devices = ["--multi_gpu", f"--num_processes={result.num_devices}"]
        again = ["accelerate", "launch", *devices, "-m", "depthmix_cli"]
    again += ["train", "--config", str(run / RUN_CONFIG_NAME)]
    again += ["--training.output-dir", f"{run}-again"]
    return Report(
        title=title or f"Tuning {name}",
        model=name,
        method=METHODS[config.method],
        facts=_list_facts(result, config, panels["routing"]),
        ledger=result.ledger,
        trainable=tuple(map(_count_trainable, verdicts)),
        panels={name: found for name, found in panels.items() if found},
        verdicts=verdicts,
        examples=examples,
        speed=speed,
        missing=missing,
        seconds=result.metrics["total_seconds"],
        command=command or shlex.join(again),
        config=_write_config(config),
    )


def _list_facts(result: TrainResult, config: RunConfig, routing: Sequence[Panel]) -> dict[str, str]:
    """Put the settings that readers ask for into words; `routing` has a curve per late layer."""
    layers = [curve.label.removeprefix("layer ") for panel in routing[:1] for curve in panel.curves]
    steps = max((entry.get("step", 0) for entry in result.log_history), default=0)
    used, dropped = result.data.get("used"), result.data.get("dropped")
    records = f"{used:,} records of " if used else ""
    without = f", {dropped:,} test questions left out" if dropped else ""
    facts = {
        "Late layers": ", ".join(layers),
        "Training data": f"{records}{Path(config.data.train).name}{without}",
        "Optimizer steps": f"{steps:,}",
        "Learning rate": f"{config.training.get('learning_rate', '')}",
        "Seed": f"{config.training.get('seed', DEFAULT_SEED)}",
        "Weights": config.model.dtype,
    }
    return {name: value for name, value in facts.items() if value}


def _count_trainable(verdict: Verdict) -> dict[str, int]:
    """Read how many parameters the compared methods train."""
    counts = {}
    for label, runs in verdict.methods.items():
        folder = runs[0].run
        if runs[0].method == UNTUNED:
            counts[label] = 0
        elif (folder / RESULTS_NAME).is_file():
            counts[label] = load_record(folder).ledger.total
    return counts


def _write_config(config: RunConfig) -> str:
    """Write the configuration; pages are passed on, so a `hub_token` stays out of it."""
    training = {
        name: "…" if name.endswith("_token") and value else value
        for name, value in config.training.items()
    }
    content = to_jsonable_python(asdict(replace(config, training=training)))
    return json.dumps(content, indent=2, ensure_ascii=False)
