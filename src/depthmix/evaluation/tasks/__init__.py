"""Evaluation tasks in lm-eval's form: its own where it has them, else ours in YAML."""

from depthmix.libraries.extras import require

require("eval", "A benchmark, or training records in its text,", "lm_eval")

from depthmix.evaluation.tasks.configs import (  # noqa: E402
    PROTOCOLS,
    TASKS,
    main_metric,
    records_config,
    task_config,
)

__all__ = ["PROTOCOLS", "TASKS", "main_metric", "records_config", "task_config"]
