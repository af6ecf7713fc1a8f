"""How fast a run generates in each way that it can, on the user's own prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from depthmix.data.records import load_records
from depthmix.data.spec import Template
from depthmix.evaluation.bench_ways import load_bench_models, make_ways, name_reference
from depthmix.files.runs import HELD_OUT_NAME, RUN_CONFIG_NAME, read_run_settings
from depthmix.method.norm import active_mixture
from depthmix.models.asking import greedy, prepared
from depthmix.models.loading import load_tokenizer
from depthmix.models.own_texts import read_questions
from depthmix.models.sources import find_base
from depthmix.models.spec import ModelSpec, to_spec
from depthmix.models.template import RunTemplate, recall_template
from depthmix.models.turns import Turns, cut
from depthmix.options.types import check_number
from depthmix.statistics.resampling import resample_items


@dataclass(frozen=True, kw_only=True)
class WaySpeed:
    """One way to generate, over all prompts."""

    name: str
    """The way."""

    tokens_per_second: float
    """New tokens per second, prompts included: the median of the prompts."""

    spread: tuple[float, float]
    """The 20 % and 80 % quantiles of the prompts' tokens per second."""

    layers_per_token: float
    """Layers that ran for the mean token (with Top-K and lazily: for the mean forward pass)."""

    acceptance: float | None
    """Share of the drafts that are among the tokens; `None` where none are counted."""

    num_tokens: int
    """New tokens of all prompts."""

    speed_up: float
    """Tokens per second of all prompts together, over those of the run as it is."""

    interval: tuple[float, float] | None
    """95 % interval of `speed_up`, a bootstrap over prompts; `None` for a single one."""

    num_same: int
    """Texts that are those of the run as it is, token by token."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A run's ways to generate beside each other; `str` is a table."""

    ways: tuple[WaySpeed, ...]
    """What was measured."""

    reference: str
    """Name of the way that the others are held against: the run as it is."""

    left_out: tuple[str, ...]
    """What was not measured, and why, a sentence each."""

    num_prompts: int
    """Prompts, one at a time."""

    num_hidden_layers: int
    """Layers that dense generation runs for a token."""

    device: str
    """Where the models were."""

    source: str
    """Where the prompts come from."""

    def __str__(self) -> str:
        return "\n".join(_describe(self))


def bench(
    model: str | Path | ModelSpec,
    *,
    prompts: str | Path | None = None,
    template: Template | None = None,
    num_prompts: int = 16,
    max_new_tokens: int = 64,
    top_k: int = 1,
) -> Benchmark:
    """Measure each way in which a run can generate: `bench("runs/mode", prompts="mine.txt")`.

    Base model, merged LoRA, the run as it is, Top-K with skipped layers, exits that draft with and
    without verification, and prompt lookup take turns on each prompt, greedily, one prompt at a
    time; which one begins changes from prompt to prompt. All answer the first prompt once before,
    which does not count. Base, run and merged LoRA are in memory at the same time.

    Args:
        model: A run, or a model as `load_model` takes it.
        prompts: A text file with a prompt a line (`.txt`), or records in any form of training or
            evaluation; by default the records that the run has held out or was evaluated on.
        template: How a prompt becomes text; by default as in the run's training, and for other
            models `auto`.
        num_prompts: Prompts at most, the first.
        max_new_tokens: Tokens of an answer at most.
        top_k: Routes that a token keeps where layers are skipped (`LazyDepth`).

    Returns:
        What was measured, and what was left out.

    Raises:
        ValueError: If there are no prompts, or an option does not fit.
        OSError: If the model or the prompts cannot be found.
    """
    check_number("num_prompts", num_prompts, at_least=1)
    check_number("max_new_tokens", max_new_tokens, at_least=1)
    check_number("top_k", top_k, at_least=1)
    spec = find_base(to_spec(model))
    tokenizer, asked = load_tokenizer(spec), recall_template(spec, template)
    source = str(prompts or _find_held_out(spec))
    texts = _read_prompts(source, asked, tokenizer, num_prompts)
    models = load_bench_models(spec, top_token=max(map(max, texts)))
    tuned = models.tuned
    mixture = active_mixture(tuned)
    if mixture is not None and top_k > len(mixture.late_layers):
        raise ValueError(
            f"`top_k` must be at most {len(mixture.late_layers)}, the routes of this mixture, got "
            f"{top_k}."
        )
    with prepared(tuned, tokenizer):
        config = greedy(tuned, tokenizer, max_new_tokens)
        ends: Any = config.eos_token_id or ()
        warm, ways = (make_ways(models, top_k=top_k) for _ in range(2))
        turns = Turns(
            {name: partial(way.run, config=config) for name, way in ways.items()},
            device=tuned.device,
            ends=ends,
        )
        written: dict[str, list[list[int]]] = {name: [] for name in ways}
        for number, text in enumerate(texts):
            ids = torch.tensor([text], device=tuned.device)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if not number:
                turns.warm_up(inputs, [partial(way.run, config=config) for way in warm.values()])
            for name, rows in turns.run(inputs).items():
                written[name].append(cut(rows[0].tolist(), ends))
    reference = name_reference(models)
    speeds = [
        _measure(name, turns.seconds, written, reference, way.count(turns.num_tokens[name]))
        for name, way in ways.items()
    ]
    return Benchmark(
        ways=tuple(speeds),
        reference=reference,
        left_out=tuple(models.left_out),
        num_prompts=len(texts),
        num_hidden_layers=tuned.config.num_hidden_layers,
        device=tuned.device.type,
        source=source,
    )


