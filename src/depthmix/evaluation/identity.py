"""What tuned a model, as its folder says, without loading anything: method, seed, settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from depthmix.files.json import read_object
from depthmix.files.runs import RESULTS_NAME

UNTUNED = "pretrained"
"""Label of a model without an adapter."""

DEFAULT_SEED = 42
"""Training seed of runs that set none: transformers' own."""

DEFAULT_BATCH = 8
"""Sequences of a pass in runs that set none: transformers' own."""

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""Files that hold an adapter's weights; the first that there is does."""


def describe_tuning(
    folder: Path, run: Mapping[str, Any], *, num_devices: int | None = None
) -> dict[str, Any]:
    """Say what tuned a model, from its adapter's files as they are.

    Args:
        folder: Of an adapter, such as a run's.
        run: The run's settings; empty if it has none.
        num_devices: Devices among which the run's batches were divided; `None` reads them from its
            results.

    Returns:
        `adapter_sha256` and `method`; of a run also `model`, `seed` and `settings`. All as
        `describe_model` has them.

    Raises:
        ValueError: If the run's settings or results are damaged.
        OSError: If there is no adapter.
    """
    way_out = "copy the adapter again, or train it anew"
    adapter = read_object(folder / "adapter_config.json", way_out=way_out)
    weights = next((folder / n for n in WEIGHTS if (folder / n).is_file()), folder / WEIGHTS[0])
    with weights.open("rb") as file:
        facts = {"adapter_sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    if not run:
        return facts | {"method": name_method(adapter, {})}
    return facts | {
        "method": name_method(adapter, run),
        "model": run["model"]["name"],
        "seed": run.get("training", {}).get("seed", DEFAULT_SEED),
        "settings": _hash_settings(run, num_devices or count_devices(folder)),
    }


def name_method(adapter: Mapping[str, Any], run: Mapping[str, Any]) -> str:
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


def _hash_settings(run: Mapping[str, Any], num_devices: int) -> str:
    """Hash what determines a run, but for its seed and its place."""
    training = {
        name: value
        for name, value in join_batch(run.get("training", {}), num_devices).items()
        if name not in ("seed", "output_dir")
    }
    text = json.dumps({**run, "training": training, "evaluation": None}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
