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

from depthmix.adapters.attach import CONFIG_FIELD
from depthmix.adapters.calls import without_old_name
from depthmix.adapters.checkpoint import load, read_mixture_options
from depthmix.libraries.releases import dequantising
from depthmix.method.norm import set_top_k
from depthmix.models.saved_adapters import check_adapter
from depthmix.models.sources import (
    ModelSource,
    explain_missing,
    find_base,
    find_config,
    resolve_model,
)
from depthmix.models.spec import ModelSpec, to_spec
from depthmix.models.vocabulary import fit_embeddings, read_ends, stop_at


def load_model(
    model: str | Path | ModelSpec, *, is_trainable: bool = False, **options: Any
) -> PreTrainedModel | PeftModel:
    """Load a model, with its adapter or its mixture: `load_model("runs/arc")`.

    GGUF weights are dequantised, since transformers neither trains nor saves quantised ones.

    Args:
        model: A folder of a model, an adapter or a run, a GGUF file, an installed weight package
            or an id on the hub; or a `ModelSpec`. Under an adapter its base model is loaded, too.
        is_trainable: Load the adapter for further training instead of frozen.
        options: Fields of `ModelSpec`, such as `dtype` and `top_k`.

    Returns:
        The model on the CPU; a `PeftModel` if there is an adapter.

    Raises:
        ValueError: If a file is damaged, or `top_k` does not fit the mixture.
        OSError: If the model cannot be found.
    """
    spec = find_base(to_spec(model, **options))
    if spec.adapter is not None:
        check_adapter(Path(spec.adapter))
    source = resolve_model(spec.name)
    arguments: dict[str, Any] = {"dtype": spec.dtype, "revision": spec.revision or "main"}
    if source.gguf_file is not None:
        arguments |= dequantising()
    with _explained(spec.name, source):
        folder = find_mixture(spec)
        if folder is not None:
            loaded = load(folder, dtype=spec.dtype)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(
                source.directory_or_id, gguf_file=source.gguf_file, **arguments
            )
    if spec.adapter is not None:
        settings = check_adapter(Path(spec.adapter))
        fit_embeddings(loaded, Path(spec.adapter), settings)
        with without_old_name():
            loaded = PeftModel.from_pretrained(loaded, spec.adapter, is_trainable=is_trainable)
        _stop_where_trained(loaded, spec)
    if spec.top_k is not None:
        set_top_k(loaded, spec.top_k)
    return loaded


def find_mixture(spec: ModelSpec) -> Path | None:
    """Find the folder of a model that was saved with an attached mixture.

    Args:
        spec: A model, by the place or the name of its own weights.

    Returns:
        The folder, or for a model on the hub the one that it is downloaded to; `None` for a model
        without a mixture.
    """
    source = resolve_model(spec.name)
    if source.is_local:
        folder = Path(source.directory_or_id)
        return folder if read_mixture_options(folder) is not None else None
    path = find_config(spec)
    if path is None or CONFIG_FIELD not in json.loads(path.read_text("utf-8")):
        return None
    folder = Path(snapshot_download(spec.name, revision=spec.revision or "main"))
    return folder if read_mixture_options(folder) is not None else None


def load_tokenizer(model: str | Path | ModelSpec, **options: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, or that of its adapter where one was saved with it.

    Args:
        model: As for `load_model`.
        options: As for `load_model`.

    Returns:
        A tokenizer with a padding token; where it has none, the end-of-sequence token pads.

    Raises:
        OSError: If the model cannot be found.
    """
    spec = find_base(to_spec(model, **options))
    if spec.adapter is not None and (Path(spec.adapter) / "tokenizer_config.json").is_file():
        source = ModelSource(spec.adapter)
    else:
        source = resolve_model(spec.name)
    with _explained(spec.name, source):
        tokenizer = AutoTokenizer.from_pretrained(
            source.directory_or_id,
            gguf_file=source.gguf_file,
            revision=spec.revision or "main",
        )
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _stop_where_trained(model: PreTrainedModel | PeftModel, spec: ModelSpec) -> None:
    """Stop where the adapter's training said that a text ends."""
    adapter = Path(str(spec.adapter))
    ends = read_ends(adapter)
    if ends is not None:
        model.generation_config.eos_token_id = ends or None
    elif (adapter / "tokenizer_config.json").is_file():
        end = load_tokenizer(spec).eos_token_id
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
