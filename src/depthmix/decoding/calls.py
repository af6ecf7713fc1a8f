"""What layers are called with, at positions of several passes or of one."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

POSITION_ARGUMENTS = ("position_ids", "cache_position", "position_embeddings")
"""Arguments of a layer that hold something for each position."""

VARYING_ARGUMENTS = ("attention_mask", *POSITION_ARGUMENTS)
"""Arguments of a layer that differ from pass to pass."""

CONSTANTS = (type(None), bool, int, float, str)
"""Kinds of arguments that are the same at each position."""


def read_call(
    module: nn.Module,
    names: list[str],
    args: tuple,
    kwargs: dict[str, Any],
    *,
    cache: DynamicCache,
    name: str,
    door: str,
) -> dict[str, Any]:
    """Name what a layer was called with, beside its hidden states.

    Args:
        module: The layer.
        names: Its forward pass's parameters.
        args: What was passed by position, hidden states apart.
        kwargs: What was passed by name.
        cache: The decoding loop's, which must be among it.
        name: What an error calls this way of generating.
        door: What an error says to leave out.

    Raises:
        ValueError: If something among it has another form at other positions, as far as we know, or
            the cache is not.
    """
    call = {**dict(zip(names[1:], args, strict=False)), **kwargs}
    if not any(value is cache for value in call.values()):
        raise ValueError(
            f"{name} cannot defer layers that do not take the decoding loop's cache, as "
            f"{type(module).__name__} does not in this call; leave out {door}."
        )
    unknown = sorted(
        key
        for key, value in call.items()
        if key not in VARYING_ARGUMENTS and value is not cache and not isinstance(value, CONSTANTS)
    )
    if isinstance(call.get("position_embeddings"), Tensor):  # complex ones, with axes of their own
        unknown.append("position_embeddings")
    if unknown:
        raise ValueError(
            f"{name} cannot defer layers that take `{unknown[0]}` as "
            f"{type(module).__name__} does; leave out {door} for this model."
        )
    return call


def join_calls(calls: list[dict[str, Any]]) -> dict[str, Any]:
    """Join what several passes handed to a layer into one call over all of their positions.

    Args:
        calls: From `read_call`, earliest first.

    Returns:
        One call; its mask is the last one's.

    Raises:
        ValueError: If a constant was another one in one of them.
    """
    joined = dict(calls[-1])
    for name in {name for call in calls for name in call}.difference(VARYING_ARGUMENTS):
        values = [call.get(name) for call in calls]
        if not all(value is values[0] or value == values[0] for value in values):
            raise ValueError(
                f"`{name}` of the model's layers must stay the same while they are deferred, got "
                f"{values[0]!r:.40} and then {values[-1]!r:.40}; call the model's own `generate`."
            )
    for name in POSITION_ARGUMENTS:
        parts: list[Any] = [call.get(name) for call in calls]
        if isinstance(parts[0], Tensor):
            joined[name] = torch.cat(parts, dim=-1)
        elif isinstance(parts[0], tuple):  # cosines and sines
            joined[name] = tuple(torch.cat(own, dim=-2) for own in zip(*parts, strict=True))
    return joined


def last_position(call: dict[str, Any]) -> dict[str, Any]:
    """Narrow a call of a layer to the last of its positions."""
    narrowed = dict(call)
    for name in POSITION_ARGUMENTS:
        part = call.get(name)
        if isinstance(part, Tensor):
            narrowed[name] = part[..., -1:]
        elif isinstance(part, tuple):  # cosines and sines
            narrowed[name] = tuple(own[..., -1:, :] for own in part)
    return narrowed


def mask_missed(
    inputs: Float[Tensor, "batch missed hidden"],
    *,
    cache: DynamicCache,
    index: int,
    padding: Int[Tensor, "batch seq"] | Bool[Tensor, "batch seq"] | None,
) -> Float[Tensor, "rows 1 missed keys"] | None:
    """Let each missed position see itself and what came before, as far as the layer looks.

    Args:
        inputs: What the layer takes in at the positions that it has missed.
        cache: Keys and values so far.
        index: The layer's place in the cache.
        padding: 0 where a row has no token, for all positions; `None` where each one has.

    Returns:
        What is added to the attention's logits, or `None` where everything is seen.
    """
    if inputs.shape[1] == 1 and padding is None:
        return None
    seen = _find_seen(inputs, cache=cache, index=index, padding=padding)
    lowest = torch.full_like(seen, torch.finfo(inputs.dtype).min, dtype=inputs.dtype)
    return lowest.masked_fill(seen, 0.0)


def sees_alike(
    mask: Any,
    inputs: Float[Tensor, "batch new hidden"],
    *,
    cache: DynamicCache,
    index: int,
    padding: Int[Tensor, "batch seq"] | Bool[Tensor, "batch seq"] | None,
) -> bool:
    """Tell whether the model's own mask shows a layer what `mask_missed` would.

    Rows of padding count for nothing.

    Args:
        mask: What the model made for the positions of `inputs`, True or 0 where they see; `None`
            where they see themselves and all before them.
        inputs: What the layer takes in.
        cache: Keys and values so far; the layer has missed nothing before `inputs`.
        index: The layer's place in the cache.
        padding: 0 where a row has no token, for all positions; `None` where each one has.
    """
    own = _find_seen(inputs, cache=cache, index=index, padding=padding)  # (rows, 1, new, keys)
    num_queries, num_keys = own.shape[-2:]
    if mask is None:
        given = own.new_ones(num_queries, num_keys).tril(num_keys - num_queries)
    elif not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-2:] != own.shape[-2:]:
        return False
    elif mask.dtype == torch.bool:
        given = mask
    else:
        given = mask == 0
        if not bool((given | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
            return False  # something else is added to the attention's logits
    differs = given != own
    if padding is not None:
        first_query = cache.get_seq_length(index)
        tokens = padding[:, first_query : first_query + num_queries].to(own.device, torch.bool)
        differs = differs & tokens[:, None, :, None]
    return not bool(differs.any())


def _find_seen(
    inputs: Float[Tensor, "batch new hidden"],
    *,
    cache: DynamicCache,
    index: int,
    padding: Int[Tensor, "batch seq"] | Bool[Tensor, "batch seq"] | None,
) -> Bool[Tensor, "rows 1 new keys"]:
    """Say which keys each position sees: itself and what came before, as far as a layer looks."""
    num_queries = inputs.shape[1]
    first_query = cache.get_seq_length(index)
    num_keys, first_key = cache.get_mask_sizes(num_queries, index)
    queries = first_query + torch.arange(num_queries, device=inputs.device)[:, None]
    keys = first_key + torch.arange(num_keys, device=inputs.device)
    seen = keys <= queries  # (new, keys)
    window = getattr(cache.layers[index], "sliding_window", None)
    if window is not None:
        seen = seen & (keys > queries - window)
    if padding is not None:
        own = padding[:, first_key : first_key + num_keys].to(inputs.device, torch.bool)
        seen = seen & own[:, None]  # (B, new, keys)
    return seen.view(-1, 1, num_queries, num_keys)
