"""Results in, tables and figures out: writes the measured parts of docs/performance.md.

`python benchmarks/report.py` replaces what stands between the markers of each part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from growth import growth_figure

from depthmix.figures.style import save_figure

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images"

LOSS_NAMES = {
    "mode_naive": "MoDE, the paper read literally",
    "mode_checkpointed": "the same, in chunks under activation checkpointing",
    "mode_liger": "MoDE from Liger-Kernel's chunked losses",
    "mode_trl": "MoDE from TRL's chunked losses",
    "mode_fused": "**MoDE, fused**",
    "mode_quarter": "fused, distilling a quarter of the tokens",
    "mode_topm": "fused, distilling the top 128 entries",
    "mode_lambda0": "fused, λ = 0",
    "ce_naive": "cross-entropy on full logits (Hugging Face)",
    "ce_torch": "`torch.nn.functional.linear_cross_entropy`",
    "ce_trl": "TRL's chunked log-probabilities",
    "ce_fused": "**cross-entropy, fused**",
    "mode_products": "lower bound of MoDE: its head products alone",
    "ce_products": "lower bound of cross-entropy: its head products alone",
}
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

STEP_NAMES = {
    "all": "LoRA_all, Hugging Face's loss",
    "all_trl": "LoRA_all, TRL's loss",
    "all_fused": "LoRA_all, fused cross-entropy",
    "below": "LoRA_¬K, Hugging Face's loss",
    "below_mode": "**LoRA_¬K + MoDE**",
    "below_mode_topm": "LoRA_¬K + MoDE, distilling the top 128 entries",
    "below_mode_lambda0": "LoRA_¬K + MoDE, λ = 0",
    "all_mode": "**LoRA_all + MoDE**",
    "below_mode_naive": "LoRA_¬K + MoDE, the plain loss on label tokens",
}


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """Render a Markdown table, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """Write a number with as many digits as it deserves."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def made_by(results: dict[str, Any]) -> str:
    """Say what made the numbers."""
    threads = f"{results['threads']} threads"
    return (
        f"`{results['command']}` on {results['device']}, {threads}, torch {results['torch']}, "
        f"commit {results['commit']}."
    )


def loss_table(results: dict[str, Any]) -> str:
    """Compare all versions at the main size."""
    case = results["cases"][0]
    versions = case["versions"]
    base = versions["ce_fused"]["seconds"]
    rows = []
    for name, label in LOSS_NAMES.items():
        if name not in versions:
            continue
        version = {key: 1e3 * value for key, value in versions[name].items()}
        rows.append(
            [
                label,
                number(version["seconds"]),
                f"{version['seconds_p20']:,.0f}-{version['seconds_p80']:,.0f}",
                f"{versions[name]['seconds'] / base:.2f}",
                number(versions[name]["peak_mib"]),
            ]
        )
    size = (
        f"{case['num_tokens']:,} label tokens, d = {case['hidden_size']}, "
        f"V = {case['vocab_size']:,}, k = {case['k']}, {case['dtype']} head."
    )
    header = ["version", "ms", "20-80 %", "relative time", "peak MiB"]
    return f"{size} {made_by(results)}\n\n{table(header, rows)}"


def grid_table(results: dict[str, Any]) -> str:
    """Compare the main versions over head dtype, k and share of ignored tokens."""
    names = ["mode_naive", "mode_fused", "mode_products", "mode_topm", "mode_lambda0"]
    names += ["ce_naive", "ce_fused"]
    header = ["head, V, k, ignored", "naive", "fused", "its products", "top 128", "λ = 0"]
    header += ["plain, naive", "plain, fused"]

    def cell(version: dict[str, float] | None) -> str:
        if version is None:
            return "not run"
        return f"{number(1e3 * version['seconds'])} ({number(version['peak_mib'])})"

    order = lambda case: (case["dtype"], case["vocab_size"], case["ignored"], case["k"])  # noqa: E731
    rows = [
        [
            f"{case['dtype']}, V = {case['vocab_size']:,}, {case['k']}, {case['ignored']:.0%}",
            *(cell(case["versions"].get(name)) for name in names),
        ]
        for case in sorted(results["cases"], key=order)
    ]
    return f"Milliseconds, and in brackets the peak in MiB.\n\n{table(header, rows)}"


def ratio_table(results: dict[str, Any]) -> str:
    """List the ratios as they stand in the results."""
    rows = [[f"`{key}`", number(value)] for key, value in results["ratios"].items()]
    return table(["ratio", "measured"], rows)


def step_table(results: dict[str, Any]) -> str:
    """Compare whole optimiser steps."""
    cases = results["cases"]
    header = ["method", *(f"{case['dtype']}, {case['loss_on']}" for case in cases)]

    def cell(case: dict[str, Any], name: str) -> str:
        if name not in case["versions"]:
            return "not run"
        version, base = case["versions"][name], case["versions"]["all"]
        times = version["seconds"] / base["seconds"]
        return f"{number(1e3 * version['seconds'])} ({times:.2f}; {number(version['peak_mib'])})"

    rows = [[label, *(cell(case, name) for case in cases)] for name, label in STEP_NAMES.items()]
    tokens = (
        f"{results['batch_size']} sequences of {results['data']} a step, in the mean "
        f"{results['prompt_tokens_per_step']:.0f} prompt and "
        f"{results['completion_tokens_per_step']:.0f} completion tokens, with the loss on "
        "completions or on every token."
    )
    explained = "Milliseconds; in brackets relative to the first row, and the peak in MiB."
    return f"{tokens} {made_by(results)} {explained}\n\n{table(header, rows)}"


def distillation_table(results: dict[str, Any]) -> str:
    """Say how far each approximation is from exact distillation."""
    header = ["router's start, distilled on", "loss / exact", "gradient's error", "cosine"]
    header += ["error of the mean of draws", "error in the total gradient"]
    rows = []
    for start, found in results["starts"].items():
        for name, row in found["approximations"].items():
            drawn = "tokens" in name
            spread = f" ± {row['value_spread']:.2f}" if drawn else ""
            rows.append(
                [
                    f"{start}, {name}",
                    f"{row['value_over_exact']:.2f}{spread}",
                    number(row["error"]),
                    f"{row['cosine']:.3f}",
                    number(row["error_of_average"]) if drawn else "the same",
                    number(row["error_of_total"]),
                ]
            )
    tokens = (
        f"{results['num_tokens']:,} label tokens of {results['data']}, k = 3, "
        f"{results['draws']} draws, λ = 0.1 in the total. "
    )
    return f"{tokens}{made_by(results)}\n\n{table(header, rows)}"


def decode_table(results: dict[str, Any]) -> str:
    """Compare generation by k, batch size and share of tokens that exit."""
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
    base = results["versions"]["lm_eval"]["seconds"]
    rows = [
        [
            label,
            number(version["seconds"]),
            f"{number(version['seconds_p20'])}-{number(version['seconds_p80'])}",
            f"{version['seconds'] / base:.2f}",
        ]
        for name, label in EVALUATE_NAMES.items()
        for version in [results["versions"][name]]
    ]
    size = (
        f"{results['num_items']} items of {results['data']}, four choices each, batches of "
        f"{results['batch_size']}, {results['dtype']}."
    )
    header = ["version", "seconds", "20-80 %", "relative time"]
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
    "decode": ("decode", decode_table),
    "decode ratios": ("decode", ratio_table),
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
        results = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
        if results["size"] != "full":
            raise SystemExit(f"results/{name}.json is of a {results['size']} run; run it in full.")
        begin, end = f"<!-- begin {part} -->", f"<!-- end {part} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        text = f"{begin}\n{make(results)}\n{end}"
        page, count = pattern.subn(lambda _, text=text: text, page)
        assert count == 1, f"docs/performance.md has {count} parts named {part!r}"
    return page


def main() -> None:
    """Write the page and the figure."""
    PAGE.write_text(render(PAGE.read_text("utf-8")), "utf-8")
    results = json.loads((RESULTS / "loss.json").read_text("utf-8"))
    save_figure(growth_figure(results), IMAGES / "loss-growth.svg")


if __name__ == "__main__":
    main()
