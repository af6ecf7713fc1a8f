"""What lazy depth can give: tokens per second under forced routing, by how many tokens exit early.

SmolLM2-135M, 32 prompt tokens and as many new ones, routing forced from outside: a share of the
tokens exits at the first late layer, the others need all of them, each row of a batch by itself.
Compared with the dense mixture, the base model, and the bound: a model cut off at the first late
layer, or for a mean number of executed layers in between, on the line from that model to the base.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from statistics import median

import torch
from measure import Build, Measurement, measure, ratio
from results import fast_dtype, parse_arguments, rounded, write_results
from torch import Tensor
from train_step import SEED, save_base
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from depthmix import LazyDepth, attach
from depthmix.method.norm import active_mixture

NUM_PROMPT_TOKENS = 32
RATES = (0.0, 0.5, 0.9, 1.0)
BATCHES = (1, 8)
ROUTES = (3, 6, 15)


def build(
    folder: str, *, version: str, k: int, batch_size: int, rate: float, num_tokens: int
) -> Callable[[], None]:
    """Load the model in one version; give one call of `generate`."""
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=fast_dtype()).eval()
    num_layers = model.config.num_hidden_layers
    if version == "bound":
        model.model.layers = model.model.layers[: num_layers - k + 1]
        model.config.num_hidden_layers = num_layers - k + 1
    generator = model
    if version in ("dense", "lazy"):
        attach(model, late_layers=k)
        exits = draw_exits(batch_size=batch_size, rate=rate, num_tokens=num_tokens)
        force(model, exits, k=k)
        generator = LazyDepth(model) if version == "lazy" else model
    input_ids = torch.randint(3, model.config.vocab_size, (batch_size, NUM_PROMPT_TOKENS))
    options = {"max_new_tokens": num_tokens, "do_sample": False, "eos_token_id": None}

    def step() -> None:
        generator.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            pad_token_id=0,
            **options,
        )

    if version == "lazy":
        step()
        expected = executed_layers(exits, k=k, num_layers=num_layers)
        assert math.isclose(generator.layers_per_pass, expected, rel_tol=1e-6), "layers ran in vain"
    return step


def draw_exits(*, batch_size: int, rate: float, num_tokens: int) -> Tensor:
    """Say which positions exit at the first late layer, each with the same chance."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.rand(batch_size, NUM_PROMPT_TOKENS + num_tokens, generator=generator) < rate


def executed_layers(exits: Tensor, *, k: int, num_layers: int) -> float:
    """Count the layers of the mean pass: all of them as soon as one row has to go on."""
    looked_at = exits[:, NUM_PROMPT_TOKENS - 1 : -1]  # the last token generated has no pass
    deep = (~looked_at).any(0).float().mean().item()
    return num_layers - (k - 1) * (1 - deep)


def force(model: object, exits: Tensor, *, k: int) -> None:
    """Route by hand: all weight on the first late layer where a position exits, or on the last."""
    mixture = active_mixture(model)
    weights = torch.zeros(*exits.shape, k)
    weights[..., 0], weights[..., -1] = exits.float(), 1 - exits.float()
    end = 0

    def note(_model: object, args: tuple, kwargs: dict) -> None:
        nonlocal end
        end = kwargs["past_key_values"].get_seq_length() + kwargs["input_ids"].shape[1]

    def weigh(router_input: Tensor) -> Tensor:
        mixture.router(router_input)  # what routing costs is paid
        return weights[:, end - router_input.shape[1] : end]

    model.register_forward_pre_hook(note, with_kwargs=True)
    mixture.weigh = weigh


def versions_of(
    folder: str, *, k: int, batch_size: int, rates: tuple[float, ...], num_tokens: int
) -> dict[str, Build]:
    """Name the versions of one k and batch size."""
    common = {"k": k, "batch_size": batch_size, "num_tokens": num_tokens}
    make = partial(build, folder, **common)
    lazy = {f"lazy_{rate:.0%}": partial(make, version="lazy", rate=rate) for rate in rates}
    others = {name: partial(make, version=name, rate=1.0) for name in ("base", "dense", "bound")}
    return {**others, **lazy}


