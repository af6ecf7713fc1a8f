"""The reference that TRL makes for a policy, where the policy has an attached mixture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from depthmix.adapters.checkpoint import read_mixture_options
from depthmix.method.norm import find_mixture_norm


def check_reference_options(arguments: dict[str, Any]) -> None:
    """Refuse options under which an attached mixture's reference would not be the base."""
    args = arguments.get("args")
    if not _is_attached(arguments.get("model")) or arguments.get("peft_config") is not None:
        return  # where an adapter is put on top, the reference is the model without it
    if getattr(args, "sync_ref_model", False):
        raise ValueError(
            "`sync_ref_model` must be False for an attached mixture, whose parameters the "
            "reference does not have; leave it out."
        )
    if getattr(args, "precompute_ref_log_probs", False) and arguments.get("ref_model") is None:
        raise ValueError(
            "`precompute_ref_log_probs` must be False for an attached mixture, which TRL would "
            "make part of the reference; leave it out, or pass `ref_model`."
        )


def check_reference(model: Any, reference: Any, host: str) -> None:
    """Refuse a reference that TRL loaded from a folder with a mixture, and hence without it.

    Any other folder gives the model that the mixture was attached to.
    """
    if not isinstance(reference, PreTrainedModel) or not _is_attached(model):
        return
    folder = reference.config._name_or_path
    if find_mixture_norm(reference) is None and read_mixture_options(Path(folder)) is not None:
        remedy = (
            f"pass `ref_model=depthmix.load({folder!r})`"
            if host in ("DPOTrainer", "KTOTrainer")
            else "set `beta=0`"
        )
        raise ValueError(
            f"`model` must not come from {folder} where {host} makes its own reference, since it "
            f"loads that folder without the mixture; {remedy}, or tune a `MoDEConfig` instead."
        )


def _is_attached(model: Any) -> bool:
    """Tell whether a model has a mixture that no adapter holds."""
    return isinstance(model, PreTrainedModel) and find_mixture_norm(model) is not None
