"""Evaluation tasks in lm-eval's form: its own where it has them, else ours in YAML."""

from depthmix.evaluation.tasks.configs import (
    PROTOCOLS,
    TASKS,
    main_metric,
    records_config,
    task_config,
)

__all__ = ["PROTOCOLS", "TASKS", "main_metric", "records_config", "task_config"]
