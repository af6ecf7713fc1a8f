"""Exits put on a finished model by its name, asked as it was trained, and saved beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from depthmix.adapters.exit_files import EXITS_NAME, SETTINGS_NAME, save_exits
from depthmix.data.spec import DataSpec
from depthmix.depth.exit_choice import CONFIDENCE, candidate_layers, choose_exits, cost_of_exits
from depthmix.depth.exit_readings import ExitReadings, read_exits
from depthmix.depth.exit_training import train_exits
from depthmix.files.drafts import taking_room
from depthmix.files.settings import read_value
from depthmix.files.versions import list_versions
from depthmix.method.parts import find_parts
from depthmix.method.placement import to_accelerator
from depthmix.models.exit_records import gather_records
from depthmix.models.loading import load_model
from depthmix.models.sources import find_base
from depthmix.models.spec import ModelSpec, to_spec

REPORTED_PACKAGES = ("torch", "transformers", "peft")
"""Packages whose versions are kept beside exits."""


@dataclass(frozen=True, kw_only=True)
class ExitReading:
    """What one exit predicts on held-out tokens."""

    layer: int
    """Number of its layer."""

    agreement: float
    """Share of tokens whose likeliest is the model's own, 0 to 1."""

    confident: float
    """Share of tokens on which the exit is sure: its likeliest has p ≥ 0.8."""

    confident_agreement: float | None
    """Agreement on those; `None` where there are none."""


@dataclass(frozen=True, kw_only=True)
class AddedExits:
    """Exits that were put on a model; `str` makes a printable table."""

    folder: Path
    """Where they lie."""

    layers: tuple[int, ...]
    """Layers of the exits that are kept."""

    readings: tuple[ExitReading, ...]
    """What each exit that was trained predicts on held-out records."""

    expected_layers: float
    """What a token costs with them, in layers, by `cost_of_exits`."""

    num_hidden_layers: int
    """What it costs without."""

    num_tokens: int
    """Held-out tokens that were read."""

    seconds: float
    """Wall time of training, without loading and reading."""

    def __str__(self) -> str:
        lines = [f"{'exit':<6}{'agreement, %':>16}{'confident, %':>16}{'agreement there, %':>22}"]
        for one in self.readings:
            there = one.confident_agreement
            shown = "-" if there is None else f"{100 * there:.1f}"
            mark = "" if one.layer in self.layers else "  (left out)"
            lines.append(
                f"{one.layer:<6}{100 * one.agreement:>16.1f}{100 * one.confident:>16.1f}"
                f"{shown:>22}{mark}"
            )
        lines.append(
            f"With the model's own prediction, on {self.num_tokens:,} held-out tokens; confident "
            f"is p ≥ {CONFIDENCE:g}."
        )
        lines.append(
            f"Exits at {', '.join(map(str, self.layers))}: about {self.expected_layers:.1f} of "
            f"{self.num_hidden_layers} layers a token, trained in {self.seconds:.0f} s."
        )
        return "\n".join(lines)


