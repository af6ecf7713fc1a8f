"""Results in, tables and figures out: writes the measured parts of benchmarks/README.md.

`python benchmarks/report.py` replaces what stands between the markers of each part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cells import made_by, number, table
from decode_tables import generation_ratios, generation_table, texts_table
from growth import growth_figure
from training_tables import (
    distillation_table,
    grid_table,
    loss_table,
    ratio_table,
    step_table,
)

from depthmix.figures.style import save_figure

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent / "README.md"
IMAGES = ROOT / "docs" / "images"

EVALUATE_NAMES = {
    "lm_eval": "lm-eval alone, base model",
    "base": "**`depthmix evaluate`**, base model",
    "mode": "**`depthmix evaluate`**, MoDE and LoRA on it",
}

DEPTH_REPORT_NAMES = {
    "forwards": "both models' own forward passes, with logits",
    "forward": "the tuned model's alone",
    "report": "**the whole report**, text included",
    "page": "the report without a text",
}


def lazy_depth_table(results: dict[str, Any]) -> str:
    """Compare lazy depth by k, batch size and share of tokens that exit."""
    header = ["k", "batch", "version", "tokens/s", "layers a pass"]
    header += ["against dense", "against base", "time over bound"]
    names = {
        "base": "base model",
        "dense": "MoDE, dense",
        "bound": "cut off at the first late layer",
    }
    rows = []
    for case in results["cases"]:
        for name, version in case["versions"].items():
            rate = name.removeprefix("lazy_")
            label = names.get(name, f"**lazy depth**, {rate} exit")
            numbers = [f"{version[key]:.2f}" for key in ("speedup_over_dense", "speedup_over_base")]
            rows.append(
                [
                    str(case["k"]),
                    str(case["batch_size"]),
                    label,
                    number(version["tokens_per_second"]),
                    f"{version['layers_per_pass']:.1f}",
                    *numbers,
                    f"{version['time_over_bound']:.2f}",
                ]
            )
    size = f"32 prompt tokens, {results['num_tokens']} new ones, {results['dtype']}. "
    return f"{size}{made_by(results)}\n\n{table(header, rows)}"


def evaluate_table(results: dict[str, Any]) -> str:
    """Compare our evaluation with lm-eval's."""
    rows = [
        [
            label,
            number(version["seconds"]),
            f"{number(version['seconds_p20'])}-{number(version['seconds_p80'])}",
        ]
        for name, label in EVALUATE_NAMES.items()
        for version in [results["versions"][name]]
    ]
    size = (
        f"{results['num_items']} items of {results['data']}, four choices each, batches of "
        f"{results['batch_size']}, {results['dtype']}."
    )
    header = ["version", "seconds", "20-80 %"]
    return f"{size} {made_by(results)}\n\n{table(header, rows)}"


def depth_report_table(results: dict[str, Any]) -> str:
    """Compare the report of a run with the forward passes that it takes."""
    cases = results["cases"]

    def cell(version: dict[str, float]) -> str:
        low, high = (number(version[f"seconds_{end}"]) for end in ("p20", "p80"))
        return f"{number(version['seconds'])} ({low}-{high})"

    rows = [
        [label, *(cell(case["versions"][name]) for case in cases)]
        for name, label in DEPTH_REPORT_NAMES.items()
    ]
    for passes, words in {"forwards": "both passes", "forward": "the tuned model's"}.items():
        found = [case[f"seconds_beyond_{passes}"] for case in cases]
        cells = [f"{one['median']:.1f} (at most {one['slowest']:.1f})" for one in found]
        rows.append([f"the report beyond {words}, round by round", *cells])
    rows.append(["KiB of the page", *(number(case["page_kib"]) for case in cases)])
    tokens = f"{results['num_tokens']:,} tokens, k = {results['k']}, {results['rounds']} rounds"
    text = f"{tokens}: medians, and in brackets 20-80 %. {made_by(results)}"
    return f"{text}\n\n{table(['seconds', *(case['dtype'] for case in cases)], rows)}"


