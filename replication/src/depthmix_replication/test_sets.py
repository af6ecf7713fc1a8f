"""The test sets whose questions no run trains on: all that there are, on every machine.

HellaSwag's are two local samples of 1,000 records, or the hub's 10,042.
"""

from __future__ import annotations

from collections.abc import Iterable

from depthmix.data.audit import FURTHER_SAMPLE, named_test_sets, read_source
from depthmix.data.source_files import DATA_VARIABLE


def list_test_sets(without: Iterable[str], *, data_dir: str | None = None) -> list[str]:
    """Write out which test sets a run leaves out, wherever they are read from.

    A run by hand takes `all` for those at hand. Here it stands for all that there are, since a run
    made with fewer of them is another one.

    Args:
        without: Test sets, `all` perhaps among them.
        data_dir: Local folder of data sets, instead of the environment's.

    Returns:
        Names as `data.without` takes them. HellaSwag's further sample is only one of its own where
        both are local files; on the hub the test set holds it.
    """
    given = list(without)
    if "all" not in given:
        return given
    elsewhere = named_test_sets(at_hand=False, data_dir=data_dir)
    whole = {FURTHER_SAMPLE} if FURTHER_SAMPLE.partition(":")[0] in elsewhere else set()
    every = [*named_test_sets(data_dir=data_dir), *elsewhere, *given]
    return [name for name in dict.fromkeys(every) if name != "all" and name not in whole]


def fetch_test_sets(without: Iterable[str], *, data_dir: str | None = None) -> list[str]:
    """Get the test sets that are not at hand from their public sources.

    Args:
        without: As for `list_test_sets`.
        data_dir: As for `list_test_sets`.

    Returns:
        What `list_test_sets` gives.

    Raises:
        FileNotFoundError: If one is not to be had.
        ValueError: If one is not what the catalogue says.
    """
    elsewhere = {*named_test_sets(at_hand=False, data_dir=data_dir)}
    missing: dict[str, OSError] = {}
    names = list_test_sets(without, data_dir=data_dir)
    for name in names:
        if name in elsewhere:
            try:
                read_source(name, "test", data_dir=data_dir)
            except OSError as error:
                missing[name] = error
    if missing:
        first = next(iter(missing.values()))
        raise FileNotFoundError(
            "`data.without` must leave out the questions of all named test sets, since a run made "
            f"with fewer of them is another one, and {', '.join(missing)} are neither at hand nor "
            f"to be had; put their files into a folder (docs/data.md), and name it by `data_dir` "
            f"or the environment variable {DATA_VARIABLE}."
        ) from first
    return names
