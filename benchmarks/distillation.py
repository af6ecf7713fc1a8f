"""How far cheaper distillation is from the exact one: bias and variance of its gradient.

One forward pass of SmolLM2-135M over 24 ARC-Easy sequences, untuned, with labels on every token;
then the gradient of the distillation loss with respect to everything that is trained, exact and
approximated, from the same states. Both starts of the router, since the ensemble's likeliest
entries depend on it. `--data` as in train_step.py.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import mean, stdev
from typing import Any

import torch
from peft import get_peft_model
from results import parse_arguments, rounded, write_results
from torch import Tensor
from train_step import MODEL, SEED, find_data, make_batches, read_sequences, tiny_llama

from depthmix import MoDEConfig
from depthmix.loss.batch import mixture_loss
from depthmix.method.mixture import Routes
from depthmix.method.norm import find_mixture_norm
from depthmix.models.loading import load_model
from depthmix.models.spec import ModelSpec

WEIGHT = 0.1
"""λ of the total gradient, the library's default."""

STARTS = ("identity", "gaussian")

APPROXIMATIONS: dict[str, dict[str, Any]] = {
    **{f"top {m}": {"distillation_top_m": m} for m in (32, 128, 512)},
    **{f"{share:.0%} of tokens": {"distillation_token_share": share} for share in (0.5, 0.25, 0.1)},
    "top 128, 25% of tokens": {"distillation_top_m": 128, "distillation_token_share": 0.25},
}


def compare(model: Any, batch: dict[str, Tensor], start: str, num_draws: int) -> dict[str, Any]:
    """Compare every approximation with the exact distillation, for one start of the router."""
    torch.manual_seed(SEED)
    config = MoDEConfig.from_preset(
        "paper", router_init=start, router_input="normed", lora_dropout=0.0
    )
    tuned = get_peft_model(model, config).train()
    norm = find_mixture_norm(tuned)
    assert norm is not None
    kept: list[Routes] = []
    norm.listener = kept.append
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    tuned(**inputs, logits_to_keep=1, use_cache=False)
    (routes,) = kept
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    exact_config = replace(routes.mixture.config, distillation_weight=WEIGHT)

    def distil(**options: Any) -> tuple[float, Tensor]:
        """Give the distillation loss and its gradient."""
        routes.mixture.config = replace(exact_config, **options)
        loss = mixture_loss(routes, norm.backbone, batch["labels"])
        return float(loss.distillation.detach()), _gradient(loss.distillation, trained)

    value, exact = distil()
    task = _gradient(mixture_loss(routes, norm.backbone, batch["labels"]).task, trained)
    total = task + WEIGHT * exact
    rows = {}
    for name, options in APPROXIMATIONS.items():
        draws = num_draws if "distillation_token_share" in options else 1
        found = [distil(**options) for _ in range(draws)]
        values, vectors = [one for one, _ in found], [vector for _, vector in found]
        rows[name] = rounded(
            {
                "value_over_exact": mean(values) / value,
                "value_spread": stdev(values) / value if draws > 1 else 0.0,
                "error": mean(_error(vector, exact) for vector in vectors),
                "cosine": mean(_cosine(vector, exact) for vector in vectors),
                "error_of_average": _error(torch.stack(vectors).mean(0), exact),
                "error_of_total": mean(_error(task + WEIGHT * one, total) for one in vectors),
            }.items()
        )
        print(start, name, rows[name], flush=True)
    norms = {"task": float(task.norm()), "distillation": float(exact.norm())}
    return {"distillation_loss": value, "gradient_norms": norms, "approximations": rows}


def main() -> None:
    """Measure, compare, write."""
    arguments = parse_arguments(__doc__ or "", "distillation", data="file of prepared records")
    torch.set_num_threads(arguments.threads)
    num_draws = 2 if arguments.toy or arguments.quick else 4
    data = find_data(arguments.data, toy=arguments.toy)
    sequences = read_sequences(data, toy=arguments.toy)[: 8 if arguments.quick else 24]
    (batch,) = make_batches(sequences, completion_only=False, batch_size=len(sequences))
    starts = {}
    for start in STARTS:
        section = ModelSpec(name=MODEL, dtype="float32")
        model = tiny_llama() if arguments.toy else load_model(section)
        starts[start] = compare(model, batch, start, num_draws)
    ratios = {
        f"top_128_cosine_{start}": found["approximations"]["top 128"]["cosine"]
        for start, found in starts.items()
    }
    results = {
        "data": "ARC-Easy" if data else "random tokens of ARC-Easy's lengths",
        "num_tokens": int((batch["labels"][:, 1:] != -100).sum()),
        "draws": num_draws,
        "starts": starts,
    }
    write_results(arguments, {"ratios": ratios, **results})


def _gradient(loss: Tensor, trained: list[Tensor]) -> Tensor:
    """Give a loss's gradient with respect to all that is trained, end to end."""
    gradients = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
    pairs = zip(gradients, trained, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def _error(vector: Tensor, exact: Tensor) -> float:
    """Give the relative error."""
    return float((vector - exact).norm() / exact.norm())


def _cosine(vector: Tensor, exact: Tensor) -> float:
    """Give the cosine of the angle between two gradients."""
    return float(torch.nn.functional.cosine_similarity(vector, exact, dim=0))


if __name__ == "__main__":
    main()
