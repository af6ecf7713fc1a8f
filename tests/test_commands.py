"""Commands take what the functions take that they call."""

from __future__ import annotations

import inspect
from dataclasses import is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from cyclopts import App

from depthmix.comparison.comparison import compare
from depthmix.comparison.tables import write_tables
from depthmix.data.audit import audit
from depthmix.evaluation.harness import evaluate_all
from depthmix.evaluation.plan import EvaluationPlan
from depthmix.models.generation import chat, generate
from depthmix.models.spec import ModelSpec
from depthmix.pages.lens_page import show_lens
from depthmix.pages.lens_server import serve_lens
from depthmix.pages.report_page import show_report
from depthmix.training.config import RunConfig
from depthmix.training.inspection import inspect_model
from depthmix.training.train import train
from depthmix_cli import answering, looking, measuring, tuning
from depthmix_cli.app import COMMANDS

CALLED: dict[Any, tuple[Any, ...]] = {
    tuning.train: (train, RunConfig),
    tuning.info: (inspect_model,),
    answering.generate: (generate, ModelSpec),
    answering.chat: (chat, ModelSpec),
    looking.lens: (show_lens, serve_lens, ModelSpec),
    looking.report: (show_report,),
    measuring.evaluate: (EvaluationPlan, ModelSpec, evaluate_all),
    measuring.audit: (audit,),
    measuring.compare: (compare, write_tables),
}
"""What each command calls, and the specs that it makes."""

OWN = {
    tuning.train: {"config", "evaluation", "mode", "training"},  # a file, and libraries' options
    answering.generate: {"generation"},
    answering.chat: {"generation"},
    looking.lens: {"model", "serve", "compare", "output"},
    looking.report: {"text", "output"},
    measuring.evaluate: {"models"},
    measuring.audit: {"drop", "list_leaking"},
    measuring.compare: {"output"},
}
"""Options that only the command line has, or has under a name of its own."""


def choices(hint: Any) -> set[str]:
    """The words that a type accepts beside whatever else it does."""
    if get_origin(hint) is Literal:
        return set(get_args(hint))
    return set().union(*(choices(part) for part in get_args(hint)))


@pytest.mark.parametrize("command", CALLED, ids=lambda command: command.__name__)
def test_an_option_means_what_it_means_in_python(command):
    hints, own = get_type_hints(command), OWN.get(command, set())
    for name, option in inspect.signature(command).parameters.items():
        owners = [one for one in CALLED[command] if name in inspect.signature(one).parameters]
        assert owners or name in own, name
        for owner in owners if name not in own else ():
            argument = inspect.signature(owner).parameters[name]
            if option.default not in (None, option.empty):  # `None` leaves it to the function
                assert argument.default in (option.default, argument.empty), (name, owner)
            offered, accepted = choices(hints[name]), choices(get_type_hints(owner)[name])
            assert offered <= accepted, (name, owner)
            left = accepted - offered
            assert not offered or left <= ({"auto"} if name == "template" else set()), name


def test_every_command_and_every_option_of_a_plan_is_here():
    assert set(CALLED) == set(COMMANDS)
    assert is_dataclass(EvaluationPlan)
    plan = set(inspect.signature(EvaluationPlan).parameters)
    assert plan <= set(inspect.signature(measuring.evaluate).parameters)


@pytest.mark.parametrize("command", CALLED, ids=lambda command: command.__name__)
def test_every_option_has_its_help(command):
    arguments = App(default_command=command).assemble_argument_collection(
        default_parameter=None, parse_docstring=True
    )
    assert arguments
    assert [a.name for a in arguments if not a.parameter.help] == []
