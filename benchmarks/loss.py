"""What the loss costs: forward and backward of a frozen head, with and without the mixture.

Versions run by turns, each in a process of its own: the fused mixture loss in all its variants,
the paper read literally, other libraries' chunked losses put together, and plain cross-entropy.
`products` is the lower bound: the head's products alone, each way, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import baselines
import torch
from measure import Build, measure, ratio
from results import parse_arguments, rounded, write_results
from torch import Tensor, nn

from depthmix.loss.fused import CPU_PRODUCT_ROWS, GPU_PRODUCT_ROWS, fused_sums
from depthmix.loss.linear_head import LinearHead
from depthmix.loss.terms import LabelTokens
from depthmix.method.config import MixtureConfig

LAMBDA = 0.1
SEED = 0


@dataclass(frozen=True)
class Case:
    """One size of the problem."""

    num_tokens: int = 2048
    hidden_size: int = 576
    vocab_size: int = 49152
    k: int = 3
    dtype: str = "bfloat16"
    ignored: float = 0.0
    """Share of tokens whose label does not count."""


@dataclass(frozen=True)
class PlainHead:
    """What `fused_sums` asks of a backbone: a linear head and nothing around it."""

    head: nn.Linear
    logit_scale: float = 1.0
    soft_cap: float | None = None

    @staticmethod
    def head_input(states: Tensor) -> Tensor:
        """Nothing stands between norm and head."""
        return states


def fused(case: Case, **options: object) -> Callable[[], None]:
    """Build the fused loss; `options` are those of `MixtureConfig`."""
    config = MixtureConfig(late_layers=case.k, distillation_weight=LAMBDA)
    config = replace(config, **options)
    states, weights, head, labels = draw(case)

    def step() -> None:
        kept = labels.ne(-100).nonzero()[:, 0]
        share = config.distillation_token_share
        num_distilled = 0 if config.distillation_weight == 0 else round(share * len(kept))
        tokens = LabelTokens(
            tuple(state[kept] for state in states),
            weights[kept],
            labels[kept],
            num_distilled if case.k > 1 else 0,
        )
        sums = fused_sums(tokens, PlainHead(head), config)
        total = (sums.task + LAMBDA * sums.distillation) / len(kept)
        backward(total, states, weights)

    return step


def baseline(case: Case, name: str) -> Callable[[], None]:
    """Build a baseline of `baselines.py`."""
    states, weights, head, labels = draw(case)
    loss = getattr(baselines, name)
    return lambda: backward(loss(states, weights, head.weight, labels, LAMBDA), states, weights)


def products(case: Case, num_products: int) -> Callable[[], None]:
    """Build the lower bound: each route's product with the head, forward and backward."""
    states, _, linear, labels = draw(case)
    num_rows = CPU_PRODUCT_ROWS if linear.weight.device.type == "cpu" else GPU_PRODUCT_ROWS
    kept = labels.ne(-100).nonzero()[:, 0]
    rows = torch.cat([states[i % case.k].detach()[kept] for i in range(num_products)])
    head = LinearHead(linear.weight, None, 1.0, None)

    def step() -> None:
        buffer = rows.new_empty(min(num_rows, len(rows)), case.vocab_size)
        for chunk in rows.split(num_rows):
            logits = buffer[: len(chunk)]
            head.project(chunk, out=logits)
            torch.mm(logits, head.weight, out=chunk)

    return step


