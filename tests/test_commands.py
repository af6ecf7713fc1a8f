"""Commands take what the functions take that they call: types, defaults and help stand there."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any, get_type_hints

import pytest
from cyclopts import App

from depthmix.comparison.comparison import compare
from depthmix.comparison.tables import write_tables
from depthmix.data.audit import audit
from depthmix.data.spec import DataSpec
from depthmix.depth.exit_training import train_exits
from depthmix.evaluation.bench import bench
from depthmix.evaluation.harness import evaluate_all
from depthmix.evaluation.plan import EvaluationPlan
from depthmix.exports.export import export
from depthmix.models.calibrating import calibrate
from depthmix.models.exits import add_exits
from depthmix.models.generation import chat, generate
from depthmix.models.spec import ModelSpec
from depthmix.pages.lens_page import show_lens
from depthmix.pages.lens_server import serve_lens
from depthmix.pages.report_page import show_report
from depthmix.training.config import RunConfig
from depthmix.training.inspection import inspect_model
from depthmix.training.train import train
from depthmix_cli import answering, leaving, looking, measuring, running, speeding, tuning
from depthmix_cli.app import PLACES, load_command
from depthmix_cli.declarations import part, taking

TEXTS = (str, str | None, list[str], int | str, int | str | None)
"""Types in which the command line takes what a function takes in others, too."""

CALLED: dict[Any, tuple[Any, ...]] = {
    tuning.train: (train, RunConfig),
    tuning.info: (inspect_model, ModelSpec),
    speeding.add_exits: (add_exits, train_exits, DataSpec, ModelSpec),
    speeding.calibrate: (calibrate, ModelSpec),
    speeding.bench: (bench, ModelSpec),
    answering.generate: (generate, ModelSpec),
    answering.chat: (chat, ModelSpec),
    leaving.export: (export, ModelSpec),
    running.run: (),
    looking.lens: (show_lens, serve_lens, ModelSpec),
    looking.report: (show_report,),
    measuring.evaluate: (EvaluationPlan, ModelSpec, evaluate_all),
    measuring.audit: (audit,),
    measuring.compare: (compare, write_tables),
}
"""What each command calls, and the specs that it makes."""

OWN = {
    # A file, libraries' options, and a second run.
    tuning.train: {"config", "evaluation", "mode", "training", "beside"},
    speeding.calibrate: {"lossy"},
    speeding.bench: {"top_k"},  # one of the ways, not how the model is loaded
    answering.generate: {"generation"},
    answering.chat: {"generation"},
    leaving.export: {"output"},
    running.run: {"command"},
    looking.lens: {"model", "serve", "compare", "output"},
    looking.report: {"text", "output"},
    measuring.evaluate: {"models"},
    measuring.audit: {"drop", "list_leaking"},
    measuring.compare: {"output"},
}
"""Options that only the command line has, or has under a name of its own."""

SOURCE = """
from typing import Literal
from pathlib import Path
from depthmix.data.spec import Template

Form = Literal["page", "figure"]


def draw(model, *, form: Form = "page", template: Template | None = None, layers: str | int = 2):
    '''Draw.

    Args:
        form: What to
            draw.
        layers: Which of them.
    '''
"""


def list_arguments(command) -> dict[str, Any]:
    """What cyclopts knows of a command's options, by name in Python."""
    arguments = App(default_command=command).assemble_argument_collection(
        default_parameter=None, parse_docstring=True
    )
    return {argument.field_info.name: argument for argument in arguments if not argument.keys}


@pytest.mark.parametrize("command", CALLED, ids=lambda command: command.__name__)
def test_an_option_is_an_argument_of_what_is_called(command):
    hints, own = get_type_hints(command), OWN.get(command, set())
    for name, option in inspect.signature(command).parameters.items():
        owners = [one for one in CALLED[command] if name in inspect.signature(one).parameters]
        assert owners or name in own, name
        for owner in owners if name not in own else ():
            argument = inspect.signature(owner).parameters[name]
            if option.default not in (None, option.empty):  # `None` leaves it to the function
                assert argument.default in (option.default, argument.empty), (name, owner)
            theirs = get_type_hints(owner)[name]
            known = hints[name] == theirs or hints[name] in TEXTS
            is_section = name in ("model", "data", "mode", "judge", "mt_bench")
            known |= name == "method"  # a choice, which the command line may leave to the file
            assert known or is_section, (name, owner)


def test_every_command_and_every_option_of_a_plan_is_here():
    assert set(CALLED) == set(map(load_command, PLACES))
    plan = {option.name: option.default for option in fields(EvaluationPlan)}
    options = inspect.signature(measuring.evaluate).parameters
    assert plan.keys() <= options.keys()
    taken = plan.keys() - {"tasks"}
    assert {name: options[name].default for name in taken} == {name: plan[name] for name in taken}


@pytest.mark.parametrize("command", CALLED, ids=lambda command: command.__name__)
def test_every_option_has_its_help(command):
    arguments = list_arguments(command)
    assert arguments
    for name, argument in arguments.items():
        assert argument.parameter.help, name
        assert "`None`" not in argument.parameter.help, "a command line has no such value"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of another name, of which nothing is imported."""
    (tmp_path / "drawing").mkdir()
    (tmp_path / "drawing" / "__init__.py").write_text("raise AssertionError")
    (tmp_path / "drawing" / "pictures.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)


def test_options_are_read_where_they_are_declared(package):
    @taking(("drawing.pictures:draw",), ("depthmix.models.spec:ModelSpec", "dtype"))
    def command(model: str, *, width: int = 3, **options: Any) -> None:
        """Draw a model."""

    arguments = list_arguments(command)
    assert list(arguments) == ["model", "width", "form", "template", "layers", "dtype"]
    spec = get_type_hints(ModelSpec)
    kinds = get_type_hints(command)
    assert kinds["form"].__args__ == ("page", "figure")
    assert kinds["layers"] is str  # as text, which the function reads
    assert kinds["template"].__args__[0].__args__ == ("auto", "plain", "alpaca", "chat")
    assert kinds["dtype"] == spec["dtype"]
    assert arguments["form"].parameter.help == "What to\ndraw."
    assert [arguments[name].field_info.default for name in ("form", "layers")] == ["page", 2]


def test_what_is_not_there_is_no_option(package):
    def command(**options: Any) -> None:
        """Draw nothing."""

    with pytest.raises(ValueError, match=r"`sources` must name options of .*draw, got \['size'\]"):
        taking(("drawing.pictures:draw", "form", "size"))(command)
    with pytest.raises(LookupError, match=r"drawing.pictures does not define paint"):
        taking(("drawing.pictures:paint",))(command)


def test_a_part_of_the_options_is_taken_out():
    options = {"dtype": "float32", "lazy": True}
    assert part(options, "dtype", "top_k") == {"dtype": "float32"}
    assert options == {"lazy": True}