def describe(
    measured: dict[str, Measurement],
    *,
    k: int,
    batch_size: int,
    rates: tuple[float, ...],
    num_tokens: int,
    num_layers: int,
) -> dict[str, dict[str, float]]:
    """Say of every version: tokens per second, layers per pass, speed-up against the others."""
    fewest = num_layers - k + 1
    layers = {"base": num_layers, "dense": num_layers, "bound": fewest}
    for rate in rates:
        exits = draw_exits(batch_size=batch_size, rate=rate, num_tokens=num_tokens)
        layers[f"lazy_{rate:.0%}"] = executed_layers(exits, k=k, num_layers=num_layers)
    seconds = {name: median(one.seconds) for name, one in measured.items()}
    described = {}
    for name in measured:
        share = (layers[name] - fewest) / (k - 1)
        bound = seconds["bound"] + share * (seconds["base"] - seconds["bound"])
        described[name] = {
            "tokens_per_second": batch_size * num_tokens / seconds[name],
            "layers_per_pass": layers[name],
            "speedup_over_dense": 1 / ratio(measured, name, "dense")["time"],
            "speedup_over_base": 1 / ratio(measured, name, "base")["time"],
            "time_over_bound": seconds[name] / bound,
        }
    return {name: rounded(values.items()) for name, values in described.items()}


def ratios_of(found: dict[tuple[int, int], dict[str, Measurement]]) -> dict[str, float]:
    """Compute the published ratios."""

    def times(k: int, batch_size: int, version: str, base: str) -> float | None:
        measured = found.get((k, batch_size), {})
        both = version in measured and base in measured
        return ratio(measured, version, base)["time"] if both else None

    slow_down = {
        "forced_dense_over_base": times(3, 1, "dense", "base"),
        "forced_dense_k15_over_base": times(15, 1, "dense", "base"),
        "lazy_rate0_over_dense": times(15, 1, "lazy_0%", "dense"),
        "lazy_rate1_k15_over_bound": times(15, 1, "lazy_100%", "bound"),
    }
    speed_up = {
        "lazy_rate1_k15_speedup": times(15, 1, "lazy_100%", "dense"),
        "lazy_rate90_k15_b8_speedup": times(15, 8, "lazy_90%", "dense"),
    }
    ratios = {name: value for name, value in slow_down.items() if value}
    return ratios | {name: 1 / value for name, value in speed_up.items() if value}


def main() -> None:
    """Measure, compare, write."""
    arguments = parse_arguments(__doc__ or "", "lazy_depth")
    disable_progress_bar()
    num_tokens, rounds = 32, 5
    cases = [(k, batch_size, RATES) for k in ROUTES for batch_size in BATCHES]
    if arguments.quick:
        rounds, num_tokens = 2, 24
        cases = [(3, 1, ()), (15, 1, (0.0, 1.0)), (15, 8, (0.9,))]
    if arguments.toy:
        rounds, num_tokens = 1, 6
        cases = [(3, batch_size, RATES) for batch_size in BATCHES]
    found, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        saving = get_context("fork").Process(
            target=partial(save_base, toy=arguments.toy), args=(folder,)
        )
        saving.start()
        saving.join()
        for k, batch_size, rates in cases:
            print(f"k = {k}, batch size {batch_size}", flush=True)
            size = {"k": k, "batch_size": batch_size, "rates": rates, "num_tokens": num_tokens}
            versions = versions_of(folder, **size)
            measured = measure(versions, rounds=rounds, threads=arguments.threads)
            found[k, batch_size] = measured
            described = describe(measured, **size, num_layers=4 if arguments.toy else 30)
            rows.append({"k": k, "batch_size": batch_size, "versions": described})
    results = {
        "dtype": fast_dtype(),
        "num_tokens": num_tokens,
        "ratios": rounded(ratios_of(found).items()),
        "cases": rows,
    }
    write_results(arguments, results)


if __name__ == "__main__":
    main()
