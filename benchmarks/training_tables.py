"""Tables of what training costs: the loss, a step, the parts of distillation."""

from __future__ import annotations

from typing import Any

from cells import made_by, number, table

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


STEP_NAMES = {
    "all": "LoRA_all, Hugging Face's loss",
    "all_trl": "LoRA_all, TRL's loss",
    "all_fused": "LoRA_all, fused cross-entropy",
    "below": "LoRA_¬K, Hugging Face's loss",
    "below_mode": "**LoRA_¬K + MoDE**",
    "below_mode_topm": "LoRA_¬K + MoDE, distilling the top 128 entries",
    "below_mode_lambda0": "LoRA_¬K + MoDE, λ = 0",
    "below_mode_exits": "LoRA_¬K + MoDE, with three exits",
    "all_mode": "**LoRA_all + MoDE**",
    "below_mode_naive": "LoRA_¬K + MoDE, the plain loss on label tokens",
}


def loss_table(results: dict[str, Any]) -> str:
    """Compare all versions at the main size."""
    case = results["cases"][0]
    versions = case["versions"]
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
                number(versions[name]["peak_mib"]),
            ]
        )
    size = (
        f"{case['num_tokens']:,} label tokens, d = {case['hidden_size']}, "
        f"V = {case['vocab_size']:,}, k = {case['k']}, {case['dtype']} head."
    )
    header = ["version", "ms", "20-80 %", "peak MiB"]
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
        version = case["versions"][name]
        return f"{number(1e3 * version['seconds'])} ({number(version['peak_mib'])})"

    names = {name for case in cases for name in case["versions"]}
    labels = {name: label for name, label in STEP_NAMES.items() if name in names}
    rows = [[label, *(cell(case, name) for case in cases)] for name, label in labels.items()]
    tokens = (
        f"{results['batch_size']} sequences of {results['data']} a step, in the mean "
        f"{results['prompt_tokens_per_step']:.0f} prompt and "
        f"{results['completion_tokens_per_step']:.0f} completion tokens, with the loss on "
        "completions or on every token."
    )
    explained = "Milliseconds, and in brackets the peak in MiB."
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
