"""The tokenizer of a run, as TRL's options change it: before anything is rendered by it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import clone_chat_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from depthmix.adapters.config import MoDEConfig
from depthmix.data.rendering import find_end
from depthmix.evaluation.identity import DEFAULT_SEED
from depthmix.models.vocabulary import name_embeddings
from depthmix.options.types import suggest
from depthmix.training.config import RunConfig

TEMPLATE_SUFFIXES = (".jinja", ".j2")
"""Endings of files that hold a chat template, by TRL's rule."""


def find_template_source(training: Mapping[str, Any]) -> str | None:
    """Name the tokenizer whose chat template, tokens and end a run takes over.

    Args:
        training: Keyword arguments of `trl.SFTConfig`.

    Returns:
        A folder, or an id on the hub; `None` where there is none, or the template is a file.

    Raises:
        ValueError: If `chat_template_path` names a file that is no template.
    """
    path = training.get("chat_template_path")
    if path is None or (Path(path).is_file() and path.endswith(TEMPLATE_SUFFIXES)):
        return None
    if Path(path).is_file() or path.endswith(TEMPLATE_SUFFIXES):
        raise ValueError(
            "`training.chat_template_path` must be an existing file that ends in .jinja or .j2, "
            f"or the folder or the hub's id of a tokenizer, got {path}."
        )
    return path


def adopt_options(tokenizer: PreTrainedTokenizerBase, training: Mapping[str, Any]) -> None:
    """Change a tokenizer as TRL would when its trainer is made.

    Args:
        tokenizer: The model's, which is changed; where the template comes from another tokenizer,
            after `clone_template`.
        training: Keyword arguments of `trl.SFTConfig`, of which `eos_token`, `pad_token`,
            `chat_template_path` and `assistant_only_loss` matter.

    Raises:
        ValueError: If a token is not in the vocabulary, two options say where a text ends, or no
            template marks what the assistant says.
    """
    source = find_template_source(training)
    end = training.get("eos_token")
    if source is not None and end not in (None, tokenizer.eos_token):
        raise ValueError(
            "`training.eos_token` must be left out where `training.chat_template_path` is another "
            f"tokenizer, which ends its texts with {tokenizer.eos_token!r}, got {end!r}."
        )
    for name in ("eos_token", "pad_token"):
        token = training.get(name)
        if token is None:
            continue
        known = tokenizer.get_vocab()
        if token not in known:
            added = [known.content for known in tokenizer.added_tokens_decoder.values()]
            raise ValueError(
                f"`training.{name}` must be a token of the model's vocabulary, and {token!r} is "
                f"none{suggest(token, added)}"
            )
        setattr(tokenizer, name, token)
    if source is None and (path := training.get("chat_template_path")) is not None:
        tokenizer.chat_template = Path(path).read_text("utf-8")
    marks = training.get("assistant_only_loss") and tokenizer.chat_template is not None
    if marks and not has_generation_markers(tokenizer.chat_template):
        # TRL would train by this template, and leave the tokenizer the other one.
        tokenizer.chat_template = get_training_chat_template(tokenizer)


def clone_template(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str, config: RunConfig
) -> list[int]:
    """Take over another tokenizer's chat template, end and tokens, and make room for them.

    Args:
        model: The model, whose embeddings grow.
        tokenizer: Its tokenizer, which is changed.
        source: The other one, as `find_template_source` names it.
        config: Of the run: for its method, and its seed, since every process must draw the same
            values for new tokens.

    Returns:
        Ids of the tokens that are new.

    Raises:
        ValueError: If TRL's own loss is to train rows of a head that is the embeddings.
        OSError: If there is no such tokenizer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.get("seed", DEFAULT_SEED))
        *_, added = clone_chat_template(model, tokenizer, source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if added and config.method == "lora" and name_embeddings(model)[1] is None:
        raise ValueError(
            f"`training.chat_template_path` must bring no new tokens (it brings {len(added)}) "
            'where `method` is "lora" and the head is the embeddings, since TRL\'s loss cannot '
            "train them; name a file with a chat template, or a model with a head of its own."
        )
    return list(added)


def train_tokens(config: MoDEConfig, model: PreTrainedModel, tokens: Sequence[int]) -> MoDEConfig:
    """Let an adapter train the embeddings of new tokens, and a head that is not the embeddings'.

    Args:
        config: The adapter's options.
        model: The model that has the tokens.
        tokens: Their ids.

    Returns:
        The options with the tokens.
    """
    if not tokens:
        return config
    embeddings, head = name_embeddings(model)
    given = config.trainable_token_indices or {}
    given = dict(given) if isinstance(given, Mapping) else {embeddings: list(given)}
    given[embeddings] = sorted({*given.get(embeddings, ()), *tokens})
    saved = list(config.modules_to_save or [])
    if head is not None and head not in saved:
        saved.append(head)
    return replace(config, trainable_token_indices=given, modules_to_save=saved or None)


def find_ends(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """List the tokens by which a text ends in training, and say so where no completion does.

    Args:
        dataset: From `to_training_dataset`.
        tokenizer: The run's.

    Returns:
        Token ids: those of the completions, the commonest first, and the tokenizer's own.
    """
    counts: dict[int, int] = {}
    for ids, mask in zip(dataset["input_ids"], dataset["completion_mask"], strict=True):
        end = find_end(ids[len(mask) - sum(mask) :], tokenizer)
        if end is not None:
            counts[end] = counts.get(end, 0) + 1
    if not counts:
        warnings.warn(
            "No token ends the completions, so that the model does not learn where an answer ends: "
            "let the chat template write one behind it, or set `training.eos_token`.",
            stacklevel=3,
        )
    own = tokenizer.eos_token_id
    ends = sorted(counts, key=counts.__getitem__, reverse=True)
    return ends if own is None or own in ends else [*ends, own]
