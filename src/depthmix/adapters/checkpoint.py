"""Load a model whose mixture was attached without PEFT."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from depthmix.adapters.attach import CONFIG_FIELD, attach
from depthmix.method.config import MixtureConfig

MIXTURE = ".mixture."
"""What the names of an attached mixture's weights have before its own names for them."""

ROUTER = "router.weight"
"""A weight that every mixture has."""


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
    directory, variant = Path(directory), model_options.get("variant")
    options = read_mixture_options(directory, variant=variant)
    if options is None:
        raise FileNotFoundError(
            f"`directory` must hold a model that was saved with a mixture, and {directory} holds "
            "none; load a PEFT adapter with `AutoPeftModelForCausalLM`."
        )
    with _without_report():
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            output_loading_info=True,
            **{**model_options, "ignore_mismatched_sizes": True},
        )
    norm = attach(model, MixtureConfig(**options))
    weights = _read_mixture(_list_weights(directory, variant))
    expected = norm.mixture.state_dict()
    prefix = f"{norm.backbone.final_norm_name}.mixture."
    lost = [*info["missing_keys"], *(prefix + name for name in expected if name not in weights)]
    surplus = [name for name in info["unexpected_keys"] if MIXTURE not in name]
    surplus += [prefix + name for name in weights if name not in expected]
    shapes = [f"{name} of the shape {tuple(given)}" for name, given, _ in info["mismatched_keys"]]
    shapes += [
        f"{prefix}{name} of the shape {tuple(tensor.shape)}"
        for name, tensor in weights.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    not_finite = [prefix + name for name, tensor in weights.items() if not is_finite(tensor)]
    for fault, names in (
        ("lack {}", lost),
        ("hold {}, which the model and its mixture do not have", surplus),
        ("hold {}, which is not the model's", shapes),
        ("hold NaN or infinite values in {}", not_finite),
    ):
        if names:
            raise ValueError(
                f"The weights in {directory} {fault.format(', '.join(sorted(names)))}; the folder "
                "is damaged or its files are of several models: save the model again."
            )
    norm.mixture.load_state_dict(weights)
    norm.witness.is_saved(weights)
    return model


def read_mixture_options(directory: Path, *, variant: str | None = None) -> dict[str, Any] | None:
    """Read the options of the mixture that a model was saved with.

    Args:
        directory: Folder of a model.
        variant: As in `save_pretrained`, if it was given there.

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
    if options is None or not _read_prefix(_list_weights(directory, variant)):
        return None
    return options


def _list_weights(directory: Path, variant: str | None) -> dict[str, Path]:
    """Name all weights of a model, with the file that each is in, as transformers would read it."""
    suffix = "" if variant is None else f".{variant}"
    whole = directory / f"model{suffix}.safetensors"
    index = directory / f"model.safetensors.index{suffix}.json"
    files = [whole]
    if not whole.is_file():
        try:
            places = json.loads(index.read_text("utf-8"))["weight_map"].values()
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is damaged ({error}); save the model again.") from error
        files = [directory / name for name in sorted(set(places))]
    found = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged ({error}); save the model again.") from error
    return found


def _read_prefix(places: dict[str, Path]) -> str | None:
    """Find what the names of a mixture's weights begin with in a model's files.

    That is not their name in the model where transformers renames the parts of a model that it
    saves.
    """
    found = [name.removesuffix(ROUTER) for name in places if name.endswith(MIXTURE + ROUTER)]
    return found[0] if found else None


def _read_mixture(places: dict[str, Path]) -> dict[str, Tensor]:
    """Read a mixture's weights, by the names that they have in it."""
    weights, prefix = {}, _read_prefix(places)
    assert prefix is not None  # or there was no mixture to load
    for name, path in places.items():
        if MIXTURE in name:
            with safe_open(path, framework="pt") as file:
                weights[name.removeprefix(prefix)] = file.get_tensor(name)
    return weights


def is_finite(tensor: Tensor) -> bool:
    """Tell whether a tensor holds no NaN and nothing infinite; one without values holds neither."""
    if tensor.is_meta or not tensor.is_floating_point():
        return True
    return bool((tensor.float() if tensor.itemsize == 1 else tensor).isfinite().all())


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers from reporting the mixture's weights as unexpected; `load` looks itself."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
