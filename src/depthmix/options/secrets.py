"""Settings without the tokens, keys and passwords in them, for files beside results."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainingArguments

SECRET_WORDS = ("token", "key", "secret", "password", "passphrase", "credential", "credentials")
"""Last words of a name whose text lets somebody in."""


def is_secret(name: str, value: Any) -> bool:
    """Tell whether an option holds what lets somebody in.

    Args:
        name: The option: `hub_token`, `wandb-api-key`, `clientSecret`.
        value: What it is set to; only text lets anyone in.

    Returns:
        Whether it is to be kept out of files. `eos_token`, `max_new_tokens` and
        `trainable_token_indices` hold no secrets.
    """
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    last = re.split(r"[\W_]+", words)[-1]
    secret = last in SECRET_WORDS or last.endswith(("apikey", "authtoken", "accesstoken"))
    return secret and isinstance(value, str | bytes) and words not in _list_text_tokens()


@functools.cache
def _list_text_tokens() -> frozenset[str]:
    """List options such as `eos_token`, which stand for a piece of text."""
    from transformers import PreTrainedTokenizerBase  # takes a second

    return frozenset(PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES)


def without_secrets(value: Any) -> Any:
    """Take secrets out of settings, however deep they lie.

    Args:
        value: Settings by name, a list of such, a text that holds them as JSON, or anything else.

    Returns:
        A copy without the options that hold a secret; anything else as it is.
    """
    if isinstance(value, Mapping):
        return {
            name: without_secrets(inner)
            for name, inner in value.items()
            if not is_secret(str(name), inner)
        }
    if type(value) in (list, tuple):
        return type(value)(map(without_secrets, value))
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            content = json.loads(value)
        except (ValueError, RecursionError):
            return value
        kept = without_secrets(content)
        return value if kept == content else json.dumps(kept)
    return value


def hide_secrets(arguments: TrainingArguments) -> None:
    """Keep the secrets of training arguments out of files and reports.

    Checkpoints hold the arguments (`training_args.bin`, which is also what is pushed to the hub),
    and reporters such as TensorBoard write them as text.

    Args:
        arguments: The arguments of a trainer, which go on holding their secrets. Copies of them
            have none.
    """
    own: Any = arguments  # pickling and reports ask the object before its class
    own.__getstate__ = functools.partial(_clean_state, arguments)
    own.to_dict = functools.partial(_clean_report, arguments)


def _clean_state(arguments: TrainingArguments) -> dict[str, Any]:
    """Give what is pickled: every attribute, the secret ones as `None`."""
    return {
        name: None if is_secret(name, value) else _clean_part(value)
        for name, value in vars(arguments).items()
        if name not in ("__getstate__", "to_dict")
    }


def _clean_report(arguments: TrainingArguments) -> dict[str, Any]:
    """Give what the class reports of arguments without secrets."""
    clean = object.__new__(type(arguments))
    clean.__dict__.update(_clean_state(arguments))
    return without_secrets(clean.to_dict())


def _clean_part(value: Any) -> Any:
    """Take secrets out of a value, also of an object that accelerate makes of one."""
    if type(value).__module__.startswith("accelerate.") and hasattr(value, "__dict__"):
        clean = copy.copy(value)
        secret = [name for name, inner in vars(value).items() if is_secret(name, inner)]
        clean.__dict__.update(dict.fromkeys(secret))
        return clean
    return without_secrets(value)
