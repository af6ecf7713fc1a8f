"""How good a model is: benchmarks by lm-eval, answers, judges, statistics."""

from depthmix.libraries.extras import require

require("lab", "`depthmix.evaluation`")
