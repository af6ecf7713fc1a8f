"""How good a model is: benchmarks by lm-eval, answers, judges, statistics."""
