"""How the loss grows: time and peak memory against tokens, vocabulary and k."""

from __future__ import annotations

from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from depthmix.figures.style import STYLE


def growth_figure(results: dict[str, Any]) -> Figure:
    """Draw time and memory against tokens, vocabulary and k."""
    growth, main = results["growth"], results["cases"][0]
    axes_of = {"num_tokens": "label tokens", "vocab_size": "vocabulary", "k": "k"}
    labels = {
        "mode_fused": ("MoDE, fused", "#2f81c7", "-"),
        "mode_products": ("its head products alone", "#2f81c7", ":"),
        "ce_fused": ("cross-entropy, fused", "#d9730d", "-"),
        "ce_products": ("its head products alone", "#d9730d", ":"),
    }
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 5), layout="constrained")
        axes = figure.subplots(2, 3, sharex="col", sharey="row")
        for column, (field, label) in enumerate(axes_of.items()):
            others = [name for name in axes_of if name != field]
            cases = [case for case in growth if all(case[o] == main[o] for o in others)]
            cases = sorted({case[field]: case for case in cases}.values(), key=lambda c: c[field])
            for name, (text, colour, line) in labels.items():
                x = [case[field] for case in cases]
                for row, unit in enumerate(("seconds", "peak_mib")):
                    if row and line == ":":
                        continue
                    y = [case["versions"][name][unit] for case in cases]
                    axes[row][column].plot(
                        x, y, line, color=colour, marker=".", label=text, linewidth=1.6
                    )
            axes[1][column].set_xlabel(label)
            axes[1][column].set_xlim(left=0)
        for row, label in enumerate(("time (s)", "peak memory (MiB)")):
            axes[row][0].set_ylabel(label)
            axes[row][0].set_ylim(bottom=0)
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
