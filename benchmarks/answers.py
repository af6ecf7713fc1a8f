"""Ways to answer the same prompts, batch by batch in turn, and ratios of their times."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

Prompts = list[list[int]]
"""Token ids of the prompts of a batch."""

NUM_RESAMPLES = 2000
SEED = 0


@dataclass(frozen=True)
class Answer:
    """What one way made of one batch."""

    seconds: float
    """Wall time of the whole call, the prompts' pass included."""

    texts: list[list[int]]
    """New tokens of each row, up to the one that ended it."""


Way = Callable[[Prompts], Answer]
"""Answers the prompts of a batch."""


@dataclass
class Answers:
    """What one way made of all batches, in their order."""

    seconds: list[float] = field(default_factory=list)
    """Wall time of each batch."""

    texts: list[list[int]] = field(default_factory=list)
    """New tokens of each prompt."""

    def add(self, answer: Answer) -> None:
        """Add the next batch."""
        self.seconds.append(answer.seconds)
        self.texts.extend(answer.texts)

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows, without what is padded behind their ends."""
        return sum(map(len, self.texts)) / sum(self.seconds)


def answer_by(
    generate: Callable[..., Any], config: GenerationConfig, *, device: str | torch.device = "cpu"
) -> Way:
    """Make a way of something that generates as transformers does.

    Args:
        generate: `model.generate`, or what has its arguments.
        config: How it decodes, with a padding token.
        device: Where the model is.
    """
    device = torch.device(device)
    ends = set(config.eos_token_id or ())

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    def answer(prompts: Prompts) -> Answer:
        longest = max(map(len, prompts))
        gaps = [longest - len(prompt) for prompt in prompts]
        rows = list(zip(gaps, prompts, strict=True))
        padded = [[config.pad_token_id] * gap + prompt for gap, prompt in rows]
        masks = [[0] * gap + [1] * len(prompt) for gap, prompt in rows]
        input_ids = torch.tensor(padded, device=device)
        mask = torch.tensor(masks, device=device)
        wait()
        start = time.perf_counter()
        with torch.inference_mode():
            output = generate(input_ids=input_ids, attention_mask=mask, generation_config=config)
        wait()
        seconds = time.perf_counter() - start
        return Answer(seconds, [cut(row, ends) for row in output[:, longest:].tolist()])

    return answer


def cut(tokens: list[int], ends: set[int]) -> list[int]:
    """Cut a row off behind the token that ended it."""
    length = next((place + 1 for place, token in enumerate(tokens) if token in ends), None)
    return tokens[:length]


def split(prompts: Prompts, size: int) -> list[Prompts]:
    """Part prompts in batches."""
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]


def take_turns(
    ways: Mapping[str, Way], batches: Sequence[Prompts], *, warm_up: bool = True
) -> dict[str, Answers]:
    """Let every way answer a batch, then the next batch; which one begins changes with the batch.

    Args:
        ways: By name.
        batches: What is asked.
        warm_up: Let all of them answer the first batch once before, which does not count.

    Returns:
        What each way made of the batches.
    """
    answers = {name: Answers() for name in ways}
    names = list(ways)
    for name in names if warm_up else ():
        ways[name](batches[0])
    for turn, batch in enumerate(batches):
        first = turn % len(names)
        for name in [*names[first:], *names[:first]]:
            answers[name].add(ways[name](batch))
    return answers


def choose_fastest(ways: Mapping[str, Way], batches: Sequence[Prompts]) -> tuple[str, Way]:
    """Choose the fastest way on batches that are not measured afterwards."""
    answers = take_turns(ways, batches, warm_up=False)
    name = min(answers, key=lambda one: sum(answers[one].seconds))
    return name, ways[name]


def compare(*pairs: tuple[Answers, Answers]) -> dict[str, float]:
    """Divide total times over the same batches, `slower / faster`; several pairs are multiplied.

    Args:
        pairs: Answers whose time is divided, and those by whose time it is divided.

    Returns:
        The ratio, and a 95 % interval of a bootstrap over batches.
    """
    times = np.array([[slow.seconds, fast.seconds] for slow, fast in pairs])
    size = times.shape[-1]
    drawn = np.random.default_rng(SEED).integers(size, size=(NUM_RESAMPLES, size))
    sums = times[:, :, drawn].sum(-1)
    ratios = (sums[:, 0] / sums[:, 1]).prod(0)
    totals = times.sum(-1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return {
        "ratio": float((totals[:, 0] / totals[:, 1]).prod()),
        "low": float(low),
        "high": float(high),
    }


def count_same(ours: Answers, theirs: Answers) -> int:
    """Count the texts that are the same, token by token."""
    return sum(a == b for a, b in zip(ours.texts, theirs.texts, strict=True))
