"""Options that are read from the source of their class are what the class says."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import MISSING, fields
from enum import Enum
from typing import get_args, get_type_hints

import pytest
from pydantic_core import to_jsonable_python
from trl import SFTConfig

from depthmix import MoDEConfig
from depthmix.files.settings import read_declared, read_options, read_value
from depthmix.options.declared import list_declared

CLASSES = {
    MoDEConfig: ("depthmix.adapters.config", "MoDEConfig"),
    SFTConfig: ("trl.trainer.sft_config", "SFTConfig"),
}


@pytest.mark.parametrize("owner", CLASSES, ids=lambda owner: owner.__name__)
def test_types_and_defaults_are_those_of_the_class(owner):
    declared, hints = list_declared(*CLASSES[owner]), get_type_hints(owner)
    options = {option.name: option for option in fields(owner) if option.init}
    assert declared.keys() == options.keys()
    for name, option in declared.items():
        if option.default is not MISSING or options[name].default == "none":
            assert option.default == options[name].default, name
        enumerations = [kind for kind in get_args(hints[name]) if _is_enumeration(kind)]
        if option.kind is str and enumerations:
            for value in (*(member.value for member in enumerations[0]), "other", "a,b", "none"):
                read = read_value(value, hints[name], default=options[name].default)
                assert to_jsonable_python(read) == read_value(value, str), (name, value)
        elif option.kind is not MISSING:
            assert option.kind == hints[name], name
    plain = [name for name, option in declared.items() if option.kind is not MISSING]
    assert len(plain) >= 0.75 * len(options)


def _is_enumeration(kind):
    return isinstance(kind, type) and issubclass(kind, Enum)


@pytest.mark.parametrize(
    ("owner", "given"),
    [
        (SFTConfig, {"num_train_epochs": 2, "save_strategy": "no", "warmup_steps": "100"}),
        (SFTConfig, {"report-to": "none", "max_length": "null", "seed": "3", "bf16": "true"}),
        (SFTConfig, {"learning_rate": "1e-4", "optim": "sgd", "debug": "underflow_overflow"}),
        (MoDEConfig, {"late_layers": "[2, 3]", "target_modules": "q_proj", "r": "4"}),
        (MoDEConfig, {"target_modules": "q_proj,v_proj", "bias": "none", "loftq_config": {}}),
    ],
)
def test_values_are_read_as_by_the_class(owner, given):
    read = read_declared("part", given, *CLASSES[owner])
    assert to_jsonable_python(read) == to_jsonable_python(read_options("part", given, owner))


@pytest.mark.parametrize(
    ("owner", "given", "message"),
    [
        (SFTConfig, {"learning_ratee": 1}, "`part.learning_ratee` is not an option of SFTConfig"),
        (SFTConfig, {"max_steps": "many"}, "`part.max_steps` must be int, got 'many'"),
        (MoDEConfig, {"router_init": "random"}, "`part.router_init` must be 'gaussian' or"),
        (MoDEConfig, {"backbone": 1}, "is not an option of MoDEConfig"),
    ],
)
def test_mistakes_are_told_as_by_the_class(owner, given, message):
    with pytest.raises(ValueError, match=message):
        read_declared("part", given, *CLASSES[owner])


def test_what_is_not_found_has_no_options():
    for place in (
        ("nowhere.at.all", "A"),
        ("json", "NoSuchClass"),
        ("json.none", "A"),
        ("sys", "A"),
    ):
        assert list_declared(*place) == {}


def test_nothing_is_imported(tmp_path):
    code = (
        "import importlib.util, json, sys\n"
        "spec = importlib.util.spec_from_file_location('declared', sys.argv[1])\n"
        "module = sys.modules['declared'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "found = [len(module.list_declared(*place)) for place in json.loads(sys.argv[2])]\n"
        "print(json.dumps([found, 'torch' in sys.modules, 'trl' in sys.modules]))\n"
    )
    path = sys.modules["depthmix.options.declared"].__file__
    command = [sys.executable, "-c", code, str(path), json.dumps(list(CLASSES.values()))]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, *imported = json.loads(printed)
    assert all(number > 50 for number in found)
    assert imported == [False, False]
