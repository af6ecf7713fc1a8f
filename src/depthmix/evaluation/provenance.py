"""Where a model's numbers come from: the model, the method that tuned it, the seed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers.utils import extract_commit_hash, find_adapter_config_file

from depthmix.adapters.weights import find_weights
from depthmix.files.json import read_object
from depthmix.files.runs import RESULTS_NAME, RUN_CONFIG_NAME, read_run_settings
from depthmix.models.loading import find_mixture
from depthmix.models.sources import check_adapter, find_base, find_config, resolve_model
from depthmix.models.spec import ModelSpec

UNTUNED = "pretrained"
"""Label of a model without an adapter."""

ATTACHED = "MoDE"
"""Label of a model that was saved with an attached mixture."""

DEFAULT_SEED = 42
"""Training seed of runs that set none: transformers' own."""

DEFAULT_BATCH = 8
"""Sequences of a pass in runs that set none: transformers' own."""

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")


def describe_model(spec: ModelSpec) -> dict[str, Any]:
    """Say what an evaluation measures, in JSON's types.

    Args:
        spec: The model; its `name` may be the folder of an adapter or of a run.

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
    return facts | describe_adapter(Path(base.adapter).expanduser())


def describe_adapter(folder: Path) -> dict[str, Any]:
    """Say what tuned a model, without the model, which may be gone.

    Args:
        folder: Of an adapter, such as a run's.

    Returns:
        `adapter_sha256` and `method`; of a run also `model`, `seed` and `settings`. All as
        `describe_model` has them.

    Raises:
        ValueError: If the adapter or the run's results are damaged.
    """
    adapter = check_adapter(folder)
    with find_weights(folder).open("rb") as weights:
        facts = {"adapter_sha256": hashlib.file_digest(weights, "sha256").hexdigest()}
    if not (folder / RUN_CONFIG_NAME).is_file():
        return facts | {"method": name_method(adapter, {})}
    run = read_run_settings(folder / RUN_CONFIG_NAME)
    return facts | {
        "method": name_method(adapter, run),
        "model": run["model"]["name"],
        "seed": run.get("training", {}).get("seed", DEFAULT_SEED),
        "settings": _hash_settings(run, count_devices(folder)),
    }


def name_method(adapter: dict[str, Any], run: dict[str, Any]) -> str:
    """Name a tuning method as the paper does.

    Args:
        adapter: The adapter's settings.
        run: The run's settings; empty if it has none.

    Returns:
        `LoRA_all`, `LoRA_¬K + MoDE`, … or the PEFT type where the layers are not known.
    """
    kind, has_mixture = adapter["peft_type"], adapter["peft_type"] == "MODE_LORA"
    if kind not in ("LORA", "MODE_LORA"):
        return kind
    where = adapter.get("adapt") if has_mixture else run.get("mode", {}).get("adapt", "below")
    base = "DoRA" if adapter.get("use_dora") else "LoRA"
    layers = {"all": "_all", "below": "_¬K"}[where or "below"] if has_mixture or run else ""
    return f"{base}{layers} + MoDE" if has_mixture else f"{base}{layers}"


def count_devices(folder: Path) -> int:
    """Count the devices among which a run's batches were divided.

    Args:
        folder: Of the run.

    Returns:
        Their number, one where nothing is said.

    Raises:
        ValueError: If the run's results are damaged.
    """
    path = folder / RESULTS_NAME
    if not path.is_file():
        return 1
    results = read_object(path, way_out="finish the run again, or copy the file again")
    return results.get("num_devices", 1)


def join_batch(training: dict[str, Any], num_devices: int) -> dict[str, Any]:
    """Write a batch as a whole, however it is divided into passes and among devices.

    Args:
        training: Settings of a training, in transformers' names.
        num_devices: Devices that each take the batch of these settings.

    Returns:
        The settings of the same training by one device, in one pass per step.
    """
    batch, steps = "per_device_train_batch_size", "gradient_accumulation_steps"
    if batch not in training and steps not in training and num_devices == 1:
        return training
    whole = training.get(batch, DEFAULT_BATCH) * training.get(steps, 1) * num_devices
    return {**training, batch: whole, steps: 1}


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


def _hash_settings(run: dict[str, Any], num_devices: int) -> str:
    """Hash what determines a run, but for its seed and its place."""
    training = {
        name: value
        for name, value in join_batch(run.get("training", {}), num_devices).items()
        if name not in ("seed", "output_dir")
    }
    text = json.dumps({**run, "training": training, "evaluation": None}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
