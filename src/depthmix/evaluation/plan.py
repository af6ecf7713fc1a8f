"""What to measure, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from depthmix.data.spec import Metric, Template
from depthmix.evaluation.conversations import MTBenchSpec
from depthmix.evaluation.judge import JudgeSpec
from depthmix.evaluation.names import JUDGED_METRICS, TASKS
from depthmix.files.settings import build_section
from depthmix.method.config import Readout
from depthmix.options.types import check_number, checked_options


@checked_options
@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What to measure, and how."""

    tasks: tuple[str, ...] = ()
    """Named data sets (`TASKS`), `mt_bench` or `truthfulqa_judged`; `all` stands for those that
    need no judge."""

    records: str | None = None
    """File of the user's own records."""

    metric: Metric | None = None
    """How own records are judged: by a generated answer, by the likeliest of given choices, or by
    their loss; by default by what they hold, as in training."""

    max_new_tokens: int = 128
    """Tokens to generate per answer to own records at most."""

    template: Template | None = None
    """How a record of one's own becomes text, as in training; by default as in the run's, and
    for other models `auto`."""

    protocol: Literal["default", "llm-adapters"] = "default"
    """`default`: lm-eval's tasks, greedy and strict. `llm-adapters`: LLM-Adapters' prompt, beams
    and rules, for comparison with published numbers."""

    layer: Readout = "ensemble"
    """Which depth answers: the ensemble, `final`, or the number of a late layer."""

    data_dir: str | None = None
    """Local folder of data sets, instead of DEPTHMIX_DATA or public sources."""

    limit: int | None = None
    """Items per task, from the start; all by default."""

    num_fewshot: int | None = None
    """Examples in the prompt, instead of each task's own number."""

    batch_size: int = 16
    """Sequences that are run together."""

    seed: int = 0
    """Random state of few-shot examples and of sampling."""

    judge: JudgeSpec | None = None
    """Who rates answers; needed by `mt_bench` and `truthfulqa_judged` alone."""

    mt_bench: MTBenchSpec | None = None
    """How the model answers MT-Bench; `None` takes the defaults."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))  # a list is as good
        if not self.tasks and self.records is None:
            raise ValueError(
                "`tasks` must name at least one data set, or `records` a file of own ones; `all` "
                "stands for all named sets."
            )
        if self.layer not in ("ensemble", "final") and not isinstance(self.layer, int):
            raise ValueError(
                f"`layer` must be `ensemble`, `final` or the number of a layer, got {self.layer!r}."
            )
        for name in ("limit", "batch_size", "max_new_tokens"):
            check_number(name, getattr(self, name), at_least=1)
        for name in ("num_fewshot", "seed"):
            check_number(name, getattr(self, name), at_least=0)
        judged = sorted(set(JUDGED_METRICS) & set(self.tasks))
        if judged and self.judge is None:
            raise ValueError(
                f"`tasks` names {judged[0]}, whose answers a judge must rate; pass "
                "`judge.model` and, for another endpoint than OpenAI's, `judge.base_url`."
            )
        self._refuse_what_would_be_ignored(judged)

    def _refuse_what_would_be_ignored(self, judged: list[str]) -> None:
        """Check that every option that is given has an effect."""
        if self.judge is not None and not judged:
            raise ValueError(
                f"`judge` is for {' and '.join(JUDGED_METRICS)}, and `tasks` names neither; leave "
                "it out, or add one."
            )
        if self.mt_bench is not None and "mt_bench" not in self.tasks:
            raise ValueError("`mt_bench` has options, and `tasks` does not name it; add it.")
        own = (self.metric, self.template, self.max_new_tokens)
        if self.records is None and own != (None, None, 128):
            raise ValueError(
                "`metric`, `template` and `max_new_tokens` are for own `records`; pass them, too."
            )
        if self.max_new_tokens != 128 and self.metric not in (None, "exact_match"):
            raise ValueError(
                f"`max_new_tokens` has no effect on the metric {self.metric}; leave it out."
            )
        other = [*judged, *(["records"] if self.records is not None else [])]
        if other and (self.num_fewshot is not None or self.protocol != "default"):
            raise ValueError(
                f"`num_fewshot` and `protocol` have no effect on {other[0]}; evaluate it by itself."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The named sets, each once."""
        every = TASKS[self.protocol]
        named = [name for task in self.tasks for name in (every if task == "all" else [task])]
        return tuple(dict.fromkeys(named))


def read_plan(options: Mapping[str, Any]) -> EvaluationPlan:
    """Read a plan from options as a command line gives them.

    Args:
        options: Values by field of `EvaluationPlan`; `tasks` with commas between them, `judge` and
            `mt_bench` as mappings of texts or None.

    Returns:
        The plan.

    Raises:
        ValueError: If an option is unknown or does not fit.
    """
    options = dict(options)
    tasks = options.pop("tasks", None) or ""
    sections = {"judge": JudgeSpec, "mt_bench": MTBenchSpec}
    for name, owner in sections.items():
        values = options.pop(name, None)
        options[name] = build_section(name, values, owner) if values else None
    return EvaluationPlan(
        tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()), **options
    )
