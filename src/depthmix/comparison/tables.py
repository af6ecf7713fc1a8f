"""A comparison as text for the terminal, Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic_core import to_jsonable_python
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from depthmix.comparison.notes import notes
from depthmix.comparison.recovery import Gap
from depthmix.comparison.scores import Comparison, MethodScore, TaskComparison
from depthmix.comparison.written_numbers import (
    write_ends,
    write_ends_in_nats,
    write_nats,
    write_p_value,
    write_percent,
)
from depthmix.files.drafts import write_whole
from depthmix.files.markdown import escape

FILE_STEM = "comparison"

LATEX_ESCAPES = str.maketrans(
    {sign: f"\\{sign}" for sign in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}"}
)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells of plain text, before any markup."""

    header: tuple[str, ...]
    """Names of the columns."""

    align: tuple[Literal["left", "right"], ...]
    """Side on which each column is flush; `right` for numbers."""

    groups: tuple[tuple[tuple[str, ...], ...], ...]
    """Rows, in groups that belong together."""


def score_table(comparison: Comparison) -> Table:
    """Lay out each method's score on each task, and its difference from the baseline."""
    return Table(
        header=(
            *("task", "items", "method", "seeds", "score, % (95 %)"),
            *("difference, points (95 %)", "p", "p (Holm)"),
        ),
        align=("left", "right", "left", *("right",) * 5),
        groups=tuple(
            tuple(
                (
                    *((row.task, f"{row.num_items:,}") if score is row.scores[0] else ("", "")),
                    *_score_cells(score, is_loss=row.is_loss),
                )
                for score in row.scores
            )
            for row in comparison.rows
        ),
    )


def overlap_table(comparison: Comparison) -> Table | None:
    """Lay out how many items each set of methods solves and the others do not.

    Args:
        comparison: Of any number of methods.

    Returns:
        The table; `None` if no task has right and wrong answers, or there is only one method.
    """
    tasks = [row for row in comparison.tasks if row.overlaps]
    if not tasks or len(comparison.methods) == 1:
        return None
    return Table(
        header=("task", "solved by these methods alone", "items", "%"),
        align=("left", "left", "right", "right"),
        groups=tuple(
            tuple(
                (
                    row.task if overlap is row.overlaps[0] else "",
                    "; ".join(overlap.methods) or "none",
                    f"{overlap.num_items:,}",
                    write_percent(overlap.num_items / row.num_items),
                )
                for overlap in row.overlaps
            )
            for row in tasks
        ),
    )


def recovery_table(comparison: Comparison) -> Table | None:
    """Lay out how much of a gap between two methods a third one recovers.

    Args:
        comparison: Of any methods.

    Returns:
        The table; `None` if no gap was asked for.
    """
    if not comparison.recoveries:
        return None
    groups: dict[Gap, list[tuple[str, ...]]] = {}
    for one in comparison.recoveries:
        gap, own = one.gap, groups.setdefault(one.gap, [])
        labels = ("", "") if own else (gap.method, f"{gap.start} to {gap.goal}")
        width = f"{write_percent(one.width, '+')} ({write_ends(one.width_interval, '+')})"
        share = f"undefined: {one.undefined}"
        if one.share is not None and one.share_interval is not None:
            share = f"{write_percent(one.share)} ({write_ends(one.share_interval)})"
        own.append((*labels, one.task, width, share))
    return Table(
        header=("method", "gap", "task", "gap, points (95 %)", "recovered, % (95 %)"),
        align=("left", "left", "left", "right", "right"),
        groups=tuple(map(tuple, groups.values())),
    )


def to_text(comparison: Comparison) -> str:
    """Write the tables and notes for a terminal."""
    # Wide enough for any table: how a line is cut is the terminal's business.
    console = Console(file=io.StringIO(), width=1000, color_system=None)
    with console.capture() as capture:
        for table in _tables(comparison):
            shown = RichTable(box=SIMPLE, show_edge=False)
            for name, side in zip(table.header, table.align, strict=True):
                shown.add_column(Text(name), justify=side)
            for group in table.groups:
                for row in group:
                    shown.add_row(*map(Text, row))
                shown.add_section()
            console.print(shown)
            console.print()
    lines = [line.rstrip() for line in capture.get().splitlines()]
    return "\n".join([*lines, *notes(comparison)])


def to_markdown(comparison: Comparison) -> str:
    """Write the tables and notes as Markdown."""
    parts = []
    for table in _tables(comparison):
        rules = ["---:" if side == "right" else "---" for side in table.align]
        rows = [row for group in table.groups for row in group]
        cells = [[escape(cell) for cell in row] for row in rows]
        lines = [table.header, rules, *cells]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    parts += [escape(note) for note in notes(comparison)]
    return "\n\n".join(parts) + "\n"


