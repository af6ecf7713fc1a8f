"""What users see: public names, the README, committed configurations."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import depthmix
from checkpoints import save_checkpoint
from depthmix.training.config import load_run_config

ROOT = Path(__file__).parent.parent


def test_public_names_are_sorted_and_documented():
    assert depthmix.__all__ == sorted(depthmix.__all__)
    text = "".join(path.read_text("utf-8") for path in (ROOT / "docs").glob("*.md"))
    text += (ROOT / "README.md").read_text("utf-8")
    for name in depthmix.__all__:
        assert getattr(depthmix, name).__doc__, name
        assert name in text, f"`{name}` is nowhere in README or docs"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 80


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/**/*.toml")), ids=str)
def test_committed_configurations_are_read(path):
    assert load_run_config(path).model.name


def test_the_changelog_begins_with_this_version():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert newest is not None
    assert f'version = "{newest[1]}"' in project


def test_the_readmes_table_is_that_of_the_published_page():
    readme, page = (
        (ROOT / name).read_text("utf-8").replace("\\_", "_")
        for name in ("README.md", "replication/results/small/longer/README.md")
    )
    shown = re.findall(r"^\| ([^|]+) \| [\d,-]+ \| ([^|]+) \| ([^|]+) \|$", readme, re.MULTILINE)
    row = r"^\| [^|]* \| [^|]* \| (\D[^|]*) \| [13] \| ([^|]+) \| ([^|]+) \|"
    published = re.findall(row, page, re.MULTILINE)
    assert len(shown) == 4
    assert sorted(shown) == sorted(published)


def test_models_are_named(tmp_path, monkeypatch):
    """What needed a section takes a name, with options beside it, or a spec with all of them."""
    folder = save_checkpoint(tmp_path / "base")
    records = [{"prompt": "a", "choices": [" b", " c"], "answer": 0}]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, records)))
    monkeypatch.chdir(tmp_path)
    model = depthmix.load_model(folder, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert depthmix.load_tokenizer(str(folder)).eos_token == "</s>"
    options = {"records": "own.jsonl", "metric": "choices", "template": "plain"}
    named = depthmix.evaluate(folder, **options)
    spec, plan = depthmix.ModelSpec(name=str(folder)), depthmix.EvaluationPlan(**options)
    assert depthmix.evaluate(spec, plan)["results"] == named["results"]
    with pytest.raises(TypeError, match="`plan` and the options limit cannot both"):
        depthmix.evaluate(folder, plan, limit=1)
    model, tokenizer = depthmix.load_model(folder), depthmix.load_tokenizer(folder)
    by_name = depthmix.look(folder, "hello", layers=[3, 4])
    in_memory = depthmix.look(model, "hello", tokenizer=tokenizer, layers=[3, 4])
    assert by_name == in_memory
    with pytest.raises(TypeError, match="`tokenizer` must come with a model in memory"):
        depthmix.look(model, "hello")
    with pytest.raises(TypeError, match="`tokenizer` must be left out"):
        depthmix.look(folder, "hello", tokenizer=tokenizer)


def test_names_are_imported_when_they_are_asked_for():
    code = (
        "import sys, depthmix; print(*{'trl', 'scipy', 'matplotlib', 'datasets'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", f"{code}; depthmix.train; print('trl' in sys.modules)"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.splitlines()[-1] == "True"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        depthmix.nothing  # noqa: B018
    assert {"train", "MoDEConfig"} <= {*dir(depthmix)}
