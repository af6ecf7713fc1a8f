"""Tiny runs side by side in a folder, as `depthmix train` leaves them."""

import json
from pathlib import Path

from checkpoints import save_checkpoint
from depthmix import load_run_config, train

HOSTILE_QUESTION = "Is </script><b>bold</b> \u202eright to left\u202c \"quoted\" 'so' אב 🦜 \u200b?"
ITEMS = [
    {
        "prompt": f"Question: {HOSTILE_QUESTION if n == 0 else f'{n} + {n}?'}\nAnswer:",
        "choices": [" yes", f" {2 * n}", " &lt;no&gt;"],
        "answer": 1,
    }
    for n in range(8)
]
"""Records to choose an answer; the first has a text that must stay text."""


def make_runs(folder: Path, runs: dict[str, dict]) -> Path:
    """Train a tiny model once for each name; the options are sections of a configuration."""
    base = save_checkpoint(folder / "base")
    train_file, eval_file = folder / "sums.jsonl", folder / "items.jsonl"
    records = [{"prompt": f"{n} + {n} =", "completion": f" {2 * n}"} for n in range(8)]
    train_file.write_text("".join(json.dumps(record) + "\n" for record in records))
    eval_file.write_text("".join(json.dumps(record) + "\n" for record in ITEMS))
    for name, options in runs.items():
        sections = {
            "model": {"name": str(base), "dtype": "float32"},
            "data": {"train": str(train_file)},
            "mode": {"late_layers": "2", "target_modules": "q_proj,v_proj"},
            "training": {
                "output_dir": str(folder / "runs" / name),
                "max_steps": "2",
                "logging_steps": "1",
                "per_device_train_batch_size": "4",
                "save_strategy": "no",
                "report_to": "none",
                "seed": "0",
            },
            "evaluation": {"data": str(eval_file), "metric": "choices"},
        }
        for section, values in options.items():
            known = sections.get(section)
            sections[section] = known | values if known and values else values
        train(load_run_config(None, sections))
    return folder / "runs"


def judge_by(folder: Path, moment: str, correct: str) -> None:
    """Say which items a finished run has right, as ones and zeros."""
    place = json.loads((folder / "results.json").read_text())[moment]
    path = folder / place / "samples_records.jsonl"
    samples = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert len(samples) == len(correct)
    for sample, sign in zip(samples, correct, strict=True):
        sample["acc_bytes"] = float(sign)
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples), "utf-8")
