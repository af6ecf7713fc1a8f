"""Tokens that an adapter brings to its model, and those by which it ends a text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from depthmix.adapters.weights import find_weights, read_weights
from depthmix.files.drafts import write_whole
from depthmix.models.saved_adapters import find_run_file

GENERATION_NAME = "generation_config.json"
"""File beside an adapter that says where its generation stops."""


def fit_embeddings(model: PreTrainedModel, adapter: Path, settings: Mapping[str, Any]) -> None:
    """Give a model the rows of embeddings and head that an adapter was saved with.

    Args:
        model: The base model, which is changed.
        adapter: Folder of the adapter.
        settings: Its `adapter_config.json`.

    Raises:
        ValueError: If the adapter trained tokens that the model lacks, and holds no values for all
            of the rows in between.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    shapes = _read_shapes(find_weights(adapter))
    stored: dict[bool, int] = {}  # rows by whether they are the head's
    for name, module in model.named_modules():
        if module is embeddings or module is head:
            found = [shape[0] for key, shape in shapes.items() if _holds(key, name)]
            stored |= {module is head: found[0]} if found else {}
    weight: Any = embeddings.weight
    num_rows: int = weight.shape[0]
    indices = _list_indices(settings.get("trainable_token_indices"))
    wanted = max(stored.values() or (index + 1 for index in indices), default=num_rows)
    if wanted == num_rows or (wanted < num_rows and not stored):
        return
    is_trained = set(range(num_rows, wanted)) <= set(indices)
    is_tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if not ((False in stored or is_trained) and (True in stored or is_tied)):
        raise ValueError(
            f"`model.adapter` must hold the embeddings of all tokens that were added to its model, "
            f"and {adapter} lacks some between {num_rows:,} and {wanted:,}; save it again where it "
            "was trained, with `save_embedding_layers=True`."
        )
    model.resize_token_embeddings(wanted, mean_resizing=False)


def name_embeddings(model: PreTrainedModel) -> tuple[str, str | None]:
    """Name the modules of a model's embeddings and of its head.

    Args:
        model: The model.

    Returns:
        The last part of each name; `None` for a head whose weights are the embeddings'.
    """
    is_tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    head = model.get_output_embeddings()
    return (
        _name_module(model, model.get_input_embeddings()),
        None if is_tied or head is None else _name_module(model, head),
    )


def stop_at(model: PreTrainedModel | PeftModel, ends: Sequence[int]) -> None:
    """Let generation stop at further tokens.

    Args:
        model: The model, whose `generation_config` is changed.
        ends: Token ids.
    """
    known = _to_list(model.generation_config.eos_token_id)
    model.generation_config.eos_token_id = list(dict.fromkeys([*ends, *known])) or None


def save_ends(model: PreTrainedModel | PeftModel, folder: Path) -> Path:
    """Keep beside an adapter where its generation stops, as transformers would beside a model.

    Args:
        model: The tuned model.
        folder: Of the run.

    Returns:
        The written file.
    """
    return write_whole(folder / GENERATION_NAME, model.generation_config.to_json_string())


def read_ends(adapter: Path) -> list[int] | None:
    """Read where a run's generation stops.

    Args:
        adapter: Folder of the run, or of one of its checkpoints.

    Returns:
        Token ids; `None` if nothing says so.

    Raises:
        ValueError: If the file is damaged.
    """
    path = find_run_file(adapter, GENERATION_NAME)
    if path is None:
        return None
    try:
        settings = GenerationConfig.from_dict(json.loads(path.read_text("utf-8")))
        return _to_list(settings.eos_token_id)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"Cannot read {path}: {type(error).__name__}, {error}; remove it to stop where the "
            "tokenizer ends a text."
        ) from error


def _read_shapes(path: Path) -> dict[str, Sequence[int]]:
    """Read the shapes of an adapter's tensors."""
    if path.suffix == ".bin":
        return {key: tensor.shape for key, tensor in read_weights(path).items()}
    with safe_open(path, framework="pt") as weights:
        return {key: weights.get_slice(key).get_shape() for key in weights.keys()}  # noqa: SIM118


def _holds(key: str, name: str) -> bool:
    """Tell whether a tensor of an adapter's file is a module's whole weight."""
    return f".{name}." in key and key.endswith(".weight") and ".lora_" not in key


def _list_indices(given: Mapping[str, Sequence[int]] | Sequence[int] | None) -> list[int]:
    """List the trainable tokens of PEFT's option, which may name modules."""
    rows: Iterable[Any] = given.values() if isinstance(given, Mapping) else [given or ()]
    return sorted({index for row in rows for index in row})


def _name_module(model: PreTrainedModel, wanted: nn.Module) -> str:
    """Give the last part of a module's name."""
    name = next(name for name, module in model.named_modules() if module is wanted)
    return name.rpartition(".")[2]


def _to_list(ends: int | list[int] | None) -> list[int]:
    """List the tokens of `eos_token_id`, which may be one, several or none."""
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