def kills_table(results: dict[str, Any]) -> str:
    """Say how often a command was interrupted, where it stood then, and what was lost."""
    names = {
        "train": "`train`, killed",
        "evaluate": "`evaluate`, killed",
        "reproduce": "`reproduce`, killed",
        "full_disk": "`train`, disk full",
    }
    rows = []
    for name, label in names.items():
        found = results["kinds"][name]
        stages = sorted(found["stages"].items(), key=lambda stage: -stage[1])
        counts = [str(found[key]) for key in ("interruptions", "trials")]
        where = ", ".join(f"{count} {stage}" for stage, count in stages)
        rows.append([label, *counts, str(len(found["lost"])), where])
    header = ["command", "interruptions", "trials", "lost", "where they fell"]
    return f"Seed {results['seed']}. {made_by(results)}\n\n{table(header, rows)}"


STARTUP_NAMES = {
    "import": "`import depthmix`",
    "peft": "`import peft, transformers.modeling_utils`",
    "compare": "**`depthmix compare`** of two evaluated runs",
    "compare_before": "the same, before",
    "dry_run": "**`depthmix reproduce table2 --dry-run`**",
    "dry_run_before": "the same, before",
    "generate": "**`depthmix generate`**, one token of a tiny model",
    "generate_before": "the same, before",
}


def startup_table(results: dict[str, Any]) -> str:
    """Compare what commands take before they do anything."""
    rows = []
    for name, label in STARTUP_NAMES.items():
        used = results["versions"][name]
        spread = f"{used['cpu_seconds_least']:.2f}-{used['cpu_seconds_most']:.2f}"
        rows.append([label, f"{used['cpu_seconds']:.2f}", spread, f"{used['wall_seconds']:.2f}"])
    header = ["process", "processor seconds", "least-most", "wall seconds"]
    text = f"Medians of {results['rounds']} rounds; before is commit {results['before']}. "
    return f"{text}{made_by(results)}\n\n{table(header, rows)}"


PARTS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "loss": ("loss", loss_table),
    "grid": ("loss", grid_table),
    "loss ratios": ("loss", ratio_table),
    "step": ("train_step", step_table),
    "step ratios": ("train_step", ratio_table),
    "distillation": ("distillation", distillation_table),
    "decode": ("decode", generation_table),
    "decode ratios": ("decode", generation_ratios),
    "decode texts": ("decode_texts", texts_table),
    "lazy depth": ("lazy_depth", lazy_depth_table),
    "lazy depth ratios": ("lazy_depth", ratio_table),
    "evaluate": ("evaluate", evaluate_table),
    "evaluate ratios": ("evaluate", ratio_table),
    "depth report": ("depth_report", depth_report_table),
    "kills": ("kills", kills_table),
    "startup": ("startup", startup_table),
    "startup ratios": ("startup", ratio_table),
}
"""Parts of the page: the results that each one reads, and what renders it."""


def render(page: str) -> str:
    """Replace every measured part of the page."""
    for part, (name, make) in PARTS.items():
        text = _fill(name, make)
        begin, end = f"<!-- begin {part} -->", f"<!-- end {part} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        filled = f"{begin}\n{text}\n{end}"
        page, count = pattern.subn(lambda _, filled=filled: filled, page)
        assert count == 1, f"benchmarks/README.md has {count} parts named {part!r}"
    return page


def _fill(name: str, make: Callable[[dict[str, Any]], str]) -> str:
    """Render a part from its results, or say that there are none yet."""
    file = RESULTS / f"{name}.json"
    if not file.is_file():
        return f"Not measured yet: `python benchmarks/{name}.py`."
    results = json.loads(file.read_text("utf-8"))
    if results["size"] != "full":
        raise SystemExit(f"results/{name}.json is of a {results['size']} run; run it in full.")
    return make(results)


def main() -> None:
    """Write the page and the figure."""
    PAGE.write_text(render(PAGE.read_text("utf-8")), "utf-8")
    results = json.loads((RESULTS / "loss.json").read_text("utf-8"))
    save_figure(growth_figure(results), IMAGES / "loss-growth.svg")


if __name__ == "__main__":
    main()
