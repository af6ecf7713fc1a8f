"""Recorded exits and costs of a model that there is not, for cascades on paper."""

from __future__ import annotations

import numpy as np

from depthmix.depth.confidences import Confidences
from depthmix.depth.costs import Costs

LAYERS, NUM_LAYERS = (2, 3, 6), 8


def make_costs(**options) -> Costs:
    values = {
        "rows": (1, 2, 4),
        "layer": (1.0, 1.5, 2.0),
        "head": (7.0, 9.0, 14.0),
        "vocabulary_sizes": (10, 100),
        "exit": (0.25, 1.0),
        "step": 0.5,
        "prompt": 3.0,
        "num_prompt_tokens": 5,
        "device": "cpu",
        "dtype": "float32",
    }
    return Costs(**values | options)


def make_recorded(confidence, agrees, lengths, *, ended=False) -> Confidences:
    return Confidences(
        layers=LAYERS,
        vocabulary=tuple(range(40)),
        confidence=np.asarray(confidence, dtype=np.float32),
        agrees=np.asarray(agrees, dtype=bool),
        lengths=np.asarray(lengths),
        ended=np.zeros(len(lengths), dtype=bool) | ended,
        coverage=1.0,
    )
