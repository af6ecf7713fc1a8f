"""The weights of each form of export, written into a folder."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from depthmix.adapters.merged import Parts, store_in
from depthmix.exports import modeling_depthmix
from depthmix.exports.settings import describe_mixture
from depthmix.files.drafts import write_whole

MODEL_TYPE = "depthmix"
"""`model_type` of an export with its mixture: nothing loads it as the model without."""

CODE_NAME = "modeling_depthmix.py"
"""File beside the weights by which transformers runs them."""

MIXTURE_NAME = "mixture.safetensors"
"""File of the mixture's weights, beside those of an ordinary model."""

INDEX_NAME = "model.safetensors.index.json"
"""File that says which weight is in which file, as transformers and vLLM read it."""

PREFIX = "mixture."
"""What the names of the mixture's weights begin with."""


def write_code(model: PreTrainedModel) -> str:
    """Write the file by which transformers runs a model with a mixture.

    Args:
        model: The bare model, of one of transformers' own classes.

    Returns:
        The code, which names the model's classes.
    """
    code = Path(modeling_depthmix.__file__).read_text("utf-8")
    code = code.replace("LlamaForCausalLM", type(model).__name__)
    return code.replace("LlamaConfig", type(model.config).__name__)


def class_name(model: PreTrainedModel) -> str:
    """Name the class of an exported model, as its `architectures` have it."""
    return f"Depthmix{type(model).__name__}"


def write_transformers(parts: Parts, folder: Path, dtype: torch.dtype) -> None:
    """Write a model with its mixture for `from_pretrained(…, trust_remote_code=True)`.

    Args:
        parts: A model with a mixture.
        folder: Where to; it exists and is empty.
        dtype: Type of the weights; the mixture's stay float32.

    Raises:
        ValueError: If the model cannot be made anew from its configuration.
    """
    model, mixture, name = parts.model, parts.mixture, class_name(parts.model)
    assert mixture is not None  # or it would be an ordinary model
    store_in(model, dtype)
    path = write_whole(folder / CODE_NAME, write_code(model))
    spec = importlib.util.spec_from_file_location(f"exported_{name}", path)
    assert spec is not None
    assert spec.loader is not None  # it is a Python file
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module_name = Path(CODE_NAME).stem
    settings = {
        "model_type": MODEL_TYPE,
        "base_model_type": model.config.model_type,
        "mixture_of_depths": describe_mixture(parts),
        "architectures": [name],
        "auto_map": {
            "AutoConfig": f"{module_name}.DepthmixConfig",
            "AutoModelForCausalLM": f"{module_name}.{name}",
        },
    }
    config = module.DepthmixConfig.from_dict({**model.config.to_dict(), **settings})
    weights = {**model.state_dict(), **_list_weights(parts)}
    twin = _make(getattr(module, name), config, weights)
    twin.generation_config = model.generation_config
    twin.save_pretrained(folder)


