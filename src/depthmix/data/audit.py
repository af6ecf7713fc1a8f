"""Which training records ask a question that is in a test set."""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from depthmix.data.catalog import CATALOG, describe, is_at_hand, load_split
from depthmix.data.leaks import Leak, compare_questions, read_questions
from depthmix.data.questions import Record, question_stems, same_words
from depthmix.data.records import is_path, load_records
from depthmix.data.schemas import read_rows
from depthmix.files.drafts import write_whole

FURTHER_SAMPLE = "hellaswag:further"
"""The one test set beside those called after their data set; its records are in no other file."""


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """What a training set shares with test sets."""

    train: str
    """The training set, as it was asked for."""

    num_records: int
    """Records of the training set."""

    leaks: tuple[Leak, ...]
    """One for each test set, in the order asked for."""

    @property
    def leaking(self) -> tuple[int, ...]:
        """Training records, from 0, whose question is in any of the test sets."""
        return tuple(sorted({record for leak in self.leaks for record in leak.same_letters}))

    def __str__(self) -> str:
        """Lay the counts out as a table; test sets that share nothing are only counted."""
        rows = [["test set", "questions", "same words", "same letters", "covered"]]
        for leak in self.leaks:
            if leak.same_letters:
                shared = map(len, (leak.same_words, leak.same_letters, leak.covered))
                rows.append([leak.test, *(f"{n:,}" for n in (leak.num_questions, *shared))])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for name, *counts in rows[: len(rows) if len(rows) > 1 else 0]:
            cells = [count.rjust(width) for count, width in zip(counts, widths[1:], strict=True)]
            lines.append("  ".join([name.ljust(widths[0]), *cells]))
        num_clean, num_leaking = len(self.leaks) - len(rows) + 1, len(self.leaking)
        lines.append(
            f"{num_leaking:,} of {self.num_records:,} records leak, "
            f"{self.num_records - num_leaking:,} are left; {num_clean} of {len(self.leaks)} test "
            "sets share no question."
        )
        return "\n".join(lines)


def audit(train: str, tests: Sequence[str], *, data_dir: str | Path | None = None) -> AuditResult:
    """Compare a training set with test sets, question by question.

    Args:
        train: Path of a JSON, JSONL, CSV, TSV or Parquet file, or name of a data set, of which the
            split `train` is taken; `alpaca:validation` names another one.
        tests: The same, but for the split `test`; `all` stands for every named test set at hand.
        data_dir: Local folder of the named data sets, instead of DEPTHMIX_DATA.

    Returns:
        What it shares with each.

    Raises:
        ValueError: If there is no test set, or a file or data set is not what it should be.
        OSError: If there is no such file, or data are neither at hand nor to be had.
    """
    tests = _list_tests(tests, data_dir)  # before the training set may be downloaded
    records = read_source(train, "train", data_dir=data_dir)
    return audit_records(records, tests, name=train, data_dir=data_dir)


def audit_records(
    records: Sequence[Record],
    tests: Sequence[str],
    *,
    name: str = "train",
    data_dir: str | Path | None = None,
) -> AuditResult:
    """Compare training records with test sets, question by question.

    Args:
        records: Of any form that `questions.question_stems` takes.
        tests: As for `audit`.
        name: Name of the training set, for the result.
        data_dir: As for `audit`.

    Returns:
        What they share with each.

    Raises:
        ValueError: As for `audit`, and if a record holds no question.
        OSError: As for `audit`.
    """
    asked = read_questions(records)
    leaks = [
        compare_questions(
            asked, read_questions(read_source(test, "test", data_dir=data_dir)), name=test
        )
        for test in _list_tests(tests, data_dir)
    ]
    return AuditResult(train=name, num_records=len(records), leaks=tuple(leaks))


def named_test_sets(*, at_hand: bool = True, data_dir: str | Path | None = None) -> list[str]:
    """List the named test sets that can be read without a download, or all the others.

    Args:
        at_hand: Whether to list those that can be read so.
        data_dir: As for `catalog.load_split`.

    Returns:
        Names as `audit` takes them; HellaSwag's second sample is one of its own.
    """
    candidates = [
        (name, "test", name)
        for name, data_set in CATALOG.items()
        if "test" in data_set.splits or "test" in data_set.aliases
    ]
    further, split = FURTHER_SAMPLE.split(":")
    candidates.append((further, split, FURTHER_SAMPLE))
    return [
        listed
        for name, split, listed in candidates
        if is_at_hand(name, split, data_dir=data_dir) == at_hand
    ]


