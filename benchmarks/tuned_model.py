"""A model tuned once, for benchmarks of generation, which say nothing on random weights.

    python benchmarks/tuned_model.py

SmolLM2-135M-Instruct on the quickstart's word problems: LoRA of rank 16 on all linear maps, 96
steps of 16, float32, about 20 minutes on two cores; then exits on the finished model, four minutes
more. The run lies in `.tuned/` with its settings and the hash of its weights; what is there already
is kept. `--records` names what else there is to learn: problems of which four templates are asked
alone, GSM8K's worked answers, Alpaca's instructions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuning_records import DATA_SETS, SPLITS

from depthmix.adapters.exit_files import find_exits
from depthmix.models.exits import add_exits

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".tuned"
"""Where the run lies, outside of what is committed."""

SETTINGS: dict[str, Any] = {
    "method": "lora",
    "mode": {
        "adapt": "all",
        "r": 16,
        "lora_alpha": 32,
        "target_modules": [
            *("q_proj", "k_proj", "v_proj", "o_proj"),
            *("gate_proj", "up_proj", "down_proj"),
        ],
    },
    "training": {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-3,
        "warmup_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 0,
    },
}
"""Sections of the run file."""

LONG_RECORDS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
"""The same batch in parts, where records are so long that the logits of 16 would take gigabytes."""

EXIT_LAYERS = (5, 7, 9, 10, 12, 15, 18, 20, 21, 22, 23, 24, 25, 26, 27)
"""Exits that are put on the model; calibration chooses among them."""

NUM_EXIT_STEPS = 96
NUM_STEPS = 96
NUM_TRAINING = NUM_STEPS * 16
NUM_HELD_OUT = 300


@dataclass(frozen=True)
class TunedModel:
    """Where the tuned model is, and what says which one it is."""

    base: Path
    """The pretrained model's folder."""

    run: Path
    """The tuned run's folder, with its adapter."""

    train: Path
    """The records that it was tuned on, JSONL."""

    held_out: Path
    """300 problems that it has not seen, JSONL."""

    exits: Path
    """Exits that were put on the finished run, if they were."""

    about: dict[str, Any]
    """Settings, seed, and `sha256` of the adapter's weights."""


def name_folder(records: str) -> Path:
    """Name where the model lies that has learnt these records."""
    return FOLDER if records == "problems" else FOLDER.with_name(f".tuned-{records}")


def find_tuned_model(folder: Path = FOLDER) -> TunedModel:
    """Find the tuned model.

    Raises:
        FileNotFoundError: If it has not been trained here.
    """
    about = folder / "tuned.json"
    if not about.is_file():
        raise FileNotFoundError(
            "This benchmark needs a tuned model, and none is here; train it once by "
            "`python benchmarks/tuned_model.py` (about 25 minutes)."
        )
    return TunedModel(
        base=folder / "base-model",
        run=folder / "run",
        train=folder / "train.jsonl",
        held_out=folder / "held-out.jsonl",
        exits=folder / "exits",
        about=json.loads(about.read_text("utf-8")),
    )


def tune(
    folder: Path = FOLDER,
    *,
    num_steps: int = NUM_STEPS,
    num_held_out: int = NUM_HELD_OUT,
    base: Path | None = None,
    records: str = "problems",
) -> TunedModel:
    """Train the model, unless it is there.

    Args:
        folder: Where it goes.
        num_steps: Training steps of 16.
        num_held_out: Problems that it does not see.
        base: Folder of another pretrained model.
        records: What it learns, by a name of `SPLITS`.
    """
    if (folder / "tuned.json").is_file():
        return find_tuned_model(folder)
    sys.path.insert(0, str(ROOT))
    from examples.quickstart.__main__ import unpack_base_model, write_jsonl

    from depthmix.training.config import load_run_config
    from depthmix.training.train import train

    training, held_out = SPLITS[records](num_steps * 16, num_held_out)
    file = write_jsonl(training, folder / "train.jsonl")
    write_jsonl(held_out, folder / "held-out.jsonl")
    base = base or unpack_base_model(folder / "base-model")
    parts = LONG_RECORDS if records in DATA_SETS else {}
    options = {**SETTINGS["training"], **parts}
    sections = {
        **SETTINGS,
        "model": {"name": str(base), "dtype": "float32"},
        "data": {"train": str(file)},
        "training": {**options, "output_dir": str(folder / "run")},
    }
    train(load_run_config(overrides=sections), overwrite=True)
    weights = (folder / "run" / "adapter_model.safetensors").read_bytes()
    facts = {"records": records, "num_steps": num_steps}
    about = {
        **SETTINGS,
        "training": options,
        **facts,
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    (folder / "tuned.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    return find_tuned_model(folder)


def put_exits(tuned: TunedModel, **options: Any) -> None:
    """Put exits on the finished model, unless they are there, by `add_exits` with `options`."""
    if find_exits(tuned.exits) is None:
        settings = {"layers": EXIT_LAYERS, "num_steps": NUM_EXIT_STEPS, **options}
        add_exits(tuned.run, str(tuned.train), output=tuned.exits, **settings)


def main() -> None:
    """Train, and say where the model is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="training steps of 16")
    exit_steps = "steps of 16 that train the exits"
    parser.add_argument("--exit-steps", type=int, default=NUM_EXIT_STEPS, help=exit_steps)
    parser.add_argument("--records", choices=SPLITS, default="problems", help="what it learns")
    parser.add_argument("--folder", type=Path, help="`.tuned`, or `.tuned-RECORDS`")
    arguments = parser.parse_args()
    folder = arguments.folder or name_folder(arguments.records)
    tuned = tune(folder, num_steps=arguments.steps, records=arguments.records)
    put_exits(tuned, num_steps=arguments.exit_steps)
    print(f"{tuned.run}: {tuned.about['sha256'][:12]}")


if __name__ == "__main__":
    main()
