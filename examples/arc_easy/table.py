"""Print the table of finished runs: `python examples/arc_easy/table.py runs/arc/{lora-below,*}`.

Each run is compared with the first one on the same items. What is no finished run is passed over.
"""

from __future__ import annotations

import sys
from pathlib import Path

from depthmix.evaluation.result import TaskResult
from depthmix.statistics.intervals import paired_difference
from depthmix.training.folder import load_result


def main(folders: list[Path]) -> None:
    """Print one row per run."""
    finished = [path for path in folders if (path / "results.json").is_file()]
    runs = {path.name: load_result(path) for path in finished}
    rows: dict[str, TaskResult] = {n: run.after.task for n, run in runs.items() if run.after}
    before = next((run.before for run in runs.values() if run.before is not None), None)
    if before is not None:
        rows = {"pretrained": before.task, **rows}
    first = next(name for name in rows if name != "pretrained")
    print(
        "| run | trainable | accuracy, % (95 %) | difference, points (95 %) | p | nll | minutes |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, task in rows.items():
        low, high = 100 * task.interval.low, 100 * task.interval.high
        cells = [name, "-", f"{100 * task.mean:.1f} ({low:.1f} to {high:.1f})", "-", "-"]
        if name in runs:
            cells[1] = f"{runs[name].ledger.total:,}"
        if name != first:
            d = paired_difference(list(rows[first].scores.values()), list(task.scores.values()))
            low, high = 100 * d.interval.low, 100 * d.interval.high
            cells[3] = f"{100 * d.estimate:+.1f} ({low:+.1f} to {high:+.1f})"
            cells[4] = f"{d.p_value:.2f}"
        cells.append(f"{task.measures['nll']:.3f}")
        minutes = runs[name].metrics["total_seconds"] / 60 if name in runs else None
        cells.append("-" if minutes is None else f"{minutes:.0f}")
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
