"""Where the evaluations of a run and of its neighbours lie."""

from __future__ import annotations

from pathlib import Path

from depthmix.evaluation.earlier import read_earlier
from depthmix.evaluation.folder import RESULTS_NAME
from depthmix.evaluation.reading import load_evaluation
from depthmix.evaluation.result import PRETRAINED_NAME, TRAINING_NAME, EvaluationResult
from depthmix.files.runs import RUN_CONFIG_NAME


def find_evaluation(run: str | Path) -> Path:
    """Find the evaluation that a path stands for.

    Args:
        run: Folder of an evaluation, or of a run with exactly one evaluation in `evaluation/`
            beside the one that training left there, which stands for the run where it is alone; or
            the folder `pretrained` of a run, which stands for its pretrained model.

    Returns:
        The evaluation's folder; of a run that an earlier version measured in training, its own.

    Raises:
        ValueError: If the run has several evaluations.
        OSError: If there is none.
    """
    folder = Path(run).expanduser()
    inner = folder / "evaluation"
    found = list_evaluations(folder)
    made = [path for path in found if path.name != TRAINING_NAME]
    if len(made) > 1:
        raise ValueError(
            f"`runs` must each stand for one evaluation, and {folder} has {len(found)}; name one "
            f"of {', '.join(map(str, found))}."
        )
    if found:
        return (made or list(found))[0]
    is_run = (folder / RUN_CONFIG_NAME).is_file() or (folder / "adapter_config.json").is_file()
    if not is_run and not inner.is_dir() and (folder / RESULTS_NAME).is_file():
        return folder
    if is_run and read_earlier(folder):
        return folder
    if is_run or inner.is_dir():
        raise FileNotFoundError(
            f"`runs` must be evaluated, and {folder} holds no finished evaluation; run "
            f"`depthmix evaluate {folder}`."
        )
    raise FileNotFoundError(
        f"`runs` must be folders of evaluations or of evaluated runs, and {folder} holds "
        f"neither {RESULTS_NAME} nor evaluation/; run `depthmix evaluate {folder}`."
    )


def list_evaluations(run: str | Path) -> tuple[Path, ...]:
    """List the finished evaluations in a run's folder, by name.

    Args:
        run: The folder.

    Returns:
        The folders of its evaluations; none where the run has not been evaluated.
    """
    inner = Path(run).expanduser() / "evaluation"
    return tuple(sorted(path.parent for path in inner.glob(f"*/{RESULTS_NAME}")))


def is_run(folder: Path) -> bool:
    """Tell whether a folder holds a run, or evaluations of a pretrained model.

    Args:
        folder: The folder.
    """
    return (folder / RUN_CONFIG_NAME).is_file() or bool(list_evaluations(folder))


def list_neighbours(run: Path) -> list[Path]:
    """List the other runs in a run's folder, by name.

    Args:
        run: Folder of the run.
    """
    folders = sorted(path for path in run.resolve().parent.iterdir() if path.is_dir())
    return [path for path in folders if path != run.resolve() and is_run(path)]


def load_evaluations(run: Path) -> list[EvaluationResult]:
    """Read all evaluations in a run.

    Args:
        run: Its folder.

    Returns:
        Its own, those of its pretrained model, and last what a run of an earlier version measured
        in training.

    Raises:
        ValueError: If a file is damaged.
        OSError: If one is missing.
    """
    folders = [*list_evaluations(run), *list_evaluations(run / PRETRAINED_NAME)]
    earlier = read_earlier(run)
    found = [load_evaluation(folder) for folder in folders]
    return found + [earlier[moment] for moment in ("after", "before") if moment in earlier]
