"""One run's settings: from a file and the command line to checked sections, and back to a file."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic_core import to_jsonable_python

from depthmix.data.spec import DataSpec, EvaluationSpec
from depthmix.files.drafts import write_whole
from depthmix.files.json import parse
from depthmix.files.runs import RUN_CONFIG_NAME
from depthmix.files.settings import (
    build_section,
    read_declared,
    read_options,
    underscored,
)
from depthmix.method.presets import PRESETS
from depthmix.models.spec import ModelSpec
from depthmix.options.secrets import without_secrets
from depthmix.options.types import checked_options, suggest
from depthmix.training.numbers import check_training

PAPER_BATCH_SIZE = 16
"""Sequences per optimizer step in the paper, and in the fast recipe."""

PAPER_TRAINING: dict[str, Any] = {
    "learning_rate": 3e-4,
    "num_train_epochs": 2.0,
    "warmup_steps": 100.0,
    "max_length": 256,
    "per_device_train_batch_size": PAPER_BATCH_SIZE,
    "gradient_accumulation_steps": 1,
}
"""The paper's training settings, as keyword arguments of `trl.SFTConfig` and in its types: written
out, they are the same run."""

FAST_TRAINING: dict[str, Any] = {
    "learning_rate": 1e-3,
    "num_train_epochs": 1.0,
    "warmup_steps": 0.04,
    "per_device_train_batch_size": PAPER_BATCH_SIZE,
    "gradient_accumulation_steps": 1,
}
"""Training settings of the fast recipe: one pass over the records, with a warm-up of 4 %."""

PRESET_TRAINING = {"paper": PAPER_TRAINING, "fast": FAST_TRAINING}
"""Training settings by the preset's name."""

SCALARS = ("method", "preset")
"""Options that stand outside the sections."""

PATH_KEYS = (
    ("model", "name"),
    ("model", "adapter"),
    ("data", "train"),
    ("data", "eval"),
    ("data", "without"),
    ("training", "chat_template_path"),
    ("evaluation", "data"),
)
"""Settings that may name a file or folder beside the configuration file."""


@checked_options
@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that determines a run."""

    model: ModelSpec

    data: DataSpec

    method: Literal["mode", "lora"] = "mode"
    """`lora` trains the same adapters without the mixture: the baseline."""

    preset: Literal["paper", "fast"] | None = None
    """`paper`: `load_run_config` takes the paper's settings where nothing says otherwise. `fast`:
    likewise, LoRA on all linear maps, without a mixture; and when the run is finished, exits are
    put on it and calibrated on records that it has not seen, so that it generates fast."""

    mode: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of `depthmix.MoDEConfig`, which has all of PEFT's `LoraConfig`."""

    training: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of `trl.SFTConfig`."""

    evaluation: EvaluationSpec | None = None

    def __post_init__(self) -> None:
        check_training(self.training)


def load_run_config(
    path: Path | None = None,
    overrides: Mapping[str, Mapping[str, Any] | str | None] | None = None,
) -> RunConfig:
    """Read a run's settings from a file, with overrides on top and a preset's defaults below.

    Args:
        path: TOML, YAML or JSON file, or a saved `run_config.json`; `None` for overrides alone.
            Relative paths in it are looked up beside it first, then in the working directory.
        overrides: Sections by name, and `method` and `preset`. Values may be text, as on a command
            line: they are read by the type of the option. Hyphens in names equal underscores.

    Returns:
        The settings with every value in its option's type, and `training.output_dir` set.

    Raises:
        ValueError: If the file cannot be parsed, or an option is unknown, missing or of the
            wrong type.
        OSError: If the file cannot be read.
    """
    given = _read_file(path) if path is not None else {}
    for name, value in _normalise(overrides or {}).items():
        if isinstance(value, Mapping) and isinstance(given.get(name), Mapping):
            given[name] = given[name] | value
        elif value is not None:
            given[name] = value

    names = [option.name for option in fields(RunConfig)]
    for name, value in given.items():
        if name not in names:
            raise ValueError(f"`{name}` is not a section of a run{suggest(name, names)}")
        if name not in SCALARS and not isinstance(value, Mapping):
            raise ValueError(f"`{name}` must be a section that holds options, got {value!r}.")

    scalars = read_options(None, {k: given[k] for k in SCALARS if k in given}, RunConfig)
    if scalars.get("preset") == "fast":
        scalars.setdefault("method", "lora")
    model = build_section("model", given.get("model", {}), ModelSpec)
    data = build_section("data", given.get("data", {}), DataSpec)
    evaluation = None
    if given.get("evaluation"):
        evaluation = build_section("evaluation", given["evaluation"], EvaluationSpec)
    # Last, since these options may take seconds to import.
    mode, training = _read_pass_through(given, scalars.get("preset"))
    stem = path.stem if path is not None else scalars.get("method", "mode")
    training.setdefault("output_dir", f"runs/{stem}")
    return RunConfig(
        model=model,
        data=data,
        mode=mode,
        training=training,
        evaluation=evaluation,
        **scalars,
    )


def save_run_config(config: RunConfig, directory: Path) -> Path:
    """Write the settings where `load_run_config` accepts them again.

    Args:
        config: The settings of a run.
        directory: Folder of the run's results; made if missing.

    Returns:
        The written file, `run_config.json` in the folder.
    """
    directory.mkdir(parents=True, exist_ok=True)
    content = json.dumps(to_settings(config), indent=2) + "\n"
    return write_whole(directory / RUN_CONFIG_NAME, content)


def to_settings(config: RunConfig) -> dict[str, Any]:
    """Write a run's settings in JSON's types, as files beside its results may hold them.

    Args:
        config: The settings of a run.

    Returns:
        All of them but tokens, keys and passwords, which are given again to go on.
    """
    return without_secrets(to_jsonable_python(asdict(config)))


def _read_pass_through(
    given: Mapping[str, Any], preset: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the sections whose options belong to PEFT and TRL."""
    mode, training = dict(given.get("mode", {})), dict(given.get("training", {}))
    mode = read_declared("mode", mode, "depthmix.adapters.config", "MoDEConfig")
    training = read_declared("training", training, "trl.trainer.sft_config", "SFTConfig")
    if preset is None:
        return mode, training
    return PRESETS[preset] | mode, _fill_training(PRESET_TRAINING[preset], training)


