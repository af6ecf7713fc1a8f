"""Table 4 on ARC-Easy: accuracy, layers per token and tokens per second against Top-K.

`python examples/arc_easy/top_k.py RUNS --output results.json` reads the runs that top_k.toml names:
folder K was trained with Top-K = K; the densest one is also read with every smaller K.
Accuracy and depths come from the test items, speed from answers that are generated one prompt at a
time by lazy depth, all versions by turns.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from depthmix import LazyDepth, set_top_k
from depthmix.method.mixture import mix, route
from depthmix.method.norm import find_mixture_norm
from depthmix.models.loading import load_model, load_tokenizer
from depthmix.models.spec import ModelSpec
from depthmix.statistics.intervals import mean_interval, paired_difference

NUM_ROUTES = 6
NUM_NEW_TOKENS = 24
SEED = 0


@dataclass
class Scores:
    """What one pass says of one Top-K, item by item."""

    correct: list[float] = field(default_factory=list)
    """Whether the likeliest choice per byte is the right one."""

    nll: list[float] = field(default_factory=list)
    """Of the right choice, nats per token."""

    deepest: list[int] = field(default_factory=list)
    """Route of the deepest layer that each token of the right choice keeps."""


@dataclass
class Version:
    """One trained run under one Top-K."""

    run: str
    top_k: int
    accuracy: float = 0.0
    interval: tuple[float, float] = (0.0, 0.0)
    difference: dict[str, Any] = field(default_factory=dict)
    nll: float = 0.0
    deepest: list[float] = field(default_factory=list)
    """Share of the right answers' tokens by the deepest layer that they keep, earliest first."""
    layers_per_token: float = 0.0
    """Layers that ran per generated token."""
    tokens_per_second: float = 0.0
    speedup: float = 0.0
    """Over the dense mixture of the same run, median of the turns' ratios."""


def versions(folder: Path) -> Iterator[tuple[Path, list[int]]]:
    """List the runs, each with the values of Top-K that it is read with."""
    for path in sorted(folder.iterdir()):
        if not (path / "adapter_config.json").is_file():
            continue
        trained_with = int(path.name) if path.name.isdigit() else NUM_ROUTES
        every = trained_with == NUM_ROUTES
        yield path, list(range(1, NUM_ROUTES + 1)) if every else [trained_with]


@torch.inference_mode()
def score(
    model: Any, tokenizer: Any, items: list[dict[str, Any]], top_ks: list[int]
) -> dict[int, Scores]:
    """Score every choice under each Top-K in one pass: only the last mixture differs.

    Routing weights under Top-K are the dense ones, renormalised over the K largest.
    """
    norm, found = find_mixture_norm(model), {top_k: Scores() for top_k in top_ks}
    backbone, seen = norm.backbone, []
    norm.listener = seen.append
    set_top_k(model, None)
    try:
        for item in items:
            start = len(tokenizer(item["prompt"])["input_ids"])
            texts = [item["prompt"] + choice for choice in item["choices"]]
            batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
            model(**batch, logits_to_keep=1)
            routes, labels = seen.pop(), batch["input_ids"][:, start:]
            states = tuple(state[:, start - 1 : -1] for state in routes.states)
            counted = batch["attention_mask"][:, start:].float()
            num_bytes = torch.tensor([len(choice.encode()) for choice in item["choices"]])
            for top_k, scores in found.items():
                kept = route(routes.weights[:, start - 1 : -1].log(), top_k=top_k)
                log_probs = backbone.unembed(mix(states, kept)).float().log_softmax(-1)
                log_probs = log_probs.gather(-1, labels[..., None])[..., 0] * counted
                totals, answer = log_probs.sum(-1), item["answer"]
                scores.correct.append(float((totals / num_bytes).argmax() == answer))
                scores.nll.append(float(-totals[answer] / counted[answer].sum()))
                deepest = ((kept[answer] > 0) * torch.arange(1, 1 + kept.shape[-1])).amax(-1)
                scores.deepest += (deepest - 1)[counted[answer] > 0].tolist()
    finally:
        norm.listener = None
    return found


def time_generation(
    model: Any, tokenizer: Any, prompts: list[str], top_ks: list[int]
) -> dict[int, tuple[float, float, float]]:
    """Generate by turns; give tokens per second, layers per token and speed-up by Top-K."""
    seconds: dict[int, list[float]] = {top_k: [] for top_k in [0, *top_ks]}
    layers: dict[int, list[float]] = {top_k: [] for top_k in top_ks}
    options = {"max_new_tokens": NUM_NEW_TOKENS, "min_new_tokens": NUM_NEW_TOKENS}
    options |= {"do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        for top_k in seconds:
            set_top_k(model, top_k or None)
            lazy = LazyDepth(model)
            started = time.perf_counter()
            with torch.inference_mode():
                (lazy if top_k else model).generate(**inputs, **options)
            seconds[top_k].append(time.perf_counter() - started)
            if top_k:
                layers[top_k].append(lazy.layers_per_pass)
    return {
        top_k: (
            NUM_NEW_TOKENS / median(seconds[top_k]),
            sum(layers[top_k]) / len(prompts),
            median(a / b for a, b in zip(seconds[0], seconds[top_k], strict=True)),
        )
        for top_k in top_ks
    }


def main() -> None:
    """Measure every run and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--data", type=Path, default=Path("runs/data/arc_easy/text/test.jsonl"))
    parser.add_argument("--num-items", type=int, default=150)
    parser.add_argument("--num-prompts", type=int, default=4)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    items = [json.loads(line) for line in arguments.data.read_text("utf-8").splitlines()]
    items = items[: arguments.num_items]
    prompts = [item["prompt"] for item in random.Random(SEED).sample(items, arguments.num_prompts)]
    found: list[Version] = []
    outcomes: dict[tuple[str, int], np.ndarray] = {}
    for path, top_ks in versions(arguments.runs):
        section = ModelSpec(name=str(path), dtype="float32")
        model, tokenizer = load_model(section).eval(), load_tokenizer(section)
        speeds = time_generation(model, tokenizer, prompts, top_ks)
        for top_k, scores in score(model, tokenizer, items, top_ks).items():
            correct = outcomes[path.name, top_k] = np.array(scores.correct)
            speed, layers, speedup = speeds[top_k]
            ends = mean_interval(correct)
            depths = np.bincount(scores.deepest, minlength=NUM_ROUTES) / len(scores.deepest)
            version = Version(
                run=path.name,
                top_k=top_k,
                accuracy=float(correct.mean()),
                interval=(ends.low, ends.high),
                nll=float(np.mean(scores.nll)),
                deepest=depths.tolist(),
                layers_per_token=layers,
                tokens_per_second=speed,
                speedup=speedup,
            )
            found.append(version)
            print(
                f"{path.name:6} Top-{top_k}: {version.accuracy:.3f}, nll {version.nll:.3f}, "
                f"{layers:.2f} layers, {speed:.1f} tokens/s, {speedup:.2f} x",
                flush=True,
            )
    dense = outcomes[str(NUM_ROUTES), NUM_ROUTES]
    for version in found:
        own = outcomes[version.run, version.top_k]
        version.difference = asdict(paired_difference(dense, own))
    results = {"num_items": len(items), "versions": [asdict(version) for version in found]}
    arguments.output.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
