"""What is imported when, in which order, and without the extras."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import depthmix
from checkpoints import make_model, make_tokenizer
from depthmix.libraries.extras import EXTRAS, MissingExtraError, require
from evaluation_folder import write_evaluation
from fresh import WITHOUT_LAB, run_fresh

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "depthmix"
CORE = ("options", "libraries", "files", "method", "loss", "adapters", "decoding", "depth")
"""Rooms that need no extra."""

AS_THE_COMMAND = """
import sys
import depthmix_cli
try:
    code = depthmix_cli.main()
finally:
    heavy = [n for n in ("peft", "torch", "transformers", "trl") if sys.modules.get(n)]
    print("imported:", *heavy)
sys.exit(code)
"""
"""What the script `depthmix` does, and what was imported then."""

DOORS = """
import sys
adapter, base = sys.argv[1:]
{first}
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM
{last}
assert type(PeftConfig.from_pretrained(adapter)).__name__ == "MoDEConfig"
plain = AutoModelForCausalLM.from_pretrained(base)
opened = [
    AutoPeftModelForCausalLM.from_pretrained(adapter),
    PeftModel.from_pretrained(plain, adapter),
    AutoModelForCausalLM.from_pretrained(adapter),
]
later = AutoModelForCausalLM.from_pretrained(base)
later.load_adapter(adapter)
for model in (*opened, later):
    assert any("lora_mode" in name for name, _ in model.named_parameters())
"""

IN_THREADS = """
import threading
failed = []
def bring(name):
    try:
        assert __import__(name).MoDEConfig.from_preset("paper").r
    except BaseException as error:
        failed.append(error)
threads = [threading.Thread(target=bring, args=[name]) for name in
           ("depthmix", "depthmix", "depthmix")]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failed, failed
"""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A tiny model with its tokenizer, and an adapter for it."""
    folder = tmp_path_factory.mktemp("adapter")
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    for place in ("base", "adapter"):
        tokenizer.save_pretrained(folder / place)
    model.save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    config = depthmix.MoDEConfig(late_layers=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.mark.parametrize(
    ("first", "last"),
    [("import depthmix", ""), ("", "import depthmix"), (IN_THREADS, "")],
    ids=["before PEFT", "after PEFT", "in threads"],
)
def test_an_adapter_opens_at_every_door_whatever_is_imported_first(adapter, first, last):
    code = DOORS.format(first=first, last=last)
    run_fresh(code, adapter, adapter.parent / "base")


def test_a_spawned_process_reads_what_it_is_sent():
    run_fresh("""
import multiprocessing, pickle, sys
if __name__ == "__main__":
    import depthmix
    sent = pickle.dumps(depthmix.MoDEConfig(late_layers=2))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        got = pool.apply(pickle.loads, [sent])
        assert type(got) is depthmix.MoDEConfig and got.late_layers == 2
""")


def test_a_room_of_adapters_alone_makes_the_method_known():
    run_fresh("""
import depthmix_cli.process, sys
import depthmix
assert "peft" not in sys.modules
from depthmix.adapters.files import MIXTURE
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known
assert known["MODE_LORA"] is depthmix.MoDEConfig
""")


def test_the_package_brings_no_more_than_peft_does():
    shown = run_fresh("""
import sys
import peft, transformers.modeling_utils
before = set(sys.modules)
import depthmix
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
""").stdout
    assert set(shown.split()) == {"depthmix", "jaxtyping", "peft"}


def test_the_core_works_without_the_extras(adapter, tmp_path):
    """The rooms of the method import, a model with its adapter is loaded, and it generates."""
    modules = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for room in CORE
        for path in sorted((PACKAGE / room).glob("[a-z]*.py"))
    ]
    code = f"""
{WITHOUT_LAB}
import importlib
import depthmix, torch
for name in {modules!r}:
    importlib.import_module(name)
model = depthmix.load_model(sys.argv[1])
tokenizer = depthmix.load_tokenizer(sys.argv[1])
inputs = tokenizer("Once", return_tensors="pt")
plain = model.generate(**inputs, max_new_tokens=4, do_sample=False)
for way in (depthmix.LazyDepth(model), depthmix.FastGeneration(model)):
    assert (way.generate(**inputs, max_new_tokens=4, do_sample=False) == plain).all()
depthmix.attach(depthmix.load_model(sys.argv[2]), late_layers=2)
"""
    run_fresh(code, adapter, adapter.parent / "base", folder=tmp_path)