def _fill_training(defaults: dict[str, Any], training: dict[str, Any]) -> dict[str, Any]:
    """Add a preset's training settings, and keep its batch where only a part of it is given."""
    batch = training.get("per_device_train_batch_size")
    steps = training.get("gradient_accumulation_steps")
    filled = defaults | training
    known = batch or steps
    if known is None or (batch and steps):
        return filled
    if PAPER_BATCH_SIZE % known:
        raise ValueError(
            "`training.per_device_train_batch_size` and `training.gradient_accumulation_steps` "
            f"must multiply to the preset's batch of {PAPER_BATCH_SIZE} sequences, got {known} for "
            "one of them; set both to use another batch."
        )
    missing = "gradient_accumulation_steps" if batch else "per_device_train_batch_size"
    return filled | {missing: PAPER_BATCH_SIZE // known}


def _normalise(given: Mapping[str, Any]) -> dict[str, Any]:
    """Write the names of sections and options with underscores."""
    return {
        name: underscored(value) if isinstance(value, Mapping) else value
        for name, value in underscored(given).items()
    }


def _read_file(path: Path) -> dict[str, Any]:
    """Read a configuration file by its suffix."""
    parsers = {
        ".toml": tomllib.loads,
        ".yaml": _parse_yaml,
        ".yml": _parse_yaml,
        ".json": parse,
    }
    if path.suffix not in parsers:
        raise ValueError(
            f"`config` must be a TOML, YAML or JSON file, known by its ending, got {path}."
        )
    if not path.is_file():
        raise FileNotFoundError(f"`config` must be an existing file, and there is none at {path}.")
    try:
        given = parsers[path.suffix](path.read_text("utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"`config` cannot be read: {path} is damaged ({reason}).") from error
    if not isinstance(given, Mapping):
        raise ValueError(
            f"`config` must hold named sections, got {type(given).__name__} in {path}."
        )
    given = _normalise({name: value for name, value in given.items() if value is not None})
    for section, option in PATH_KEYS:
        named = given[section].get(option) if isinstance(given.get(section), dict) else None
        if isinstance(named, list):
            given[section][option] = [_find_beside(path, name, section) for name in named]
        elif named is not None:
            given[section][option] = _find_beside(path, named, section)
    return given


class _UniqueLoader(yaml.SafeLoader):
    """Refuses two values of one name, of which YAML's own loader keeps the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Read a mapping in which every name stands once."""
        names = [self.construct_object(name, deep=True) for name, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the name {name!r} stands twice in one section")
        return super().construct_mapping(node, deep=deep)


def _parse_yaml(text: str) -> Any:
    """Read YAML in which every name stands once."""
    return yaml.load(text, _UniqueLoader)


def _find_beside(path: Path, name: Any, section: str) -> Any:
    """Give the path of what lies beside the configuration file; any other value stays."""
    if not isinstance(name, str) or not name:
        return name
    beside = path.parent / name
    # A folder may be a model; beside a named data set it only has the same name.
    found = beside.is_file() or (section in ("model", "training") and beside.is_dir())
    return str(beside) if found else name
