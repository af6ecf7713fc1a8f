"""A run and a way to read it, each known by the hash of what determines its result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic_core import to_jsonable_python

from depthmix.evaluation.names import JUDGED_METRICS, TASKS
from depthmix.method.config import Readout
from depthmix.options.types import suggest

TOY = "toy"
"""Model, and beginning of the data sets, that are made on the spot for a test of the machinery."""

MADE = "made"
"""Beginning of the data sets that are made on the spot for real experiments."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a finished run is evaluated."""

    tasks: tuple[str, ...] = ()
    """Named benchmarks."""

    records: str | None = None
    """Records instead that are made on the spot: `made:problems`, or `toy:` and a kind."""

    metric: str = "exact_match"
    """How these are judged."""

    protocol: str = "default"
    """How benchmarks are asked and judged."""

    layer: Readout = "ensemble"
    """Which depth answers."""

    top_k: int | None = None
    """Routes that are kept; `None` keeps what was trained."""

    limit: int | None = None
    """Items per task."""

    num_fewshot: int | None = None
    """Worked examples in the prompt; `None` takes each task's own number."""

    mt_bench: dict[str, Any] | None = None
    """How the model answers MT-Bench, as `evaluate` takes it; `None` takes the defaults."""

    whole: tuple[str, ...] | None = None
    """What benchmarks are read from, on the hub, where their files would hold a sample only."""

    judge: dict[str, Any] | None = None
    """What of the judge determines its ratings; set for judged benchmarks."""

    batch_size: int = 16
    """Sequences run together; changes no result that is reported."""

    speed: tuple[int, ...] = ()
    """Values of Top-K under which generation is timed, by turns."""

    def __post_init__(self) -> None:
        known = (*TASKS.get(self.protocol, ()), *JUDGED_METRICS)
        if self.protocol not in TASKS:
            raise ValueError(
                f"`reading.protocol` must be a known one, got {self.protocol!r}"
                f"{suggest(self.protocol, TASKS)}"
            )
        if unknown := [name for name in self.tasks if name not in known]:
            raise ValueError(
                f"`reading.tasks` must be benchmarks of the protocol {self.protocol}, and "
                f"{unknown[0]} is none{suggest(unknown[0], known)}"
            )
        if self.records is not None and not self.records.startswith((f"{TOY}:", f"{MADE}:")):
            raise ValueError(
                f"`reading.records` must be left out, since it is for records that are made on the "
                f"spot, got {self.records!r}; name benchmarks by `reading.tasks`."
            )

    @property
    def is_judged(self) -> bool:
        """Whether a judge rates answers."""
        return not JUDGED_METRICS.keys().isdisjoint(self.tasks)

    @property
    def key(self) -> str:
        """Name of the folder of its results: the same settings give the same name."""
        settings = asdict(self)
        return _hash(
            {
                name: value
                for name, value in settings.items()
                if name not in _NO_RESULT and not (name in _ONLY_IF_SET and value is None)
            }
        )


_NO_RESULT = ("batch_size", "speed")
_ONLY_IF_SET = ("num_fewshot", "mt_bench", "judge", "whole")
"""Settings that came later: where they are left out, earlier results keep their names."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One tuned model, or a pretrained one that is only read."""

    settings: Mapping[str, Any]
    """All sections of the run's settings, in JSON's types; without a place for its results."""

    untuned: bool = False
    """Whether nothing is trained."""

    data_sha256: str | None = None
    """Checksum of a file to train on; named data sets are pinned in the catalogue."""

    data_whole: str | None = None
    """What a named data set is read from, on the hub, where its files would hold a sample only."""

    model_sha256: str | None = None
    """Checksum of the files of a local model and its adapter; a model on the hub or in a package is
    known by its name."""

    @property
    def key(self) -> str:
        """Name of the run's folder: the same settings, data and model give the same name."""
        content = asdict(self)
        for name in ("model_sha256", "data_whole"):  # came later: runs without keep their names
            if content[name] is None:
                del content[name]
        return _hash(content)


def _hash(content: Mapping[str, Any]) -> str:
    """Hash settings, whatever their order."""
    text = json.dumps(to_jsonable_python(content), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
