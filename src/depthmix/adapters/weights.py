"""An adapter's weights as they come from a file: all of them, no others, and finite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from peft.tuners.tuners_utils import cast_adapter_dtype
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils.loading_report import LoadStateDictInfo

from depthmix.adapters.checkpoint import is_finite
from depthmix.adapters.files import MIXTURE
from depthmix.adapters.peft_type import MODE_LORA

PREFIX = "base_model.model."
"""What a name begins with in an adapter's file and in a `PeftModel`, and not in the model alone."""


def belongs_to(parameter_name: str, adapter_name: str) -> bool:
    """Tell whether a parameter of the model is part of an adapter.

    Args:
        parameter_name: Full name.
        adapter_name: Name of the adapter.
    """
    if MIXTURE in parameter_name:
        return f".lora_mode.{adapter_name}." in parameter_name
    return ".lora_" in parameter_name and adapter_name in parameter_name.split(".")[-2:]


def check_weights(model: nn.Module, adapter_name: str, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not an adapter's own.

    Args:
        model: A model with the adapter in place, wrapped by PEFT or not.
        adapter_name: Name of the adapter.
        weights: What a file gives, by the names in the model; `PREFIX` counts nothing.

    Raises:
        ValueError: If tensors are missing, surplus, of another shape than the adapter's settings
            give them on this model, or hold values that are NaN or infinite.
    """
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    known = {name.removeprefix(PREFIX) for name in model.state_dict()}
    own = {
        name.removeprefix(PREFIX): parameter
        for name, parameter in model.named_parameters()
        if belongs_to(name, adapter_name)
    }
    missing = [name for name in own if name not in weights]
    if missing:
        raise ValueError(
            f"The adapter file lacks {len(missing)} of the adapter's tensors (the first is "
            f"{missing[0]}); it is damaged or was made with other options: save it again."
        )
    # Of resized embeddings PEFT writes every tensor, also once more under the wrapper's own name.
    copies = {name.replace(f".{adapter_name}", "") for name in known if ".lora_" not in name}
    surplus = [name for name in weights if name not in known | copies]
    if surplus:
        raise ValueError(
            f"The adapter file holds {len(surplus)} tensors that its settings do not use on this "
            f"model (the first is {surplus[0]}), and they would be lost; load the file with the "
            "adapter_config.json and on the base model that it was made with."
        )
    for name, parameter in own.items():
        given, wanted = tuple(weights[name].shape), tuple(parameter.shape)
        if parameter.numel() and given != wanted:  # a weight that is gathered later is empty
            raise ValueError(
                f"The adapter file has {name} in the shape {given}, and its settings make that "
                f"{wanted} on this model; load the file with the adapter_config.json and on the "
                "base model that it was made with."
            )
    wrong = [name for name, tensor in weights.items() if not is_finite(tensor)]
    if wrong:
        raise ValueError(
            f"The adapter file holds NaN or infinite values in {len(wrong)} of its tensors (the "
            f"first is {wrong[0]}): its training diverged, or it is damaged; load an earlier "
            "checkpoint, or train it anew."
        )


def load_weights(
    model: Any,
    state_dict: dict[str, Tensor] | None,
    checkpoint_files: list[str] | None,
    load_config: Any,
    expected_keys: list[str] | None = None,
) -> tuple[LoadStateDictInfo, dict | None]:
    """Read an adapter's file in the place of transformers, for its `load_adapter`.

    transformers rounds LoRA weights to the base's dtype, tells of missing and surplus tensors in a
    report, renames the adapter's tensors as it does the base's, and loses weights that belong
    beside parts on disk. This reads a mixture's adapter as PEFT does, with the same checks.

    Args:
        model: A model into which the adapter was injected last.
        state_dict: The adapter's weights, or `None` to read them from files.
        checkpoint_files: The adapter's files.
        load_config: transformers' settings, for adapters of other kinds.
        expected_keys: The same.

    Returns:
        What transformers reports (here nothing), and an index of weights on disk (here none).

    Raises:
        ValueError: As by `check_weights`; the adapter is taken out again.
    """
    adapter_name, config = list(model.peft_config.items())[-1]
    if config.peft_type != MODE_LORA or is_deepspeed_zero3_enabled():
        return type(model)._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, expected_keys
        )
    try:
        if state_dict is None:
            state_dict = {}
            for file in checkpoint_files or []:
                # transformers names a safetensors file, also where there is none.
                path = Path(file)
                state_dict |= read_weights(path if path.is_file() else find_weights(path.parent))
        cast_adapter_dtype(model, adapter_name)
        set_peft_model_state_dict(model, state_dict, adapter_name=adapter_name)
    except Exception:
        model.delete_adapter(adapter_name)
        raise
    nothing: dict[str, Any] = {"error_msgs": [], "conversion_errors": {}}
    report = {field.name: nothing.get(field.name, set()) for field in fields(LoadStateDictInfo)}
    return LoadStateDictInfo(**report), None


def find_weights(directory: Path) -> Path:
    """Find the file that PEFT reads an adapter's weights from.

    Args:
        directory: Folder of an adapter.

    Returns:
        Its `adapter_model.safetensors`, unless only an `adapter_model.bin` is there.
    """
    file, pickled = directory / SAFETENSORS_WEIGHTS_NAME, directory / WEIGHTS_NAME
    return pickled if pickled.is_file() and not file.is_file() else file


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read an adapter's file in either form that PEFT knows.

    Args:
        file: `adapter_model.safetensors` or `adapter_model.bin`.

    Returns:
        The tensors, on the CPU.
    """
    if file.suffix == ".bin":
        return torch.load(file, map_location="cpu", weights_only=True)
    return load_file(file)