def draw(case: Case) -> tuple[tuple[Tensor, ...], Tensor, nn.Linear, Tensor]:
    """Draw states, routing weights, a frozen head and labels."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, case.dtype)
    torch.manual_seed(SEED)
    head = nn.Linear(case.hidden_size, case.vocab_size, bias=False, device="meta")
    weight = torch.randn(case.vocab_size, case.hidden_size).mul_(2 / case.hidden_size**0.5)
    head.weight = nn.Parameter(weight.to(device, dtype), requires_grad=False)
    states = torch.randn(case.k, case.num_tokens, case.hidden_size).to(device, dtype)
    weights = torch.randn(case.num_tokens, case.k).softmax(-1).to(device)
    labels = torch.randint(case.vocab_size, (case.num_tokens,))
    labels[torch.rand(case.num_tokens) < case.ignored] = -100
    leaves = tuple(state.clone().requires_grad_() for state in states)
    return leaves, weights.requires_grad_(), head, labels.to(device)


def backward(loss: Tensor, states: tuple[Tensor, ...], weights: Tensor) -> None:
    """Make the gradients, and drop them."""
    loss.backward()
    for leaf in (*states, weights):
        leaf.grad = None


def versions_of(case: Case) -> dict[str, Build]:
    """Name the versions; those that make no use of the mixture have k = 1."""
    plain = replace(case, k=1)
    own = {
        "mode_fused": partial(fused, case),
        "mode_lambda0": partial(fused, case, distillation_weight=0.0),
        "mode_topm": partial(fused, case, distillation_top_m=128),
        "mode_quarter": partial(fused, case, distillation_token_share=0.25),
        "mode_products": partial(products, case, case.k),
        "ce_fused": partial(fused, plain),
        "ce_products": partial(products, plain, 1),
    }
    names = ("mode_naive", "mode_checkpointed", "mode_liger", "mode_trl")
    names += ("ce_naive", "ce_torch", "ce_trl")
    return own | {
        name: partial(baseline, case if name.startswith("mode") else plain, name) for name in names
    }


QUICK = ("mode_fused", "mode_naive", "ce_naive", "ce_fused", "mode_lambda0", "mode_topm")
"""Versions that the targets speak of."""

LIBRARIES = ("mode_checkpointed", "mode_liger", "mode_trl", "ce_torch", "ce_trl")
"""Baselines that are measured at the main size only."""

CURVES = ("mode_fused", "mode_products", "ce_fused", "ce_products")
"""Versions of the growth curve."""

SLOW = ("mode_naive", "mode_checkpointed", "mode_liger", "mode_trl")
"""Versions that get fewer turns."""


def ratios_of(measured: dict) -> dict[str, float]:
    """Compute the published ratios."""
    pairs = {
        "mode_fused_over_mode_naive": ("mode_fused", "mode_naive", ("time", "memory")),
        "mode_fused_over_ce_naive": ("mode_fused", "ce_naive", ("time", "memory")),
        "mode_fused_over_ce_fused": ("mode_fused", "ce_fused", ("time",)),
        "mode_lambda0_over_ce_fused": ("mode_lambda0", "ce_fused", ("time",)),
        "mode_topm_over_ce_fused": ("mode_topm", "ce_fused", ("time",)),
        "mode_quarter_over_ce_fused": ("mode_quarter", "ce_fused", ("time",)),
        "mode_products_over_mode_naive": ("mode_products", "mode_naive", ("time",)),
        "mode_products_over_ce_naive": ("mode_products", "ce_naive", ("time",)),
        "mode_products_over_ce_products": ("mode_products", "ce_products", ("time",)),
    }
    return {
        f"{key}_{what}": ratio(measured, version, base)[what]
        for key, (version, base, parts) in pairs.items()
        if version in measured and base in measured
        for what in parts
    }


def main() -> None:
    """Measure, compare, write."""
    arguments = parse_arguments(__doc__ or "", "loss")
    main_case, rounds = Case(), 7
    if torch.cuda.is_available():
        main_case = Case(num_tokens=8192, hidden_size=4096, vocab_size=32000)
    if arguments.toy:
        main_case, rounds = Case(num_tokens=96, hidden_size=16, vocab_size=211), 2
    run = partial(measure, threads=arguments.threads)
    versions = versions_of(main_case)
    if arguments.quick:
        versions = {name: versions[name] for name in QUICK}
        found = run(versions, rounds=2, limits={"mode_naive": 1}, cold=("mode_naive",))
    else:
        found = run(versions, rounds=rounds, limits=dict.fromkeys(SLOW, 3), warm_ups=2)
    ratios = rounded(ratios_of(found).items())
    cases, growth = [{**asdict(main_case), "versions": summaries(found)}], []
    for case in [] if arguments.quick else grid(main_case):
        print(case, flush=True)
        versions = versions_of(case)
        kept = {name: build for name, build in versions.items() if name not in LIBRARIES}
        found = run(kept, rounds=2, limits={"mode_naive": 1}, cold=("mode_naive",))
        cases.append({**asdict(case), "versions": summaries(found)})
    for case in [] if arguments.quick else curves(main_case):
        print(case, flush=True)
        versions = versions_of(case)
        found = run({name: versions[name] for name in CURVES}, rounds=2)
        growth.append({**asdict(case), "versions": summaries(found)})
    write_results(arguments, {"ratios": ratios, "cases": cases, "growth": growth})


def grid(main_case: Case) -> list[Case]:
    """List the sizes of the table."""
    if torch.cuda.is_available():
        return [
            replace(main_case, k=k, vocab_size=vocab_size)
            for vocab_size in (32000, 128256)
            for k in (3, 6)
            if (k, vocab_size) != (main_case.k, main_case.vocab_size)
        ]
    return [
        replace(main_case, k=k, dtype=dtype, ignored=ignored)
        for dtype in ("bfloat16", "float32")
        for k in (1, 2, 3, 6)
        for ignored in (0.0, 0.7)
        if (k, dtype, ignored) != (main_case.k, main_case.dtype, main_case.ignored)
    ]


def curves(main_case: Case) -> list[Case]:
    """List the sizes of the growth curve: tokens, vocabulary and k, one at a time."""
    factors = (0.125, 0.25, 0.5, 1, 2)
    return [
        *(replace(main_case, num_tokens=int(f * main_case.num_tokens)) for f in factors),
        *(replace(main_case, vocab_size=int(f * main_case.vocab_size)) for f in factors),
        *(replace(main_case, k=k) for k in (1, 2, 3, 4, 6)),
    ]


def summaries(measured: dict) -> dict[str, dict[str, float]]:
    """Give each version's median, spread and peak."""
    return {name: rounded(one.summary().items()) for name, one in measured.items()}


if __name__ == "__main__":
    main()