def add_exits(
    model: str | Path | ModelSpec,
    data: DataSpec | str,
    *,
    output: str | Path | None = None,
    layers: Sequence[int] | str | None = None,
    rank: int = 64,
    num_steps: int = 60,
    max_length: int | None = 1024,
    seed: int = 0,
    overwrite: bool = False,
    **training: Any,
) -> AddedExits:
    """Put exits on a finished model, which stays as it is: `add_exits("runs/arc", "train.jsonl")`.

    Records become tokens as in the run's own training. Exits are trained at `layers`, or at
    `candidate_layers` of which `choose_exits` keeps those that bring most for their depth on
    records that were held out.

    Args:
        model: A model as `load_model` takes it: a run, an adapter, a model, merged or not.
        data: Records to learn from: a file or a data set as `data.train` takes it, or a spec. Its
            `eval` is held out, and without one the last records of `train`. A template other than
            `auto` stands for the run's own.
        output: Folder for the exits; by default `exits/` in that of the run or the model.
        layers: Numbers of layers, increasing, as text with commas between them; by default those
            are chosen that bring most for their depth.
        rank: Rank of each exit's translator; 0 trains norms alone.
        num_steps: Steps of training.
        max_length: Tokens per record that are run, from its start.
        seed: Of training, and of which held-out tokens are read.
        overwrite: Replace exits that lie there already; a plan of theirs goes, too.
        training: Further options of `train_exits`: `batch_size`, `learning_rate`, `distillation`,
            `num_negatives`, `on_step`.

    Returns:
        Where they lie, and what they predict on held-out records.

    Raises:
        ValueError: If an option or a record does not fit.
        FileExistsError: If there are exits already.
        OSError: If the model or the records cannot be found, or the folder cannot be written.
    """
    spec = to_spec(model)
    section = data if isinstance(data, DataSpec) else DataSpec(train=data)
    wanted = None if layers is None else _read_layers(layers)
    folder = _find_folder(spec, output)
    if (folder / SETTINGS_NAME).is_file() and not overwrite:
        raise FileExistsError(
            f"`output` must hold no exits yet, and {folder} does; put others in their place with "
            "`overwrite=True`, or choose another folder."
        )
    with _made(folder), taking_room(folder, "output", then="put the exits on again"):
        records = gather_records(spec, section, max_length=max_length, seed=seed)
        loaded = to_accelerator(load_model(spec))
        backbone, _ = find_parts(loaded)
        tried = wanted or candidate_layers(backbone.num_hidden_layers)
        begun = time.monotonic()
        exits = train_exits(
            loaded,
            records.learnt,
            layers=tried,
            rank=rank,
            num_steps=num_steps,
            seed=seed,
            **training,
        )
        seconds = time.monotonic() - begun
        readings = read_exits(loaded, exits, records.held_out)
        depth = backbone.num_hidden_layers
        kept = wanted or choose_exits(readings, num_hidden_layers=depth).layers
        cost = cost_of_exits(readings, kept, num_hidden_layers=depth)
        added = AddedExits(
            folder=folder,
            layers=kept,
            readings=_summarise(readings),
            expected_layers=float(cost.double().mean()),
            num_hidden_layers=depth,
            num_tokens=len(readings.agreements),
            seconds=seconds,
        )
        training.pop("on_step", None)
        save_exits(
            exits.only(kept),
            folder,
            model=find_base(spec).adapter or spec.name,
            data=asdict(section),
            training={"num_steps": num_steps, "max_length": max_length, "seed": seed} | training,
            readings=[asdict(reading) for reading in added.readings],
            versions=list_versions(REPORTED_PACKAGES),
        )
    return added


def _read_layers(layers: Sequence[int] | str) -> tuple[int, ...]:
    """Read numbers of layers, which are checked where the model is known."""
    try:
        numbers = tuple(read_value(layers, list[int]))
    except ValueError as error:
        raise ValueError(
            f"`layers` must be numbers with commas between them, got {layers!r}; leave it out to "
            "have them chosen."
        ) from error
    if not numbers:
        raise ValueError("`layers` must name a layer, got none; leave it out to have them chosen.")
    return numbers


def _find_folder(spec: ModelSpec, output: str | Path | None) -> Path:
    """Say where a model's exits are to lie."""
    if output is not None:
        return Path(output).expanduser()
    beside = Path(find_base(spec).adapter or spec.name).expanduser()
    if not beside.is_dir():
        raise ValueError(
            f"`output` must name a folder for the exits of {spec.name}, which is no folder itself; "
            "name one."
        )
    return beside / EXITS_NAME


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder before the work is done that goes into it; leave none if that fails."""
    missing = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if missing:
            with suppress(OSError):  # what is in it stays
                folder.rmdir()
        raise


def _summarise(readings: ExitReadings) -> tuple[ExitReading, ...]:
    """Turn what exits predict on tokens into shares of them."""
    found = []
    for place, layer in enumerate(readings.layers):
        agreements = readings.agreements[:, place].double()
        sure = readings.confidences[:, place] >= CONFIDENCE
        found.append(
            ExitReading(
                layer=layer,
                agreement=float(agreements.mean()),
                confident=float(sure.double().mean()),
                confident_agreement=float(agreements[sure].mean()) if sure.any() else None,
            )
        )
    return tuple(found)
