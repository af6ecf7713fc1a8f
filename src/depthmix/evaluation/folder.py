"""The folder of an evaluation: what is finished there, and what must fit to go on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from depthmix.files.drafts import DRAFT_SUFFIX, write_whole
from depthmix.files.json import read_object

RESULTS_NAME = "results.json"
"""lm-eval's results, and ours under `depthmix`."""

SETTINGS_NAME = "evaluation.json"
"""What determines the results; written before the first one."""

PLACES = ("model", "adapter", "run")
"""Settings that only say where a model lies, while its weights are known by their hashes."""

OWN_FILES = ("results.json", "samples_*.jsonl", "*_answers.jsonl", "requests*")
"""What `overwrite` removes, and then it replaces the settings, which say whose all of it is. A
judge's answers stay: they are kept by content, and paid for."""

CACHE_NAME = "requests"
"""Beginning of the file in which lm-eval keeps every answered request."""

MERGED = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "n-samples")
MERGED += ("higher_is_better",)
"""Parts of lm-eval's results that have one entry per task."""


class EvaluationFolder:
    """One evaluation on disk, which grows task by task.

    A task that is finished is never run again, and within a task lm-eval's own cache keeps every
    answered request, so that an interrupted evaluation goes on where it stopped. Only the same
    model under the same settings may go on.

    Args:
        path: The folder, or where it is to be.
        settings: What determines the results, in JSON's types.
        overwrite: Begin anew where the settings differ.

    Raises:
        FileExistsError: If the folder holds an evaluation with other settings, or other files.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        if path.exists() and not path.is_dir():
            raise FileExistsError(
                f"`output` must be a folder, and {path} is a file; choose another place."
            )
        self.path = path
        self.settings = dict(settings)
        found = self._read(SETTINGS_NAME)
        differing = [] if found is None else self._compare(found)
        self._clears = bool(differing) and overwrite
        if differing and not overwrite:
            assert found is not None
            raise FileExistsError(
                f"`output` must be a new folder or one of the same evaluation, and {path} holds "
                f"one with another `{differing[0]}` ({found.get(differing[0])!r}, now "
                f"{self.settings.get(differing[0])!r}); pass `overwrite=True`, or another `output`."
            )
        others = [file for file in path.glob("*") if file.suffix != DRAFT_SUFFIX]
        if found is None and others:
            raise FileExistsError(
                f"`output` must be a new folder or one of the same evaluation, and {path} holds "
                "other files; choose another `output`."
            )
        kept = None if self._clears else self._read(RESULTS_NAME)
        self.results: dict[str, Any] = kept or {}

    def begin(self) -> None:
        """Make the folder, and say in it what is evaluated, once nothing more can be refused."""
        if self._clears:
            for file in (file for pattern in OWN_FILES for file in self.path.glob(pattern)):
                file.unlink()
            self._clears = False
        self.path.mkdir(parents=True, exist_ok=True)
        self._write(SETTINGS_NAME, self.settings)

    @property
    def cache(self) -> str:
        """Beginning of the path of lm-eval's cache."""
        return str(self.path / CACHE_NAME)

    def is_finished(self, task: str, data: Mapping[str, Any]) -> bool:
        """Tell whether a task has been evaluated on the same data."""
        return self.results.get("depthmix", {}).get("data", {}).get(task) == data

    def find_name(self, task: str, data: Mapping[str, Any]) -> str:
        """Name a task so that it replaces none that was evaluated on other data.

        Args:
            task: Its name, which it keeps in a folder that has no other such task.
            data: Its data, with `source` and `sha256`.

        Returns:
            The name, with that of the source where the first is taken, and with a part of the hash
            of all of `data` where that is, too.
        """
        stem = re.sub(r"[^\w.-]+", "_", Path(data["source"]).stem)
        digest = hashlib.sha256(json.dumps(dict(data), sort_keys=True).encode()).hexdigest()
        known = self.results.get("depthmix", {}).get("data", {})
        names = (task, f"{task}_{stem}", f"{task}_{stem}_{digest[:8]}")
        same = [name for name in names if known.get(name) == data]
        return (same or [name for name in names if name not in known])[0]

    def add(self, task: str, outcome: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Keep a finished task.

        Args:
            task: The named set.
            outcome: What `lm_eval.evaluate` returned for it.
            facts: What we say of it: by task `data`, `main_metric`, `intervals` and, if it is not
                1, `highest_score`; `packages` and `seconds`.
        """
        for name, samples in outcome.get("samples", {}).items():
            lines = [json.dumps(s, ensure_ascii=False, default=str) + "\n" for s in samples]
            write_whole(self.path / f"samples_{name}.jsonl", "".join(lines))
        for key, value in outcome.items():
            if key in MERGED:
                self.results[key] = {**self.results.get(key, {}), **value}
            elif key != "samples":
                self.results[key] = value
        ours = {**self.settings, **self.results.get("depthmix", {})}
        for key in ("data", "main_metric", "highest_score", "intervals"):
            ours[key] = {**ours.get(key, {}), **facts[key]}
        ours["packages"] = facts["packages"]
        ours["seconds"] = ours.get("seconds", 0.0) + facts["seconds"]
        self.results["depthmix"] = ours
        self._write(RESULTS_NAME, self.results)
        self.results = self._read(RESULTS_NAME) or {}  # in JSON's types, as a later call sees them

    def _compare(self, found: Mapping[str, Any]) -> list[str]:
        """Name the settings that differ and matter."""
        known = None not in (found.get("weights"), self.settings.get("weights"))
        # One on the hub that could not be reached then, or cannot now, is known by its name.
        ignored = PLACES if known else ("adapter", "run", "weights")
        names = sorted({*found, *self.settings} - set(ignored))
        return [name for name in names if found.get(name) != self.settings.get(name)]

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        if not path.is_file():
            return None
        return read_object(path, way_out="remove the folder to evaluate again, or copy it again")

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n"
        write_whole(self.path / name, text)
