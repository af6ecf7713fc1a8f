"""Print the table of finished runs: `python examples/arc_easy/table.py runs/arc/{lora-below,*}`.

Each run is compared with the first one on the same items. What is no finished run is passed over.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from depthmix.evaluation.scoring import Evaluation
from depthmix.statistics.intervals import paired_difference


def read_evaluation(results: dict, moment: str) -> Evaluation:
    """Read one evaluation of a run's `results.json`."""
    saved = results[moment]
    correct = tuple(saved["correct"])
    return Evaluation(
        metric=saved["metric"],
        correct=correct,
        responses=("",) * len(correct),
        measures=saved["measures"],
    )


def main(folders: list[Path]) -> None:
    """Print one row per run."""
    files = [path / "results.json" for path in folders if (path / "results.json").is_file()]
    runs = {path.parent.name: json.loads(path.read_text("utf-8")) for path in files}
    rows = {name: read_evaluation(results, "after") for name, results in runs.items()}
    base = next((r for r in runs.values() if "before" in r), None)
    if base is not None:
        rows = {"pretrained": read_evaluation(base, "before"), **rows}
    first = next(name for name in rows if name != "pretrained")
    print(
        "| run | trainable | accuracy, % (95 %) | difference, points (95 %) | p | nll | minutes |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, evaluation in rows.items():
        low, high = 100 * evaluation.interval.low, 100 * evaluation.interval.high
        cells = [name, "-", f"{100 * evaluation.accuracy:.1f} ({low:.1f} to {high:.1f})", "-", "-"]
        if name in runs:
            cells[1] = f"{runs[name]['ledger']['total']:,}"
        if name != first:
            d = paired_difference(rows[first].correct, evaluation.correct)
            low, high = 100 * d.interval.low, 100 * d.interval.high
            cells[3] = f"{100 * d.estimate:+.1f} ({low:+.1f} to {high:+.1f})"
            cells[4] = f"{d.p_value:.2f}"
        cells.append(f"{evaluation.measures['nll']:.3f}")
        minutes = runs[name]["metrics"]["total_seconds"] / 60 if name in runs else None
        cells.append("-" if minutes is None else f"{minutes:.0f}")
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
