"""Where a model's numbers come from: the model, the method that tuned it, the seed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from transformers.utils import extract_commit_hash, find_adapter_config_file

from depthmix.evaluation.identity import UNTUNED, describe_tuning
from depthmix.files.runs import RUN_CONFIG_NAME, read_run_settings
from depthmix.models.loading import find_mixture
from depthmix.models.saved_adapters import check_adapter
from depthmix.models.sources import find_base, find_config, resolve_model
from depthmix.models.spec import ModelSpec

ATTACHED = "MoDE"
"""Label of a model that was saved with an attached mixture."""

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")


def describe_model(spec: ModelSpec, *, num_devices: int | None = None) -> dict[str, Any]:
    """Say what an evaluation measures, in JSON's types.

    Args:
        spec: The model; its `name` may be the folder of an adapter or of a run.
        num_devices: As for `describe_tuning`, of a run that has no results yet.

    Returns:
        `model` (the base model's name), `revision`, `weights` (hash that changes with a local
        model's files, start of the commit of one on the hub, or None), `adapter` (folder, or None),
        `adapter_sha256` (of its weights), `method` (label such as `LoRA_¬K + MoDE`), `settings`
        (hash of the run's settings without seed and place, and with the batch of all devices as a
        whole, or None: runs that share it are seeds of one experiment), `run` (name of the folder),
        `seed` (of training; 0 without one), `dtype` and `top_k`.

    Raises:
        ValueError: If the adapter or the run's results are damaged, or `name` is an adapter on the
            hub, whose weights have no hash here.
    """
    base = find_base(spec)
    facts: dict[str, Any] = {
        "model": base.name,
        "revision": base.revision,
        "weights": _identify_weights(base),
        "adapter": base.adapter,
        "adapter_sha256": None,
        "method": UNTUNED if find_mixture(base) is None else ATTACHED,
        "settings": None,
        "run": Path(base.adapter or base.name).name,
        "seed": 0,
        "dtype": spec.dtype,
        "top_k": spec.top_k,
    }
    if base.adapter is None:
        return facts
    return facts | describe_adapter(Path(base.adapter).expanduser(), num_devices=num_devices)


def describe_adapter(folder: Path, *, num_devices: int | None = None) -> dict[str, Any]:
    """Say what tuned a model, without the model, which may be gone.

    Args:
        folder: Of an adapter, such as a run's.
        num_devices: As for `describe_tuning`.

    Returns:
        `adapter_sha256` and `method`; of a run also `model`, `seed` and `settings`. All as
        `describe_model` has them.

    Raises:
        ValueError: If the adapter or the run's results are damaged.
    """
    check_adapter(folder)
    path = folder / RUN_CONFIG_NAME
    settings = read_run_settings(path) if path.is_file() else {}
    return describe_tuning(folder, settings, num_devices=num_devices)


def _identify_weights(base: ModelSpec) -> str | None:
    """Hash the names, sizes and times of a local model's weight files, or find a hub's commit."""
    source = resolve_model(base.name)
    if not source.is_local:
        return _find_commit(base)
    folder = Path(source.directory_or_id)
    files = sorted(path for pattern in WEIGHT_FILES for path in folder.glob(pattern))
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:12]


def _find_commit(base: ModelSpec) -> str | None:
    """Find the commit of a model on the hub, or in its cache; None if neither can be reached."""
    revision = base.revision or "main"
    if find_adapter_config_file(base.name, revision=revision) is not None:
        raise ValueError(
            f"`model.name` must be a model or a local adapter, and {base.name} is an adapter on "
            "the hub; fetch it with `hf download` and pass its folder."
        )
    path = find_config(base)
    commit = None if path is None else extract_commit_hash(str(path), None)
    return None if commit is None else commit[:12]
