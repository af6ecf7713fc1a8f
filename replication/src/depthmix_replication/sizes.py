"""How large models are, from their configuration, without their weights or what would run them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from depthmix.files.json import parse
from depthmix.models.sources import ModelSource, resolve_model
from depthmix_replication.gguf_header import read_header
from depthmix_replication.runs import TOY

TOY_CONFIG: dict[str, Any] = {
    "vocab_size": 257,  # bytes, and `</s>`
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 8,  # enough for six routes, and layers below them that carry adapters
    "num_attention_heads": 2,
}
"""What the toy model's configuration says of its size."""

NUM_RECORDS = 12
"""Invented records of each kind, to train on and to test by."""

WITHIN = ("text_config", "decoder", "generator")
"""Where a model that reads more than text says what its language model is."""


@functools.cache
def count_layers(model: str) -> int:
    """Count a model's layers.

    Args:
        model: As `model.name` takes it, or `toy`.

    Returns:
        Layers of its language model.

    Raises:
        OSError: If its configuration cannot be had.
    """
    return _read_size(model)["num_hidden_layers"]


@functools.cache
def count_parameters(model: str) -> int:
    """Count a model's parameters: of embeddings, head, attention and feed-forward layers.

    Args:
        model: As `model.name` takes it, or `toy`.

    Returns:
        Parameters; but for a GGUF file, which says them, in the order of magnitude: norms and
        biases, and what else few models have, are left out.

    Raises:
        OSError: If its configuration cannot be had.
    """
    size = _read_size(model)
    if "num_weights" in size:
        return size["num_weights"]
    hidden, heads = size["hidden_size"], size["num_attention_heads"]
    head_dim = size.get("head_dim") or hidden // heads
    key_value = (size.get("num_key_value_heads") or heads) * head_dim
    attention = 2 * hidden * heads * head_dim + 2 * hidden * key_value
    inner = size.get("intermediate_size") or 4 * hidden
    experts = size.get("num_local_experts") or size.get("num_experts") or 1
    layer = attention + 3 * hidden * inner * experts
    embeddings = size["vocab_size"] * hidden * (1 if size.get("tie_word_embeddings") else 2)
    return embeddings + size["num_hidden_layers"] * layer


def _read_size(model: str) -> Mapping[str, Any]:
    """Read what a configuration says of a model's size, as JSON if it says it by usual names."""
    if model == TOY:
        return TOY_CONFIG
    source = resolve_model(model)
    if source.gguf_file is not None:
        return _read_gguf(Path(source.directory_or_id, source.gguf_file))
    config = parse(_find_config(source).read_text("utf-8"))
    inner = [config[name] for name in WITHIN if isinstance(config.get(name), dict)]
    config = inner[0] if len(inner) == 1 else config
    needed = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    if all(isinstance(config.get(name), int) for name in needed) and len(inner) < 2:
        return config
    return _load_size(source)


def _read_gguf(path: Path) -> Mapping[str, Any]:
    """Read what a GGUF file says of its model's size."""
    header = read_header(path)
    name = f"{header.fields.get('general.architecture')}.block_count"
    if name not in header.fields:
        raise ValueError(f"{path} does not say how many layers its model has.")
    return {"num_hidden_layers": header.fields[name], "num_weights": header.num_weights}


def _find_config(source: ModelSource) -> Path:
    """Find a model's configuration, on the hub if it is there."""
    if source.is_local:
        return Path(source.directory_or_id) / "config.json"
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(source.directory_or_id, "config.json"))


def _load_size(source: ModelSource) -> Mapping[str, Any]:
    """Let transformers read a configuration with names of its own."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source.directory_or_id)
    text = config.get_text_config()
    return {**text.to_dict(), **{name: getattr(text, name) for name in text.attribute_map}}