def _measure(
    name: str,
    seconds: Mapping[str, Sequence[float]],
    written: Mapping[str, list[list[int]]],
    reference: str,
    counted: tuple[float, float | None],
) -> WaySpeed:
    """Read one way's figures off all turns."""
    numbers = {one: np.array([len(row) for row in written[one]]) for one in (name, reference)}
    paces = numbers[name] / np.array(seconds[name])
    rows = np.array(
        [numbers[name], seconds[name], numbers[reference], seconds[reference]], dtype=float
    )
    means = rows.mean(1)
    drawn = resample_items(rows, np.random.default_rng(0)).T
    ratios = drawn[0] / drawn[1] * drawn[3] / drawn[2]
    low, high = np.quantile(ratios, [0.025, 0.975])
    slow, quick = np.quantile(paces, [0.2, 0.8])
    return WaySpeed(
        name=name,
        tokens_per_second=float(np.median(paces)),
        spread=(float(slow), float(quick)),
        layers_per_token=counted[0],
        acceptance=counted[1],
        num_tokens=int(numbers[name].sum()),
        speed_up=float(means[0] / means[1] * means[3] / means[2]),
        interval=(float(low), float(high)) if len(paces) > 1 else None,
        num_same=sum(a == b for a, b in zip(written[name], written[reference], strict=True)),
    )


def _find_held_out(spec: ModelSpec) -> str:
    """Find records that a run was not trained on."""
    folder = Path(spec.adapter or spec.name).expanduser()
    if (folder / HELD_OUT_NAME).is_file():
        return str(folder / HELD_OUT_NAME)
    if (folder / RUN_CONFIG_NAME).is_file():
        settings = read_run_settings(folder / RUN_CONFIG_NAME)
        for section, name in (("evaluation", "data"), ("data", "eval")):
            if found := (settings.get(section) or {}).get(name):
                return str(found)
    raise ValueError(
        f"`prompts` must name a file of prompts, since {folder.name} knows no records that it was "
        "not trained on; give a text file with a prompt a line, or records."
    )


def _read_prompts(
    source: str, asked: RunTemplate, tokenizer: PreTrainedTokenizerBase, limit: int
) -> list[tuple[int, ...]]:
    """Render prompts as the run's training records were."""
    if source.endswith(".txt"):
        lines = Path(source).expanduser().read_text("utf-8").splitlines()
        kept = [line for line in lines if line.strip()][:limit]
        texts = [tuple(asked.render(line, tokenizer).token_ids) for line in kept]
    else:
        records = load_records(source, split="test", limit=limit)
        questions = read_questions(
            records, asked.template, tokenizer, source=source, variables=asked.variables
        )
        texts = [question.prompt for question in questions]
    if not texts or not all(texts):
        raise ValueError(f"`prompts` must hold text to go on from, and {source} holds none.")
    return texts


def _describe(benchmark: Benchmark) -> Iterator[str]:
    """Write what was measured as a table, and what was not in lines."""
    width = max(len(way.name) for way in benchmark.ways)
    head = f"{'':{width}}  tokens/s (20-80 %)     layers  accepted  {'speed-up (95 %)':19}  same"
    yield head
    for way in benchmark.ways:
        pace = f"{way.tokens_per_second:.1f} ({way.spread[0]:.1f}-{way.spread[1]:.1f})"
        accepted = "-" if way.acceptance is None else f"{way.acceptance:.0%}"
        gain = "1" if way.name == benchmark.reference else f"{way.speed_up:.2f}"
        if way.interval is not None and way.name != benchmark.reference:
            gain += f" ({way.interval[0]:.2f}-{way.interval[1]:.2f})"
        yield (
            f"{way.name:{width}}  {pace:21}  {way.layers_per_token:6.1f}  {accepted:>8}  "
            f"{gain:19}  {way.num_same}/{benchmark.num_prompts}"
        )
    yield (
        f"{benchmark.num_prompts} prompts of {benchmark.source}, one at a time by turns, on "
        f"{benchmark.device}; {benchmark.num_hidden_layers} layers; speed-up and same texts "
        f"against {benchmark.reference}."
    )
    for line in benchmark.left_out:
        yield f"Left out: {line}"
