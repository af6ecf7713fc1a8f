"""Every run that an experiment needs, and how each is read, with its place in the experiment."""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from depthmix.data.catalog import name_whole
from depthmix.data.records import is_named
from depthmix.evaluation.names import DATA_SETS
from depthmix.files.settings import build_section
from depthmix.models.sources import find_base
from depthmix.models.spec import ModelSpec
from depthmix.options.types import suggest
from depthmix.training.config import load_run_config
from depthmix_replication.experiment import Experiment, Method, Scale
from depthmix_replication.experiment_files import load_scale, load_subjects, merge
from depthmix_replication.runs import TOY, Reading, Run

RELATIVE_LAYER = re.compile(r"n(?:-(\d+))?")
"""A layer counted from the final one: `n`, `n-1`, …"""

MODEL_FILES = (
    *("*.safetensors", "*.gguf", "pytorch_model*.bin", "adapter_model.bin"),
    *("config.json", "generation_config.json", "adapter_config.json"),
    *("tokenizer*.json", "*_tokens*.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    "*.jinja",
)
"""What makes a local model: its weights, configuration and tokenizer. Results, and what a trainer
keeps for itself, may lie beside them."""

LAYER_OPTIONS = ("task_loss", "layer", "late_layers")
"""Settings that may name layers so."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One point of an experiment: a run, one way to read it, and where it belongs."""

    model: str
    """Name of the pretrained model."""

    subject: str
    """Name of what it is tuned on and tested by."""

    method: str
    """Name of the row."""

    point: Mapping[str, Any] = field(default_factory=dict)
    """Value on each axis."""

    seed: int
    """Seed of the training."""

    run: Run
    reading: Reading

    @property
    def label(self) -> str:
        """Name of the row with its point: what all seeds have in common."""
        return ", ".join(
            [self.method, *(f"{axis} = {value}" for axis, value in self.point.items())]
        )


def expand(
    experiment: Experiment,
    scale: Scale,
    *,
    models: Sequence[str] = (),
    seeds: Sequence[int] = (),
    subjects: Sequence[str] = (),
    judge: Mapping[str, Any] | None = None,
    data_dir: str | None = None,
    count_layers: Callable[[str], int],
) -> list[Trial]:
    """List every run of an experiment.

    Args:
        experiment: As it is at the scale.
        scale: For models, seeds and settings that the experiment leaves open.
        models: Only these models, instead of the experiment's.
        seeds: Only these seeds.
        subjects: Only these of the experiment's subjects.
        judge: What of the judge determines its ratings, for benchmarks that need one.
        data_dir: Local folder of data sets: where it holds a sample, the whole is another data set.
        count_layers: Gives the number of a model's layers, for settings such as `n-1`.

    Returns:
        Trials by model, subject, method, point and seed. Points with a Top-K above k are left out.

    Raises:
        ValueError: If a setting is unknown or does not fit.
    """
    common, known = load_scale(scale), load_subjects()
    if unknown := [name for name in subjects if name not in experiment.subjects]:
        raise ValueError(
            f"`subjects` must be some of {experiment.name}'s"
            f"{suggest(unknown[0], experiment.subjects)}"
        )
    trials = []
    for model, subject_name, method in itertools.product(
        models or experiment.models or common.models,
        subjects or experiment.subjects,
        experiment.methods,
    ):
        subject = known[subject_name]
        toy = f"{TOY}:{subject.toy}"
        pin = {"revision": common.revisions[model]} if model in common.revisions else {}
        base = {
            "run": merge(
                common.run,
                {
                    "model": {"name": model, **pin},
                    "data": {"train": toy if scale == TOY else subject.train},
                },
            ),
            "reading": merge(
                common.reading,
                {"records": toy, "metric": _TOY_METRICS[subject.toy]}
                if scale == TOY
                else {"tasks": subject.tasks, **subject.reading},
            ),
        }
        for point in _points(experiment):
            settings = _settle(base, experiment, method, point)
            if scale == TOY:
                for name in _OF_BENCHMARKS:
                    settings["reading"].pop(name, None)
            if "mt_bench" not in settings["reading"].get("tasks", ()):
                settings["reading"].pop("mt_bench", None)  # another subject's
            settings = _resolve_layers(settings, lambda model=model: count_layers(model))
            reading = build_section("reading", settings["reading"], Reading)
            if judge is not None and reading.is_judged:
                reading = replace(reading, judge={**judge})
            reading = replace(reading, whole=_name_whole(reading.tasks, data_dir))
            run = _make_run(settings["run"], method, data_dir)
            for seed in seeds or experiment.seeds or common.seeds:
                trials.append(
                    Trial(
                        model=model,
                        subject=subject_name,
                        method=method.name,
                        point=point,
                        seed=seed,
                        run=run if method.untuned else replace(run, settings=_seed(run, seed)),
                        reading=reading,
                    )
                )
    # The pretrained model has no seeds.
    return list(
        {
            (trial.label, trial.model, trial.subject, trial.run.key): trial for trial in trials
        }.values()
    )


_OF_BENCHMARKS = ("tasks", "protocol", "num_fewshot")
"""How a reading asks benchmarks, which invented records are not."""

_TOY_METRICS = {"choices": "choices", "numbers": "exact_match"}


def _points(experiment: Experiment) -> Iterator[dict[str, Any]]:
    """List the combinations of all axes that can be run."""
    names = [axis.name for axis in experiment.axes]
    options = [axis.setting.rpartition(".")[2] for axis in experiment.axes]
    for values in itertools.product(*(axis.values for axis in experiment.axes)):
        chosen = dict(zip(options, values, strict=True))
        k, top_k = chosen.get("late_layers"), chosen.get("top_k")
        if k is None or top_k is None or top_k <= k:
            yield dict(zip(names, values, strict=True))


def _settle(
    base: Mapping[str, Any], experiment: Experiment, method: Method, point: Mapping[str, Any]
) -> dict[str, Any]:
    """Lay experiment, method and point over the settings of scale and subject."""
    settings = merge(base, {"run": experiment.run, "reading": experiment.reading})
    settings = merge(settings, {"run": method.run, "reading": method.reading})
    for axis in experiment.axes:
        nested: Any = point[axis.name]
        for name in reversed(axis.setting.split(".")):
            nested = {name: nested}
        settings = merge(settings, nested)
    return settings


def _name_whole(tasks: Sequence[str], data_dir: str | None) -> tuple[str, ...] | None:
    """Name what benchmarks are read from where a local folder would hold a sample."""
    names = [DATA_SETS.get(task, task) for task in tasks]
    found = [name_whole(name, data_dir=data_dir) for name in names]
    return tuple(source for source in found if source is not None) or None


def _make_run(sections: Mapping[str, Any], method: Method, data_dir: str | None) -> Run:
    """Read a run's settings as `depthmix train` does; its seed follows."""
    if method.untuned:
        model = build_section("model", sections["model"], ModelSpec)
        return Run(
            settings={"model": sections["model"]}, untuned=True, model_sha256=_hash_model(model)
        )
    config = load_run_config(None, sections)
    settings = to_jsonable_python(asdict(config))
    del settings["training"]["output_dir"]
    train, split = config.data.train, config.data.split
    path = Path(train).expanduser()
    return Run(
        settings=settings,
        data_sha256=_hash_file(path) if path.is_file() else None,
        data_whole=name_whole(train, split, data_dir=data_dir) if is_named(train) else None,
        model_sha256=_hash_model(config.model),
    )


def _hash_model(section: ModelSpec) -> str | None:
    """Hash the files that make a local model and its adapter; None where both go by name."""
    base = find_base(section)
    places = [Path(name).expanduser() for name in (base.name, base.adapter) if name]
    files: list[Path] = []
    for place in places if base.name != TOY else ():
        if place.is_dir():
            files += sorted({file for name in MODEL_FILES for file in place.glob(name)})
        elif place.is_file() and place.suffix == ".gguf":
            files.append(place)
    contents = []
    for file in files:
        facts = file.stat()
        digest = _hash_unchanged(file, facts.st_size, facts.st_mtime_ns)
        contents.append((file.name, digest))
    return hashlib.sha256(repr(contents).encode()).hexdigest() if contents else None


@functools.cache
def _hash_unchanged(path: Path, _size: int, _changed: int) -> str:
    """Hash a file once, as long as it stays as it is: all runs of a command share a model."""
    return _hash_file(path)


def _hash_file(path: Path) -> str:
    """Hash what a file holds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seed(run: Run, seed: int) -> dict[str, Any]:
    """Set the training seed in a run's settings."""
    return merge(run.settings, {"training": {"seed": seed}})


def _resolve_layers(settings: Any, count_layers: Callable[[], int]) -> Any:
    """Number the layers that are counted from the final one, wherever they stand."""

    def resolve(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [resolve(part) for part in value]
        match = RELATIVE_LAYER.fullmatch(value) if isinstance(value, str) else None
        return value if match is None else count_layers() - int(match[1] or 0)

    if not isinstance(settings, Mapping):
        return settings
    return {
        name: resolve(value) if name in LAYER_OPTIONS else _resolve_layers(value, count_layers)
        for name, value in settings.items()
    }


def unique_runs(trials: Iterable[Trial]) -> dict[str, tuple[Run, tuple[Reading, ...]]]:
    """Gather trials by run: each run once, with every way in which it is read.

    Args:
        trials: Of one or more experiments.

    Returns:
        Runs and their readings by the run's key.
    """
    found: dict[str, tuple[Run, dict[tuple[str, tuple[int, ...]], Reading]]] = {}
    for trial in trials:
        _, readings = found.setdefault(trial.run.key, (trial.run, {}))
        readings.setdefault((trial.reading.key, trial.reading.speed), trial.reading)
    return {key: (run, tuple(readings.values())) for key, (run, readings) in found.items()}
