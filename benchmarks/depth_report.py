"""What the report of a run costs beside the models' own forward passes: 2,000 tokens of text.

SmolLM2-135M, tuned for a few steps with MoDE and with LoRA and measured before and after, so that
the page has a verdict, its charts and curves. `report` collects, reads the text with the tuned and
the pretrained model, and writes the page; `forwards` are the forward passes of both over the text
with their products with the head, `forward` is the tuned model's alone; `page` is the report
without a text. Starting Python and loading the model are in none of them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from evaluate import invent_records, save
from measure import Build, Measurement, measure, ratio
from peft import PeftModel
from results import parse_arguments, rounded, write_results
from transformers.utils.logging import disable_progress_bar

from depthmix.models.loading import load_model, load_tokenizer
from depthmix.models.spec import ModelSpec
from depthmix.pages import collect_report, passages, read_passages, write_report
from depthmix.training.config import load_run_config
from depthmix.training.train import train

DTYPES = ("float32", "bfloat16")
METHODS = ("mode", "lora")
TEXT = Path(__file__).parent.parent / "docs" / "decisions.md"
NUM_TOKENS, NUM_LATE_LAYERS = 2000, 3


def prepare(folder: str, *, toy: bool, num_tokens: int) -> None:
    """Train the runs whose report is written, and cut the text."""
    base, text = f"{folder}/base", TEXT.read_text("utf-8")
    save(base, toy=toy)
    tokenizer = load_tokenizer(ModelSpec(name=base))
    text = tokenizer.decode(tokenizer(text)["input_ids"][:num_tokens])
    assert len(tokenizer(text)["input_ids"]) == num_tokens
    Path(folder, "text.md").write_text(text, "utf-8")
    invented, items, records = (Path(folder, f"{n}.jsonl") for n in ("all", "items", "records"))
    num_items = 4 if toy else 32
    invent_records(invented, 2 * num_items)
    lines = invented.read_text("utf-8").splitlines(keepends=True)
    items.write_text("".join(lines[:num_items]), "utf-8")
    with records.open("w", encoding="utf-8") as file:
        for item in map(json.loads, lines[num_items:]):
            record = {"prompt": item["prompt"], "completion": item["choices"][item["answer"]]}
            file.write(json.dumps(record) + "\n")
    for dtype in DTYPES:
        for method in METHODS:
            train(
                load_run_config(
                    overrides={
                        "preset": "paper",
                        "model": {"name": base, "dtype": dtype},
                        "data": {"train": str(records)},
                        "method": method,
                        "mode": {"late_layers": NUM_LATE_LAYERS},
                        "training": {
                            "output_dir": f"{folder}/{dtype}/{method}",
                            "max_steps": 2 if toy else 20,
                            "per_device_train_batch_size": 2,
                            "gradient_accumulation_steps": 1,
                            "logging_steps": 1,
                            "save_strategy": "no",
                            "report_to": "none",
                            "disable_tqdm": True,
                        },
                        "evaluation": {"data": str(items), "metric": "choices"},
                    },
                )
            )


def build(folder: str, *, dtype: str, version: str) -> Callable[[], None]:
    """Load the model of a run; give its report, or what the report is measured by."""
    run = Path(folder, dtype, METHODS[0])
    section = ModelSpec(name=str(run), dtype=dtype)
    accelerator = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    model = load_model(section).to(accelerator).eval()  # pyrefly: ignore[bad-argument-type]
    assert isinstance(model, PeftModel)
    text = Path(folder, "text.md").read_text("utf-8")
    ids = load_tokenizer(section)(text, return_tensors="pt")["input_ids"].to(accelerator)
    passages.load_model = lambda _section: model

    @torch.no_grad()
    def forwards() -> None:
        model(input_ids=ids, use_cache=False)
        if version == "forwards":
            with model.disable_adapter():
                model(input_ids=ids, use_cache=False)

    def report() -> None:
        found = collect_report(run)
        if version == "report":
            found = replace(found, passages=read_passages(run, {"text": text}))
        write_report(found, Path(folder, f"{version}.html"))

    return forwards if version.startswith("forward") else report


def beyond(measured: dict[str, Measurement], passes: str) -> dict[str, float]:
    """Give seconds of a report beyond forward passes of the same round: median and slowest."""
    pairs = zip(measured["report"].seconds, measured[passes].seconds, strict=True)
    seconds = [report - own for report, own in pairs]
    return {"median": round(median(seconds), 2), "slowest": round(max(seconds), 2)}


def main() -> None:
    """Measure, compare, write."""
    arguments = parse_arguments(__doc__ or "", "depth_report")
    disable_progress_bar()
    rounds, num_tokens, dtypes = 5, NUM_TOKENS, DTYPES
    if arguments.quick:
        rounds, dtypes = 2, DTYPES[:1]
    if arguments.toy:
        rounds, num_tokens = 1, 50
    cases, ratios = [], {}
    with tempfile.TemporaryDirectory() as folder:
        preparing = get_context("fork").Process(
            target=partial(prepare, folder, toy=arguments.toy, num_tokens=num_tokens)
        )
        preparing.start()
        preparing.join()
        if preparing.exitcode:
            raise SystemExit("The runs could not be trained; see above.")
        for dtype in dtypes:
            versions: dict[str, Build] = {
                name: partial(build, folder, dtype=dtype, version=name)
                for name in ("forwards", "forward", "report", "page")
            }
            measured = measure(versions, rounds=rounds, threads=arguments.threads)
            cases.append(
                {
                    "dtype": dtype,
                    "seconds_beyond_forwards": beyond(measured, "forwards"),
                    "seconds_beyond_forward": beyond(measured, "forward"),
                    "page_kib": Path(folder, "report.html").stat().st_size // 1024,
                    "versions": {
                        name: rounded(m.summary().items()) for name, m in measured.items()
                    },
                }
            )
            time = ratio(measured, "report", "forwards")["time"]
            ratios[f"report_over_forwards_{dtype}_time"] = time
    results = {"num_tokens": num_tokens, "k": NUM_LATE_LAYERS, "rounds": rounds, "cases": cases}
    write_results(arguments, {**results, "ratios": rounded(ratios.items())})


if __name__ == "__main__":
    main()
