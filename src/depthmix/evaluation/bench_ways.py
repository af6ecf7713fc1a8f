"""Ways in which a run can generate: those that there are, and why the others are not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from depthmix.adapters.merged import check_exportable, take_apart
from depthmix.decoding.draft_plan import DraftPlan
from depthmix.decoding.fast_generation import FastGeneration
from depthmix.decoding.lazy_depth import LazyDepth
from depthmix.method.exits import Exits
from depthmix.method.norm import active_mixture, set_top_k
from depthmix.method.parts import find_parts
from depthmix.method.placement import to_accelerator
from depthmix.models.fast import find_own_exits, read_plan
from depthmix.models.loading import load_model
from depthmix.models.spec import ModelSpec

LOOKUP_TOKENS = 3
"""Tokens that prompt lookup proposes at most."""


@dataclass(kw_only=True)
class BenchWay:
    """One way to generate, and what it counts."""

    generate: Callable[..., Any]
    """Takes `generate`'s arguments."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """What differs in its `GenerationConfig`."""

    count: Callable[[int], tuple[float, float | None]]
    """Gives layers per token and the share of drafts that were accepted, from new tokens."""

    def run(self, inputs: Mapping[str, Tensor], config: GenerationConfig) -> Int[Tensor, "1 new"]:
        """Generate after a prompt, and give what is new."""
        own = copy.deepcopy(config)
        own.update(**self.options)
        with torch.inference_mode():
            sequences = self.generate(**inputs, generation_config=own)
        return sequences[:, inputs["input_ids"].shape[1] :]


@dataclass(kw_only=True)
class BenchModels:
    """A run's models, and its exits with their plans."""

    tuned: PreTrainedModel | PeftModel
    """The run as it is loaded."""

    base: PreTrainedModel | PeftModel | None = None
    """Its base model."""

    merged: PreTrainedModel | None = None
    """The base model with the run's LoRA folded in, without a mixture."""

    exits: Exits | None = None
    """Its exits."""

    plans: dict[bool, DraftPlan | None] = field(default_factory=dict)
    """How they draft, with verification and without."""

    left_out: list[str] = field(default_factory=list)
    """What is not there, a sentence each."""


def load_bench_models(spec: ModelSpec, *, top_token: int) -> BenchModels:
    """Load all models that a run can be measured by.

    Args:
        spec: The run, by its base and its adapter (`find_base`).
        top_token: The largest token id of the prompts, which the base model may not know.

    Returns:
        The models on the accelerator if there is one, and what is left out.

    Raises:
        ValueError: If a file is damaged.
        OSError: If the model cannot be found.
    """
    models = BenchModels(tuned=to_accelerator(load_model(spec)).eval())
    say = models.left_out.append
    if spec.adapter is None:
        say("base and merged LoRA: there is no adapter.")
    else:
        base = load_model(replace(spec, adapter=None, top_k=None))
        known: Any = base.get_input_embeddings()
        if top_token < known.weight.shape[0]:
            models.base = to_accelerator(base).eval()
        else:
            say("base: the prompts hold tokens that the run has added to it.")
        again = load_model(replace(spec, top_k=None))
        try:
            check_exportable(again)
        except ValueError as error:
            say(f"merged LoRA: {error}")
        else:
            models.merged = to_accelerator(take_apart(again).model).eval()
    if active_mixture(models.tuned) is None:
        say("Top-K: there is no mixture.")
    try:
        models.exits, folder = find_own_exits(models.tuned, spec)
    except FileNotFoundError:
        say("fast: there are no exits; put some on by `depthmix add-exits`.")
        return models
    models.plans = {verify: read_plan(folder, verify=verify) for verify in (True, False)}
    lossless = models.plans[True]
    if lossless is None:
        say(
            "fast, lossless, by a plan: there is none, and every exit drafts from 0.8 on; find one "
            "by `depthmix calibrate`."
        )
    elif lossless.stay_dense:
        say("fast, lossless, with drafts: the plan says that they are not worth it here.")
    if models.plans[False] is None:
        say("fast, lossy: there is no plan for it; find one by `depthmix calibrate --lossy`.")
        del models.plans[False]
    return models


def make_ways(models: BenchModels, *, top_k: int) -> dict[str, BenchWay]:
    """Make every way to generate anew, with nothing counted.

    Args:
        models: What was loaded.
        top_k: Routes that a token keeps where layers are skipped.

    Returns:
        The ways by name; `dense` or `dense mixture` is the run as it is.
    """
    return dict(_list_ways(models, top_k))


def name_reference(models: BenchModels) -> str:
    """Name the way that the others are held against: the run as it is."""
    return "dense" if active_mixture(models.tuned) is None else "dense mixture"


def _list_ways(models: BenchModels, top_k: int) -> Iterator[tuple[str, BenchWay]]:
    """Make the ways, in the order of the table."""
    tuned = models.tuned
    backbone, _ = find_parts(tuned)
    depth = float(backbone.num_hidden_layers)

    def dense(model: Any) -> BenchWay:
        return BenchWay(generate=model.generate, count=lambda _tokens: (depth, None))

    if models.base is not None:
        yield "base", dense(models.base)
    if models.merged is not None:
        yield "merged LoRA", dense(models.merged)
    yield name_reference(models), dense(tuned)
    if active_mixture(tuned) is not None:
        yield f"Top-{top_k}, lazy", _make_lazy(tuned, top_k)
    for verify, plan in models.plans.items():
        fast = FastGeneration(tuned, models.exits, plan, verify=verify)
        yield "fast, lossless" if verify else "fast, lossy", _make_fast(fast, depth)
    yield f"prompt lookup of {LOOKUP_TOKENS}", _make_lookup(tuned, backbone)


def _make_lazy(model: PreTrainedModel | PeftModel, top_k: int) -> BenchWay:
    """Keep few routes, and run the layers that they need."""
    lazy = LazyDepth(model)

    def generate(**inputs: Any) -> Any:
        before = lazy.mixture.top_k
        set_top_k(model, top_k)
        try:
            return lazy.generate(**inputs)
        finally:
            set_top_k(model, before)

    return BenchWay(generate=generate, count=lambda _tokens: (lazy.layers_per_pass, None))


def _make_fast(fast: FastGeneration, depth: float) -> BenchWay:
    """Let exits draft."""

    def count(_tokens: int) -> tuple[float, float | None]:
        if fast.plan.stay_dense:
            return depth, None
        return fast.layers_per_token, fast.acceptance_rate if fast.num_drafted.total() else None

    return BenchWay(generate=fast.generate, count=count)


def _make_lookup(model: PreTrainedModel | PeftModel, backbone: Any) -> BenchWay:
    """Propose what follows the same tokens in the text; passes are counted at the lowest layer."""
    passes: list[int] = []
    depth = backbone.num_hidden_layers

    def generate(**inputs: Any) -> Any:
        handle = backbone.layers[0].register_forward_hook(lambda *_: passes.append(1))
        try:
            return model.generate(**inputs)  # pyrefly: ignore[not-callable]
        finally:
            handle.remove()

    return BenchWay(
        generate=generate,
        options={"prompt_lookup_num_tokens": LOOKUP_TOKENS},
        count=lambda tokens: (len(passes) * depth / max(tokens, 1), None),
    )