def to_latex(comparison: Comparison) -> str:
    r"""Write the tables and notes as LaTeX, with the rules of booktabs, to `\input` somewhere."""
    parts = [r"% Needs \usepackage{booktabs}."]
    for table in _tables(comparison):
        columns = "".join(side[0] for side in table.align)
        groups = [
            "\n".join(_latex_row(row, table.align) for row in group) for group in table.groups
        ]
        header = " & ".join(name.translate(LATEX_ESCAPES) for name in table.header)
        body = "\n\\addlinespace\n".join(groups)
        parts.append(
            f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{header} \\\\\n\\midrule\n"
            f"{body}\n\\bottomrule\n\\end{{tabular}}\n"
        )
    sentences = " ".join(notes(comparison)).translate(LATEX_ESCAPES)
    return "\n".join([*parts, f"{{\\footnotesize {sentences}\\par}}"]) + "\n"


def to_csv(comparison: Comparison) -> str:
    """Write one line per task and method, all digits; scores from 0 to 1, losses in nats."""
    file = io.StringIO()
    lines = [_csv_line(row, score) for row in comparison.rows for score in row.scores]
    writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def to_json(comparison: Comparison) -> str:
    """Write everything that a comparison holds, and the notes."""
    content = asdict(comparison) | {"notes": notes(comparison)}
    return json.dumps(to_jsonable_python(content), indent=2, ensure_ascii=False) + "\n"


WRITERS = {".json": to_json, ".csv": to_csv, ".md": to_markdown, ".tex": to_latex}


def write_tables(
    comparison: Comparison, directory: Path, *, overwrite: bool = False
) -> tuple[Path, ...]:
    """Write a comparison as JSON, CSV, Markdown and LaTeX.

    Args:
        comparison: What `compare` returned.
        directory: Folder for the four files; made if missing.
        overwrite: Replace files of an earlier comparison.

    Returns:
        The written files.

    Raises:
        FileExistsError: If one of the files exists and may not be replaced; none is written then.
    """
    paths = {suffix: directory / f"{FILE_STEM}{suffix}" for suffix in WRITERS}
    if not overwrite and (existing := [str(path) for path in paths.values() if path.exists()]):
        raise FileExistsError(
            f"`output` must not hold an earlier comparison, and {', '.join(existing)} exists; "
            "choose another folder, or replace it with `overwrite=True`."
        )
    texts = {suffix: write(comparison) for suffix, write in WRITERS.items()}
    directory.mkdir(parents=True, exist_ok=True)
    for suffix, path in paths.items():
        write_whole(path, texts[suffix])
    return tuple(paths.values())


def _tables(comparison: Comparison) -> list[Table]:
    """List the tables that there are."""
    further = recovery_table(comparison), overlap_table(comparison)
    return [score_table(comparison), *(table for table in further if table is not None)]


def _score_cells(score: MethodScore, *, is_loss: bool) -> tuple[str, ...]:
    """Write one method's numbers, in percent and percentage points, or in nats."""
    write, ends = (write_nats, write_ends_in_nats) if is_loss else (write_percent, write_ends)
    unit = " nats" if is_loss else ""
    cells = (
        score.method,
        str(score.num_seeds),
        f"{write(score.mean)}{unit} ({ends(score.interval)})",
    )
    if score.difference is None or score.adjusted_p_value is None:
        return (*cells, "-", "-", "-")
    difference = score.difference
    return (
        *cells,
        f"{write(difference.estimate, '+')}{unit} ({ends(difference.interval, '+')})",
        write_p_value(difference.p_value),
        write_p_value(score.adjusted_p_value),
    )


def _latex_row(row: tuple[str, ...], align: tuple[str, ...]) -> str:
    """Write a row, with true minus signs in columns of numbers."""
    cells = [cell.translate(LATEX_ESCAPES) for cell in row]
    cells = [
        re.sub(r"-(?=\d)", "$-$", cell) if side == "right" else cell
        for cell, side in zip(cells, align, strict=True)
    ]
    return f"{' & '.join(cells)} \\\\"


def _csv_line(row: TaskComparison, score: MethodScore) -> dict[str, str | int | float | None]:
    """Name the numbers of one method on one task."""
    line = {
        "task": row.task,
        "metric": row.metric,
        "items": row.num_items,
        "method": score.method,
        "seeds": score.num_seeds,
        "score": score.mean,
        "score_low": score.interval.low,
        "score_high": score.interval.high,
    }
    names = ("difference", "difference_low", "difference_high", "test", "p", "p_holm")
    if score.difference is None:
        return line | dict.fromkeys(names)
    d = score.difference
    values = (d.estimate, d.interval.low, d.interval.high, d.test, d.p_value)
    return line | dict(zip(names, (*values, score.adjusted_p_value), strict=True))
