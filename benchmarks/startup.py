"""What commands cost before they do anything: processor time of whole processes, by turns.

`import` is `import depthmix`, beside the libraries that it stands on (`peft`: `import peft,
transformers.modeling_utils`). The commands run beside those of the library as it was (`before.py`):
`compare` of two evaluated runs, `dry_run` of an experiment, and `generate` of one token by a tiny
model.
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from random import Random

from before import COMMIT, Command, Side, alternate, cpu_ratio, find_today, prepare_before
from evaluate import save
from results import parse_arguments, rounded, write_results
from transformers.utils.logging import disable_progress_bar

NUM_ITEMS = 200
"""Items of each of the two evaluations that are compared."""

IMPORTS = {"import": "import depthmix", "peft": "import peft, transformers.modeling_utils"}

OF_BEFORE = ("compare", "dry_run", "generate")
"""Commands that are run on both sides."""


def depthmix(*arguments: str) -> Command:
    """Run the command line of a side."""
    return lambda side: [side.bin / "depthmix", *arguments]


def invent_evaluation(folder: Path, *, seed: int) -> None:
    """Write an evaluation of an invented task, as `depthmix evaluate` leaves it."""
    folder.mkdir(parents=True)
    about = {"method": folder.name, "model": "base", "protocol": "default", "layer": "ensemble"}
    about |= {"seed": 0, "main_metric": {"sums": "acc,none"}}
    results = {"results": {}, "group_subtasks": {}, "depthmix": about}
    (folder / "results.json").write_text(json.dumps(results), "utf-8")
    draw = Random(seed)
    with (folder / "samples_sums.jsonl").open("w", encoding="utf-8") as file:
        for item in range(NUM_ITEMS):
            sample = {"doc_id": item, "doc": {"question": f"sum {item}"}, "filter": "none"}
            sample |= {"metrics": ["acc"], "acc": float(draw.random() < 0.6)}
            file.write(json.dumps({**sample, "doc_hash": f"sums-{item}"}) + "\n")


def main() -> None:
    """Measure, compare, write."""
    arguments = parse_arguments(__doc__ or "", "startup")
    disable_progress_bar()
    rounds = 1 if arguments.toy else 3 if arguments.quick else 7
    today = find_today()
    before = today if arguments.toy else prepare_before()
    shared = {
        "compare": depthmix("compare", "lora", "mode"),
        "dry_run": depthmix("reproduce", "table2", "--scale", "small", "--dry-run"),
        "generate": depthmix("generate", "base", "Once", "--generation.max-new-tokens", "1"),
    }
    assert tuple(shared) == OF_BEFORE
    commands: dict[str, tuple[Side, Command]] = {}
    for name, code in IMPORTS.items():
        commands[name] = (
            today,
            partial(lambda code, side: [side.bin / "python", "-c", code], code),
        )
    for name, command in shared.items():
        commands |= {name: (today, command), f"{name}_before": (before, command)}
    with tempfile.TemporaryDirectory() as folder:
        save(f"{folder}/base", toy=True)
        for seed, name in enumerate(("lora", "mode")):
            invent_evaluation(Path(folder, name), seed=seed)
        measured = alternate(
            commands, rounds=rounds, folder=Path(folder), warm_ups=0 if arguments.toy else 1
        )
    ratios = {"import_over_peft": cpu_ratio(measured, "import", "peft")}
    ratios |= {f"{n}_over_before": cpu_ratio(measured, n, f"{n}_before") for n in OF_BEFORE}
    versions = {name: rounded(used.summary().items()) for name, used in measured.items()}
    results = {"before": COMMIT, "rounds": rounds, "versions": versions}
    write_results(arguments, {**results, "ratios": dict(rounded(ratios.items()))})


if __name__ == "__main__":
    main()
