"""A model loaded: with its adapter or its mixture, and its tokenizer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.quantization_config import GgufConfig

from depthmix.attachment import CONFIG_FIELD, set_top_k
from depthmix.checkpoint import load, read_mixture_options
from depthmix.model_sources import (
    ModelSource,
    check_adapter,
    explain_missing,
    find_base,
    find_config,
    resolve_model,
)
from depthmix.peft_calls import without_old_name
from depthmix.run_config import ModelSection
from depthmix.vocabulary import fit_embeddings, read_ends, stop_at


def load_model(section: ModelSection, *, is_trainable: bool = False) -> PreTrainedModel | PeftModel:
    """Load a model, and its adapter where the section names one.

    GGUF weights are dequantised, since transformers neither trains nor saves quantised ones.

    Args:
        section: What to load. If `name` is the folder of an adapter, its base model is loaded too.
        is_trainable: Load the adapter for further training instead of frozen.

    Returns:
        The model on the CPU; a `PeftModel` if there is an adapter.

    Raises:
        ValueError: If a file is damaged, or `top_k` does not fit the mixture.
        OSError: If the model cannot be found.
    """
    section = find_base(section)
    if section.adapter is not None:
        check_adapter(Path(section.adapter))
    source = resolve_model(section.name)
    options: dict[str, Any] = {"dtype": section.dtype, "revision": section.revision or "main"}
    if source.gguf_file is not None:
        options["quantization_config"] = GgufConfig(dequantize=True)
    with _explained(section.name, source):
        folder = find_mixture(section)
        if folder is not None:
            model = load(folder, dtype=section.dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                source.directory_or_id, gguf_file=source.gguf_file, **options
            )
    if section.adapter is not None:
        settings = check_adapter(Path(section.adapter))
        fit_embeddings(model, Path(section.adapter), settings)
        with without_old_name():
            model = PeftModel.from_pretrained(model, section.adapter, is_trainable=is_trainable)
        _stop_where_trained(model, section)
    if section.top_k is not None:
        set_top_k(model, section.top_k)
    return model


def find_mixture(section: ModelSection) -> Path | None:
    """Find the folder of a model that was saved with an attached mixture.

    Args:
        section: A model, by the place or the name of its own weights.

    Returns:
        The folder, or for a model on the hub the one that it is downloaded to; `None` for a model
        without a mixture.
    """
    source = resolve_model(section.name)
    if source.is_local:
        folder = Path(source.directory_or_id)
        return folder if read_mixture_options(folder) is not None else None
    path = find_config(section)
    if path is None or CONFIG_FIELD not in json.loads(path.read_text("utf-8")):
        return None
    folder = Path(snapshot_download(section.name, revision=section.revision or "main"))
    return folder if read_mixture_options(folder) is not None else None


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, or that of its adapter where one was saved with it.

    Args:
        section: As for `load_model`.

    Returns:
        A tokenizer with a padding token; where it has none, the end-of-sequence token pads.

    Raises:
        OSError: If the model cannot be found.
    """
    section = find_base(section)
    if section.adapter is not None and (Path(section.adapter) / "tokenizer_config.json").is_file():
        source = ModelSource(section.adapter)
    else:
        source = resolve_model(section.name)
    with _explained(section.name, source):
        tokenizer = AutoTokenizer.from_pretrained(
            source.directory_or_id,
            gguf_file=source.gguf_file,
            revision=section.revision or "main",
        )
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _stop_where_trained(model: PreTrainedModel | PeftModel, section: ModelSection) -> None:
    """Stop where the adapter's training said that a text ends."""
    adapter = Path(str(section.adapter))
    ends = read_ends(adapter)
    if ends is not None:
        model.generation_config.eos_token_id = ends or None
    elif (adapter / "tokenizer_config.json").is_file():
        end = load_tokenizer(section).eos_token_id
        stop_at(model, [] if end is None else [end])


@contextlib.contextmanager
def _explained(name: str, source: ModelSource) -> Iterator[None]:
    """Say in one sentence why loading failed."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"`model.name` is damaged: a weight file in {source.directory_or_id} cannot be read "
            f"({error}); copy or download the model again."
        ) from error
    except OSError as error:
        if source.is_local:
            raise
        raise OSError(explain_missing(name)) from error
