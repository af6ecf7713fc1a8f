"""How good a model is: benchmarks by lm-eval, answers, judges, statistics."""

from depthmix.extras import require

require("lab", "`depthmix.evaluation`")
