"""Where the evaluations of a run lie."""

from __future__ import annotations

from pathlib import Path

from depthmix.evaluation.folder import RESULTS_NAME
from depthmix.files.runs import RUN_CONFIG_NAME


def find_evaluation(run: str | Path) -> Path:
    """Find the evaluation that a path stands for.

    Args:
        run: Folder of an evaluation, or of a run with exactly one evaluation in `evaluation/`.

    Returns:
        The evaluation's folder.

    Raises:
        ValueError: If the run has several evaluations.
        OSError: If there is none.
    """
    folder = Path(run).expanduser()
    inner = folder / "evaluation"
    if not inner.is_dir():
        if (folder / RUN_CONFIG_NAME).is_file() or (folder / "adapter_config.json").is_file():
            raise FileNotFoundError(
                f"`runs` must be evaluated by `depthmix evaluate`, and {folder} is a run that was "
                "not: what it measured in training stays in its results.json, where `depthmix "
                f"report {folder}` shows it; run `depthmix evaluate {folder}` to compare it."
            )
        if (folder / RESULTS_NAME).is_file():
            return folder
        raise FileNotFoundError(
            f"`runs` must be folders of evaluations or of evaluated runs, and {folder} holds "
            f"neither {RESULTS_NAME} nor evaluation/; run `depthmix evaluate {folder}`."
        )
    found = list_evaluations(folder)
    if not found:
        raise FileNotFoundError(
            f"`runs` must be evaluated, and {inner} holds no finished evaluation; run "
            f"`depthmix evaluate {folder}`."
        )
    if len(found) > 1:
        raise ValueError(
            f"`runs` must each stand for one evaluation, and {folder} has {len(found)}; name one "
            f"of {', '.join(map(str, found))}."
        )
    return found[0]


def list_evaluations(run: str | Path) -> tuple[Path, ...]:
    """List the finished evaluations in a run's folder, by name.

    Args:
        run: The folder.

    Returns:
        The folders of its evaluations; none where the run has not been evaluated.
    """
    inner = Path(run).expanduser() / "evaluation"
    return tuple(sorted(path.parent for path in inner.glob(f"*/{RESULTS_NAME}")))
