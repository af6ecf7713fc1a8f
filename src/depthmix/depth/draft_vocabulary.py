"""The few tokens that exits choose among, so that a draft costs little of the head."""

from __future__ import annotations

from collections.abc import Collection

VOCABULARY_SIZES = (0, 2048, 8192, None)
"""Sizes that are tried: the tokens that were seen alone, these and others, and all."""


def fill_vocabulary(
    seen: Collection[int], size: int | None, vocab_size: int
) -> tuple[int, ...] | None:
    """Make a draft vocabulary of the tokens that were seen, filled up with others.

    The others are those of the lowest numbers, which tokenizers that merge pairs have made first
    and of the most frequent ones.

    Args:
        seen: Token ids of texts such as are to be drafted.
        size: Tokens to have at least; `None` for all.
        vocab_size: Tokens that the model predicts.

    Returns:
        Token ids, increasing; `None` for all, also where they would be more than half of all and
        spare little.
    """
    known = {token for token in seen if 0 <= token < vocab_size}
    if size is None or not known or 2 * max(size, len(known)) > vocab_size:
        return None
    others = (token for token in range(vocab_size) if token not in known)
    for token, _ in zip(others, range(size - len(known)), strict=False):
        known.add(token)
    return tuple(sorted(known))


def list_vocabularies(
    seen: Collection[int], vocab_size: int
) -> dict[int | None, tuple[int, ...] | None]:
    """List the draft vocabularies to try, each once.

    Args:
        seen: As for `fill_vocabulary`.
        vocab_size: As for `fill_vocabulary`.

    Returns:
        Vocabularies by the size that was asked for, small ones first.
    """
    found: dict[int | None, tuple[int, ...] | None] = {}
    for size in VOCABULARY_SIZES:
        vocabulary = fill_vocabulary(seen, size, vocab_size)
        if vocabulary not in found.values():
            found[size] = vocabulary
    return found
