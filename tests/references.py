"""The method written down naively: every layer's logits in full, in float64, token by token."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from depthmix.method.norm import find_mixture_norm


@dataclass(frozen=True)
class Reference:
    """What the paper's formulas give for one batch."""

    logits: Tensor
    """Ensemble logits, (batch, seq, vocab)."""

    weights: Tensor
    """Routing weights, (batch, seq, routes)."""

    task: float
    """Cross-entropy of the ensemble, mean over label tokens."""

    distillation: float
    """Divergence of the late layers from the final one, reduced."""

    layers: dict[int, float]
    """Cross-entropy of each late layer's own prediction, mean over label tokens."""


def kl(p: Tensor, q: Tensor) -> float:
    """Compute KL(p ‖ q) of two distributions over a vocabulary, entry by entry."""
    return sum(
        a * (math.log(a) - math.log(b)) for a, b in zip(p.tolist(), q.tolist(), strict=True) if a
    )


def divergence(p: Tensor, teacher: Tensor, kind: str) -> float:
    """Compute one token's divergence between two distributions, in nats."""
    if kind == "reverse_kl":
        return kl(p, teacher)
    if kind == "forward_kl":
        return kl(teacher, p)
    middle = (p + teacher) / 2
    return (kl(p, middle) + kl(teacher, middle)) / 2


def reduce_divergence(
    late: list[Tensor], final: Tensor, labels: Tensor, *, kind: str, reduction: str
) -> float:
    """Sum the divergence over late layers and label positions, and reduce it."""
    total, tokens = 0.0, 0
    for row in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            if labels[row, t + 1] == -100:
                continue
            tokens += 1
            teacher = final[row, t].softmax(-1)
            total += sum(divergence(part[row, t].softmax(-1), teacher, kind) for part in late)
    return total / {"mean": tokens, "batchmean": len(labels), "sum": 1}[reduction]


def cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """Compute the mean over label tokens of minus the label's log-probability."""
    log_probs = logits[:, :-1].log_softmax(-1)
    nll = [
        -log_probs[row, t, labels[row, t + 1]]
        for row in range(labels.shape[0])
        for t in range(labels.shape[1] - 1)
        if labels[row, t + 1] != -100
    ]
    return float(torch.stack(nll).mean())


def route(router_input: Tensor, mixture: nn.Module) -> Tensor:
    """Route each token in float64."""
    x = router_input.double()
    if mixture.config.router_input == "normed":
        x = x / x.square().mean(-1, keepdim=True).sqrt()
    bias = mixture.router.bias
    logits = x @ mixture.router.weight.double().T
    return (logits if bias is None else logits + bias.double()).softmax(-1)


@torch.no_grad()
def reference_step(
    model: nn.Module,
    batch: dict[str, Tensor],
    *,
    kind: str = "reverse_kl",
    reduction: str = "mean",
) -> Reference:
    """Compute the objective of a Llama with a mixture from its layers' own outputs."""
    norm = find_mixture_norm(model)
    bare, mixture = norm.backbone.model, norm.active_mixture
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    states = [bare.get_input_embeddings()(batch["input_ids"])]
    keep = lambda _module, _args, out: states.append(out[0] if isinstance(out, tuple) else out)  # noqa: E731
    handles = [layer.register_forward_hook(keep) for layer in bare.model.layers]
    model(**inputs)
    for handle in handles:
        handle.remove()
    head = bare.lm_head.weight.double()
    parts = []
    for layer in mixture.late_layers:
        own = dict(mixture.norms).get(str(layer), norm.base_layer)
        parts.append(copy.deepcopy(own).double()(states[layer].double()).double() @ head.T)
    weights = route(states[mixture.late_layers[0] - 1], mixture)
    logits = sum(weights[..., i, None] * part for i, part in enumerate(parts))
    labels = batch["labels"]
    distillation = reduce_divergence(parts[:-1], parts[-1], labels, kind=kind, reduction=reduction)
    layers = {
        layer: cross_entropy(part, labels)
        for layer, part in zip(mixture.late_layers, parts, strict=True)
    }
    return Reference(logits, weights, cross_entropy(logits, labels), distillation, layers)
