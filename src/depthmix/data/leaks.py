"""What training records share with a test set, question by question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from depthmix.data.questions import Record, question_stems, same_letters, same_words


@dataclass(frozen=True, kw_only=True)
class Questions:
    """The questions of each record of a set, as they are compared."""

    words: tuple[frozenset[str], ...]
    """By their words."""

    letters: tuple[frozenset[str], ...]
    """By their letters and digits."""


@dataclass(frozen=True, kw_only=True)
class Leak:
    """What a training set shares with one test set; records are numbered from 0."""

    test: str
    """Name of the test set."""

    num_questions: int
    """Records of the test set."""

    same_words: tuple[int, ...]
    """Training records whose question is there after lower-casing and collapsing white space."""

    same_letters: tuple[int, ...]
    """These, and those found after also dropping all but letters and digits, which catches
    tokenised copies."""

    covered: tuple[int, ...]
    """Test records that are so exposed."""


def read_questions(
    records: Sequence[Record], *, read: Callable[[Record], list[str]] = question_stems
) -> Questions:
    """Take the questions out of records.

    Args:
        records: Of any form that `read` takes.
        read: Gives the questions of one record.

    Returns:
        The questions of each record.

    Raises:
        ValueError: If a record holds no question, unless `read` takes it.
    """
    stems = [read(record) for record in records]
    return Questions(
        words=tuple(frozenset(map(same_words, texts)) for texts in stems),
        letters=tuple(frozenset(map(same_letters, texts)) for texts in stems),
    )


def compare_questions(asked: Questions, tested: Questions, *, name: str = "test") -> Leak:
    """Find the training records whose question is in a test set.

    Args:
        asked: Questions of the training records.
        tested: Questions of the test records.
        name: Name of the test set, for the result.

    Returns:
        The records on both sides.
    """
    by_words = _find_shared(asked.words, tested.words)
    by_letters = _find_shared(asked.letters, tested.letters)
    covered = _find_shared(tested.words, asked.words) | _find_shared(tested.letters, asked.letters)
    return Leak(
        test=name,
        num_questions=len(tested.words),
        same_words=tuple(sorted(by_words)),
        same_letters=tuple(sorted(by_words | by_letters)),
        covered=tuple(sorted(covered)),
    )


def _find_shared(these: Sequence[frozenset[str]], those: Sequence[frozenset[str]]) -> set[int]:
    """Number the records of which a question is also asked by the others."""
    known = frozenset().union(*those) - {""}
    return {number for number, texts in enumerate(these) if not known.isdisjoint(texts)}