def write_vllm(parts: Parts, folder: Path, dtype: torch.dtype) -> None:
    """Write a model with its mixture for the vLLM plug-in: an ordinary model's files, and one more.

    Args:
        parts: A model with a mixture.
        folder: Where to; it exists and is empty.
        dtype: Type of the weights; the mixture's stay float32.

    Raises:
        ValueError: If the final norm is of a kind that the plug-in does not know.
    """
    model, settings = parts.model, describe_mixture(parts)
    if settings["norm"] is None:
        raise ValueError(
            f"`form` cannot be 'vllm' for {type(model).__name__}, whose final norm "
            f"({type(parts.backbone.final_norm).__name__}) is neither an RMSNorm nor a LayerNorm; "
            "take `transformers`."
        )
    write_plain(parts, folder, dtype)
    save_file(_list_weights(parts), folder / MIXTURE_NAME, metadata={"format": "pt"})
    _write_index(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config |= {
        "base_model_type": config["model_type"],
        "model_type": MODEL_TYPE,
        "architectures": [class_name(model)],
        "mixture_of_depths": settings,
    }
    write_whole(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_plain(parts: Parts, folder: Path, dtype: torch.dtype) -> None:
    """Write a model without its mixture: the final layer answers by the pretrained norm.

    Args:
        parts: A model, with a mixture or without.
        folder: Where to; it exists and is empty.
        dtype: Type of the weights.
    """
    store_in(parts.model, dtype)
    parts.model.save_pretrained(folder)


def write_layer(parts: Parts, layer: int, folder: Path, dtype: torch.dtype) -> None:
    """Write one late layer by itself: an ordinary model of so many layers, with that layer's norm.

    Args:
        parts: A model, with a mixture or without.
        layer: One of its late layers.
        folder: Where to; it exists and is empty.
        dtype: Type of the weights.

    Raises:
        ValueError: If the architecture cannot have fewer layers.
    """
    store_in(parts.model, dtype)
    short = cut(parts, layer)
    store_in(short, dtype)
    short.save_pretrained(folder)


def cut(parts: Parts, layer: int) -> PreTrainedModel:
    """Make the model that one late layer is by itself.

    Args:
        parts: A model, with a mixture or without.
        layer: One of its late layers, m.

    Returns:
        A model of the first m layers with norm N_m; it shares their weights.

    Raises:
        ValueError: If the architecture cannot have fewer layers.
    """
    model, backbone, mixture = parts.model, parts.backbone, parts.mixture
    weights = dict(model.state_dict())
    if mixture is not None and str(layer) in mixture.norms:
        for name, value in mixture.norms[str(layer)].state_dict().items():
            weights[f"{backbone.final_norm_name}.{name}"] = value
    above = range(layer, backbone.num_hidden_layers)
    prefixes = tuple(f"{backbone.layers_name}.{place}." for place in above)
    kept = {name: value for name, value in weights.items() if not name.startswith(prefixes)}
    try:
        config = type(model.config).from_dict(shorten(model.config.to_dict(), model, layer))
        short = _make(type(model), config, kept)
    except Exception as error:  # each architecture has its own
        raise ValueError(
            f"`layer` cannot be {layer}: {type(model).__name__} cannot have {layer} of its "
            f"{backbone.num_hidden_layers} layers ({' '.join(str(error).split())[:200]}); take "
            "`final`, or the form `transformers`."
        ) from error
    short.generation_config = copy.deepcopy(model.generation_config)
    return short


def shorten(settings: dict[str, Any], model: PreTrainedModel, layer: int) -> dict[str, Any]:
    """Shorten a configuration to so many layers: their number, and lists with a value for each.

    Args:
        settings: Of the whole model; not changed.
        model: It.
        layer: Layers that are kept.

    Returns:
        The settings of the shorter model.
    """
    depth = model.config.num_hidden_layers
    number = model.config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    shorter = {
        name: value[:layer]
        if isinstance(value, list) and len(value) == depth and "token_id" not in name
        else value
        for name, value in settings.items()
    }
    return shorter | {number: layer}


def _make(kind: Any, config: Any, weights: dict[str, Tensor]) -> PreTrainedModel:
    """Make a model of exactly these weights."""
    with torch.device("meta"):
        model = kind(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model


def _list_weights(parts: Parts) -> dict[str, Tensor]:
    """List a mixture's weights by their names in an export; exits draft in depthmix alone."""
    mixture = parts.mixture
    assert mixture is not None  # callers have one
    return {
        PREFIX + name: value.detach().float().cpu().contiguous()
        for name, value in mixture.state_dict().items()
        if not name.startswith("exits.")
    }


def _write_index(folder: Path) -> None:
    """Say in which file each weight is, those of the mixture among them."""
    whole, index = folder / "model.safetensors", folder / INDEX_NAME
    if whole.is_file():
        whole.rename(folder / "model-00001-of-00001.safetensors")
        content: dict[str, Any] = {"metadata": {}, "weight_map": {}}
    else:
        content = json.loads(index.read_text("utf-8"))
    size = 0
    for path in sorted(folder.glob("*.safetensors")):
        size += path.stat().st_size
        with safe_open(path, framework="pt") as file:
            content["weight_map"] |= dict.fromkeys(file.keys(), path.name)
    content["metadata"] = {**content["metadata"], "total_size": size}
    write_whole(index, json.dumps(content, indent=2) + "\n")