def read_source(source: str, split: str, *, data_dir: str | Path | None = None) -> Sequence[Record]:
    """Read what `audit` compares: a file as it is, or a named data set in its schema.

    Args:
        source: Path, name or id on the hub, the latter two perhaps with a colon and a split; an
            existing file wins.
        split: Split where `source` names none; files have none.
        data_dir: As for `catalog.load_split`.

    Returns:
        The records.

    Raises:
        ValueError: As for `audit`.
        OSError: As for `audit`.
    """
    path = Path(source).expanduser()
    if path.suffix == ".tsv" and path.is_file():
        return read_rows(path)
    if path.is_file():
        return load_records(source)
    name, _, named_split = source.partition(":")
    if "/" in name or (name not in CATALOG and is_path(name)):
        return load_records(name, split=named_split or split)
    return load_split(describe(name).name, named_split or split, data_dir=data_dir)


def write_rest(result: AuditResult, path: Path, *, data_dir: str | Path | None = None) -> int:
    """Write the training records that leak into no test set, ready to train on.

    Args:
        result: An audit.
        path: New JSONL file. Records of a named data set are written as instructions, those of a
            file as they are.
        data_dir: As for `audit`.

    Returns:
        Number of records written.

    Raises:
        FileExistsError: If there is such a file.
        ValueError: If the records cannot be trained on.
    """
    name, _, split = result.train.partition(":")
    if Path(result.train).expanduser().is_file():
        name, split = result.train, ""
    records = load_records(name, split=split or "train", data_dir=data_dir)
    leaking = set(result.leaking)
    rest = [record for number, record in enumerate(records) if number not in leaking]
    if path.exists():
        raise FileExistsError(f"`drop` must be a new file, and {path} exists; choose another name.")
    write_whole(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in rest))
    return len(rest)


def list_leaks(result: AuditResult, *, data_dir: str | Path | None = None) -> list[str]:
    """Say of each leaking record where it leaks, and what it asks.

    Args:
        result: An audit.
        data_dir: As for `audit`.

    Returns:
        One line per record, with its number from 0.
    """
    records = read_source(result.train, "train", data_dir=data_dir)
    lines = []
    for number in result.leaking:
        tests = [leak.test for leak in result.leaks if number in leak.same_letters]
        question = same_words(question_stems(records[number])[0])
        lines.append(f"{number} ({', '.join(tests)}): {question:.100}")
    return lines


def warn_of_leaks(
    records: Sequence[Record],
    source: str,
    *,
    split: str = "train",
    evaluation: str | None = None,
    num_items: int | None = None,
) -> None:
    """Warn if training records are in the run's own evaluation, or in a test set at hand.

    Nothing is downloaded: of evaluation records, a file or a named set at hand is compared, and
    none of the hub. A test set that cannot be read is named in a warning. Records without a
    readable question are taken to ask none.

    Args:
        records: Training records.
        source: Where they come from, for the message.
        split: The split that they are, where `source` is no file.
        evaluation: Source of the evaluation records, if there are any.
        num_items: Records of an evaluation file that count, from its start; `None` takes all.
    """
    own_file = evaluation if evaluation and Path(evaluation).expanduser().is_file() else None
    try:
        names = named_test_sets()
    except OSError as error:
        names = []
        warnings.warn(f"Leaks into named test sets could not be looked for: {error}", stacklevel=2)
    asked = read_questions(records, read=_readable_stems)
    found = []
    for name in ([own_file] if own_file else []) + names:
        try:
            test = (
                load_records(name, limit=num_items)
                if name == own_file
                else read_source(name, "test")
            )
        except (ValueError, OSError) as error:
            warnings.warn(f"Leaks into {name} could not be looked for: {error}", stacklevel=2)
            continue
        leak = compare_questions(asked, read_questions(test, read=_readable_stems), name=name)
        if leak.covered:
            found.append(leak)
    if not found:
        return
    num_leaking = len({record for leak in found for record in leak.same_letters})
    counts = ", ".join(f"{len(leak.same_letters):,} {leak.test}" for leak in found)
    if split != "train" and not Path(source).expanduser().is_file():
        source = f"{source}:{split}"
    command = shlex.join(["depthmix", "audit", source, *(leak.test for leak in found)])
    warnings.warn(
        f"{num_leaking:,} of {len(records):,} training records ask a question of a test set "
        f"({counts}), so scores there will be too high; `{command} --drop rest.jsonl` writes the "
        "others, and `data.without` leaves these out.",
        stacklevel=2,
    )


def _list_tests(tests: Sequence[str], data_dir: str | Path | None) -> list[str]:
    """Name the test sets that are meant, each once."""
    names = []
    for test in tests:
        names += named_test_sets(data_dir=data_dir) if test == "all" else [test]
    if not names:
        raise ValueError(
            "At least one test set must be named, and for `all` none is at hand; name a folder by "
            "`data_dir` or the environment variable DEPTHMIX_DATA."
        )
    return list(dict.fromkeys(names))


def _readable_stems(record: Record) -> list[str]:
    """Take the question out of a record; nothing where it cannot be read."""
    try:
        return question_stems(record)
    except ValueError:
        return []
