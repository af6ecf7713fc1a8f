"""Other ways to generate on a tuned model: transformers' own, by settings, and a dense mixture."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

from answers import Way, answer_by
from earlier_classes import hold_on_final_layer
from tuned_subject import Subject

from depthmix import attach
from depthmix.method.placement import to_accelerator
from depthmix.models.loading import load_model
from depthmix.models.spec import ModelSpec

CONFIDENCES = (0.4, 0.8)
"""Confidences below which `assistant_early_exit` stops drafting, as they are tried; 0.4 is
transformers' own."""

LOOKUPS = (3, 10)
"""Tokens that prompt lookup proposes at most, as they are tried."""


def early_exit_ways(subject: Subject) -> dict[str, Way]:
    """Let transformers draft with the model's own lower layers, by settings."""
    model = subject.model
    depth = model.config.num_hidden_layers
    layers = sorted({subject.exits.layers[-1], max(depth - 2, 1), depth - 1})

    def make(layer: int, confidence: float) -> Way:
        config = subject.config
        config.assistant_early_exit = layer

        def generate(**inputs: Any) -> Any:
            model.generation_config.assistant_confidence_threshold = confidence
            return model.generate(**inputs)

        return answer_by(generate, config, device=subject.device)

    return {
        f"layer {layer}, confidence {confidence}": make(layer, confidence)
        for layer, confidence in product(layers, CONFIDENCES)
    }


def lookup_ways(subject: Subject) -> dict[str, Way]:
    """Let transformers propose what follows the same tokens in the prompt, by settings."""
    ways = {}
    for number in LOOKUPS:
        config = subject.config
        config.prompt_lookup_num_tokens = number
        way = answer_by(subject.model.generate, config, device=subject.device)
        ways[f"{number} tokens"] = way
    return ways


def dense_way(subject: Subject, folder: Path) -> Way:
    """Let a dense mixture generate, on the merged model and routed to the final layer."""
    mixed: Any = to_accelerator(load_model(ModelSpec(name=str(folder), dtype="float32"))).eval()
    mixture = attach(mixed, late_layers=3).eval().active_mixture
    hold_on_final_layer(mixture)
    return subject.way_of(mixed)
