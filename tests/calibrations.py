"""A tiny model with exits that are often right, and what calibrates it on any machine."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from checkpoints import save_checkpoint
from depthmix.adapters.exit_files import save_exits
from depthmix.depth.costs import Costs
from depthmix.method.parts import find_parts, new_exits
from depthmix.models import calibrating
from depthmix.models.loading import load_model
from depthmix.models.speed import Measurement


def make_calibrated(folder: Path) -> Path:
    """Save a model whose upper layers change little, with exits that are often right."""
    save_checkpoint(folder)
    model = load_model(folder)
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight *= 0.03
            layer.mlp.down_proj.weight *= 0.03
    model.save_pretrained(folder)
    backbone, norm = find_parts(model)
    save_exits(new_exits(backbone, norm, (1, 2, 3), rank=0), folder / "exits", model="tiny")
    return folder


def write_records(path: Path, number: int = 24, **fields) -> Path:
    records = [
        {"prompt": f"{n} + {n} =", "completion": f" {2 * n}"} | fields for n in range(number)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def pretend_costs(monkeypatch) -> None:
    """Costs as of a large model on a GPU, whatever this machine does."""

    def measure(backbone, exits, prompt, *, vocabularies):
        sizes = sorted({len(one or range(backbone.vocab_size)) for one in vocabularies})
        return Costs(
            rows=(1, 2, 4, 8),
            layer=(1.0, 1.02, 1.05, 1.1),
            head=(1.0, 1.0, 1.0, 1.0),
            vocabulary_sizes=tuple(sizes),
            exit=tuple(0.01 * number for number in range(1, len(sizes) + 1)),
            step=0.0,
            prompt=1.0,
            num_prompt_tokens=len(prompt),
            device="cpu",
            dtype="float32",
        )

    monkeypatch.setattr("depthmix.depth.calibrator.measure_costs", measure)


def pretend_speed(monkeypatch, speed_up: float) -> list[tuple]:
    """A measured speed, whatever this machine does."""
    calls = []

    def measure(model, fast, tokenizer, prompts, *, max_new_tokens):
        calls.append((fast.verify, fast.plan, prompts))
        values = {"lowest": speed_up, "highest": speed_up, "dense_tokens_per_second": 10.0}
        values |= {"fast_tokens_per_second": 10.0 * speed_up, "num_texts": len(prompts)}
        return Measurement(speed_up=speed_up, num_same=len(prompts), **values)

    monkeypatch.setattr(calibrating, "measure_speed", measure)
    return calls
