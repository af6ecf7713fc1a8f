"""Load a model whose mixture was attached without PEFT."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from depthmix.attachment import CONFIG_FIELD, attach
from depthmix.config import MixtureConfig

ROUTER = ".mixture.router.weight"
"""End of the name of a weight that every mixture has."""


def load(directory: Path | str, **model_options: Any) -> PreTrainedModel:
    """Load a model with its mixture, such as a fully tuned or a merged one.

    The folder is what `save_pretrained` or a trainer's checkpoint makes of a model with a mixture
    from `attach` or from PEFT's `merge_and_unload`: an ordinary Hugging Face model, whose
    `config.json` holds the mixture's options and whose weights have the mixture's beside them.
    `AutoModelForCausalLM` sees the model alone.

    Args:
        directory: The folder.
        model_options: Passed to `AutoModelForCausalLM.from_pretrained`, such as `dtype`.

    Returns:
        The model with its mixture.

    Raises:
        FileNotFoundError: If the folder holds no mixture.
        ValueError: If a file is damaged, or weights are missing or do not fit.
    """
    directory = Path(directory)
    options = read_mixture_options(directory)
    if options is None:
        raise FileNotFoundError(
            f"`directory` must hold a model that was saved with a mixture, and {directory} holds "
            "none; load a PEFT adapter with `AutoPeftModelForCausalLM`."
        )
    with _without_report():
        model, info = AutoModelForCausalLM.from_pretrained(
            directory, output_loading_info=True, **model_options
        )
    norm = attach(model, MixtureConfig(**options))
    prefix = f"{norm.backbone.final_norm_name}.mixture."
    unknown = [name for name in info["unexpected_keys"] if not name.startswith(prefix)]
    if unknown:
        warnings.warn(
            f"{directory} holds weights that the model does not have: {', '.join(unknown)}.",
            stacklevel=2,
        )
    places = {n: p for n, p in _list_weights(directory).items() if n.startswith(prefix)}
    weights = {name.removeprefix(prefix): _read_weight(p, name) for name, p in places.items()}
    lost = [*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]
    lost += [prefix + name for name in norm.mixture.state_dict() if name not in weights]
    if lost:
        raise ValueError(
            f"The weights in {directory} lack {', '.join(lost)}, or have another shape; save the "
            "model again."
        )
    try:
        norm.mixture.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"The mixture in {directory} does not fit its model ({' '.join(str(error).split())}); "
            "save both together again."
        ) from error
    norm.witness.is_saved(weights)
    return model


def read_mixture_options(directory: Path) -> dict[str, Any] | None:
    """Read the options of the mixture that a model was saved with.

    Args:
        directory: Folder of a model.

    Returns:
        Fields of `MixtureConfig`; `None` where the folder holds no model, or one without a mixture:
        a model that was loaded without its mixture and saved again only has a configuration that
        tells of one.

    Raises:
        ValueError: If a file is damaged.
    """
    path = directory / "config.json"
    if not path.is_file():
        return None
    try:
        options = json.loads(path.read_text("utf-8")).get(CONFIG_FIELD)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); save the model again.") from error
    if options is None or not any(ROUTER in name for name in _list_weights(directory)):
        return None
    return options


def _list_weights(directory: Path) -> dict[str, Path]:
    """Name all weights of a model, with the file that each is in."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); save the model again.") from error
    return found


def _read_weight(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers from reporting the mixture's weights as unexpected; `load` looks itself."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