@pytest.mark.parametrize(
    "asked",
    ["depthmix.train", "depthmix.MoDESFTTrainer", "depthmix.evaluate", "depthmix.compare",
     "importlib.import_module('depthmix.figures.style')",
     "importlib.import_module('depthmix.pages.lens_page')",
     "importlib.import_module('depthmix.statistics.intervals')"],
)  # fmt: skip
def test_what_is_beyond_the_core_names_its_extra(asked):
    code = f"""
{WITHOUT_LAB}
import importlib
import depthmix_cli.process, depthmix
try:
    {asked}
except ImportError as error:
    print(error)
"""
    shown = run_fresh(code).stdout
    assert re.fullmatch(
        r"`depthmix\.\w+` needs trl, .*scipy, .* which are not installed: run "
        r"`pip install 'depthmix\[lab\]'`\.\n",
        shown,
    )


def test_the_command_without_its_extra_says_so_in_one_sentence():
    done = run_fresh(WITHOUT_LAB + AS_THE_COMMAND, "train", "--help", check=False)
    assert done.returncode == 1
    assert re.fullmatch(
        r"depthmix: The command `depthmix` needs trl, .*: run `pip install 'depthmix\[lab\]'`\.\n",
        done.stderr,
    )
    assert done.stdout == "imported:\n"


def test_a_comparison_imports_no_torch(tmp_path):
    for number, name in enumerate(("lora", "mode")):
        scores = (np.arange(20) * (7 + number) % 3 > 0).astype(float)
        write_evaluation(tmp_path / name, {"sums": scores})
    arguments = ("compare", "lora", "mode", "--output", "tables")
    done = run_fresh(AS_THE_COMMAND, *arguments, folder=tmp_path)
    assert done.stdout.endswith("imported:\n")
    assert "lora" in (tmp_path / "tables" / "comparison.md").read_text()


def test_the_command_knows_the_method_where_it_opens_an_adapter(adapter):
    options = ("--generation.max-new-tokens", "1")
    done = run_fresh(AS_THE_COMMAND, "generate", adapter, "Once", *options)
    assert done.stdout.endswith("imported: peft torch transformers\n")  # and not TRL


def test_each_extra_is_what_the_project_says():
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    names = packages_distributions()
    declared = {
        extra: {re.match(r"[\w-]+", line)[0].lower() for line in lines}
        for extra, lines in project["optional-dependencies"].items()
    }
    for extra, modules in EXTRAS.items():
        known = {names.get(module, [module])[0].lower().replace("_", "-") for module in modules}
        assert known == declared[extra] - {"depthmix"}


def test_what_is_imported_belongs_to_the_core_or_to_an_extra():
    known = {module for modules in EXTRAS.values() for module in modules}
    known |= {"torch", "transformers", "peft", "accelerate", "huggingface_hub", "safetensors"}
    known |= {"jaxtyping", "numpy", "depthmix", "depthmix_cli", *sys.stdlib_module_names}
    known |= {"pyarrow", "pydantic_core", "tokenizers"}  # of datasets, pydantic, transformers
    known |= {"cycler", "markupsafe"}  # of matplotlib, jinja2
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in found} <= known, path


def test_a_missing_module_is_named(monkeypatch):
    monkeypatch.setitem(EXTRAS, "eval", ("torch", "no_such_module"))
    require("eval", "A benchmark", "torch")
    with pytest.raises(MissingExtraError, match=r"^A benchmark needs no-such-module, which is not"):
        require("eval", "A benchmark")
    with pytest.raises(RuntimeError, match=r"needs none, no-such-module, which are not installed:"):
        require("eval", "A benchmark", "none", "no_such_module")


def test_make_names_tests_that_there_are():
    found = re.search(r"^CORE = ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text("utf-8"), re.M)
    assert found is not None
    names = found[1].replace("\\", "").split()
    assert len(names) > 10
    assert [name for name in names if not (ROOT / "tests" / f"test_{name}.py").is_file()] == []
