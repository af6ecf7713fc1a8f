"""Save and load a model whose mixture was attached without PEFT."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from depthmix.attachment import attach, find_mixture_norm
from depthmix.config import MixtureConfig
from depthmix.mixture_norm import MoDENorm

MIXTURE_CONFIG_NAME = "mixture_config.json"
"""File of the mixture's options, beside the model's own `config.json`."""

MIXTURE_WEIGHTS_NAME = "mixture.safetensors"
"""File of the mixture's norms and router."""


def save(model: PreTrainedModel, directory: Path | str) -> None:
    """Save a model with an attached mixture, such as a fully tuned or a merged one.

    The folder holds an ordinary Hugging Face model, weights under their ordinary names, and two
    files for the mixture. `load` brings both together; `AutoModelForCausalLM` sees the model alone.

    Args:
        model: A model with a mixture from `attach` or from PEFT's `merge_and_unload`.
        directory: Folder to write to; made if missing.

    Raises:
        RuntimeError: If the model has no attached mixture.
    """
    norm = find_mixture_norm(model)
    if not isinstance(norm, MoDENorm):
        raise RuntimeError(
            "`model` has no attached mixture to save; use `model.save_pretrained` for a plain "
            "model or a PEFT adapter."
        )
    directory = Path(directory)
    name = norm.backbone.final_norm_name
    model.set_submodule(name, norm.base_layer)
    try:
        model.save_pretrained(directory)
    finally:
        model.set_submodule(name, norm)
    weights = {key: value.contiguous() for key, value in norm.mixture.state_dict().items()}
    save_file(weights, directory / MIXTURE_WEIGHTS_NAME)
    options = {
        field.name: getattr(norm.mixture.config, field.name) for field in fields(MixtureConfig)
    }
    options["late_layers"] = list(norm.mixture.late_layers)
    path = directory / MIXTURE_CONFIG_NAME
    path.write_text(json.dumps(options, indent=2) + "\n", "utf-8")


def load(directory: Path | str, **model_options: Any) -> PreTrainedModel:
    """Load what `save` has saved.

    Args:
        directory: The folder.
        model_options: Passed to `AutoModelForCausalLM.from_pretrained`, such as `dtype`.

    Returns:
        The model with its mixture.

    Raises:
        FileNotFoundError: If the folder holds no mixture.
        ValueError: If the mixture's files are damaged or do not fit the model.
    """
    directory = Path(directory)
    for path in (directory / MIXTURE_CONFIG_NAME, directory / MIXTURE_WEIGHTS_NAME):
        if not path.is_file():
            raise FileNotFoundError(
                f"`directory` must hold a model that `depthmix.save` has written, and there is no "
                f"{path}; load a PEFT adapter with `AutoPeftModelForCausalLM`."
            )
    try:
        options = json.loads((directory / MIXTURE_CONFIG_NAME).read_text("utf-8"))
        weights = load_file(directory / MIXTURE_WEIGHTS_NAME)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(
            f"The mixture in {directory} is damaged ({error}); save it again."
        ) from error
    model = AutoModelForCausalLM.from_pretrained(directory, **model_options)
    norm = attach(model, MixtureConfig(**options))
    try:
        norm.mixture.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"The mixture in {directory} does not fit its model ({' '.join(str(error).split())}); "
            "save both together again."
        ) from error
    return model
