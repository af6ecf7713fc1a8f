"""Every command and snippet of README and docs is one: its options exist, its code runs."""

from __future__ import annotations

import ast
import importlib
import json
import re
import tomllib
from pathlib import Path

import pytest

from depthmix.data.evaluation_records import choose_metric
from depthmix.data.forms import to_prompt_and_completion
from depthmix.evaluation.plan import read_plan
from depthmix.models.continuation import read_generation_options
from depthmix.training.config import load_run_config
from depthmix_cli.app import PLACES, app, load_command
from depthmix_cli.spelling import spell_out
from documents import PAGES, ROOT, SHOWN, Block, list_blocks, list_inline_commands

BLOCKS = [block for page in PAGES for block in list_blocks(page)]
COMMANDS = [
    pytest.param(words, id=f"{block.page.stem}: {' '.join(words)[:60]}")
    for block in BLOCKS
    if not block.language
    for words in block.list_commands()
]
INLINE = [
    pytest.param(words, id=f"{page.stem}: {' '.join(words)[:60]}")
    for page in PAGES
    for words in list_inline_commands(page)
]


def name_block(block: Block) -> str:
    return f"{block.page.stem}-{BLOCKS.index(block)}"


def parse(words: list[str]) -> None:
    """Read a command's options as the command line does, with those of its sections."""
    options = {"exit_on_error": False, "print_error": False}
    written = words[1:]
    if words[1] in PLACES:
        written = spell_out(written, load_command(words[1]))
    command, bound, _ = app.parse_args(written, **options)
    given = bound.arguments
    if command.__name__ == "train":
        sections = ("model", "data", "mode", "training", "evaluation", "method", "preset")
        settings = {name: given[name] for name in sections if given.get(name) is not None}
        path = given.get("config")
        if path is None:
            load_run_config(None, settings)
        elif (ROOT / path).is_file():
            load_run_config(ROOT / path, settings)
        else:  # one that its reader has written
            named = {"model": {"name": "base"}, "data": {"train": "train.jsonl"}}
            sections = {**named, **settings}
            for name, options in named.items():
                sections[name] = options | settings.get(name, {})
            load_run_config(None, sections)
    elif command.__name__ == "evaluate":
        names = ("tasks", "judge", "mt_bench", "records", "metric", "layer", "limit", "protocol")
        read_plan({name: given[name] for name in names if name in given})
    elif command.__name__ in ("generate", "chat"):
        read_generation_options(given.get("generation") or {})


def list_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))


def check_script(words: list[str]) -> None:
    """Check that a script of this repository has the options that it is called with."""
    if words[1] == "-m":
        (path,) = (
            place / words[2].replace(".", "/")
            for place in (ROOT, *ROOT.glob("*/src"))
            if (place / words[2].partition(".")[0]).is_dir()
        )
        path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    else:
        path = ROOT / words[1]
    source = path.read_text("utf-8")
    for flag in (word for word in words if word.startswith("--")):
        assert f'"{flag}"' in source, f"{path.name} has no {flag}"


def check_installation(words: list[str]) -> None:
    """Check the files and extras that pip is told of."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for word in words[2:]:
        if extras := re.fullmatch(r"\.\[(.*)\]", word):
            assert set(extras[1].split(",")) <= project["optional-dependencies"].keys()
        elif "/" in word or word in ("constraints.txt", "replication"):
            assert (ROOT / word).exists()


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_is_one(words):
    match words[0]:
        case "depthmix":
            parse(words)
        case "make":
            assert words[1] in list_targets()
            assert all(re.match("ARGS=|NAME=", word) for word in words[2:])
        case "python":
            check_script(words)
        case "pip":
            check_installation(words)
        case "vllm":
            assert words[1] == "serve"  # another program, whose options are not ours to know
        case other:
            pytest.fail(f"{other} is no command that this test knows; mark the block `{SHOWN}`")


@pytest.mark.parametrize("words", INLINE)
def test_a_command_in_a_sentence_is_one(words):
    parse(words)


def test_a_command_that_is_none():
    for words in (
        ["depthmix", "train", "--data.train", "a.jsonl", "--model.name", "b", "--mode.rank", "8"],
        ["depthmix", "evaluate", "a", "--task", "arc_easy"],
        ["depthmix", "generate", "a", "b", "--generation.max-tokens", "8"],
    ):
        with pytest.raises(Exception, match=r"rank|task|max_tokens"):
            parse(words)
    with pytest.raises(AssertionError, match=r"table.py has no --pages"):
        check_script(["python", "examples/arc_easy/table.py", "--pages"])


@pytest.mark.parametrize("block", BLOCKS, ids=name_block)
def test_a_block_is_of_a_known_kind(block, tmp_path):
    match block.language:
        case "" | "text":
            assert block.text.strip()
        case "python":
            ast.parse(block.text)
        case "toml":
            (tmp_path / "run.toml").write_text(block.text, "utf-8")
            load_run_config(tmp_path / "run.toml", {"model": {"name": "base"}})
        case other:
            pytest.fail(f"a block of {block.page.name} is marked {other!r}, which nothing checks")


def test_the_records_that_docs_show_are_records():
    page = (ROOT / "docs" / "start.md").read_text("utf-8")
    train, measure = page.split("## Records to measure by")
    shown = [json.loads(line) for line in re.findall(r"`(\{\".*?\})`", train)]
    assert len(shown) >= 4
    for number, record in enumerate(shown):
        assert all(to_prompt_and_completion(record, number, "auto"))
    asked = [json.loads(line) for line in re.findall(r"`(\{\".*?\})`", measure)]
    assert [choose_metric([record])[0] for record in asked] == ["exact_match", "choices"]


def test_the_page_of_options_is_not_stale(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    written = importlib.import_module("write_options")
    told = "docs/options.md is stale: run `make docs`"
    assert written.render() == Path(written.PAGE).read_text("utf-8"), told
    shown = re.findall(r"^\| `(\w+)` \|", written.render(), re.M)
    named = {name.rpartition(".")[2] for name in written.WHEN}
    assert named <= set(shown), "what to change names an option that is not there"
