"""No file of a run or an evaluation holds a secret that was passed in an option."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import fields

import pytest
import torch
from transformers import GenerationConfig
from trl import SFTConfig

import depthmix_cli
from checkpoints import save_checkpoint
from depthmix import MoDEConfig, load_run_config, train
from depthmix.evaluation.conversations import MTBenchSpec
from depthmix.evaluation.harness import evaluate
from depthmix.evaluation.judge import JudgeSpec
from depthmix.evaluation.plan import EvaluationPlan
from depthmix.models.spec import ModelSpec
from depthmix.options.secrets import is_secret, without_secrets
from depthmix.options.types import list_types

MARKER = "hf_Recognisable0123456789"

HARMLESS = {"eos_token", "pad_token"}
"""Text options whose names end as those of secrets do; of no other is there a reason known."""

OPTIONS = {
    owner: [field.name for field in fields(owner)]
    for owner in (SFTConfig, MoDEConfig, JudgeSpec, MTBenchSpec, EvaluationPlan)
} | {GenerationConfig: [name for name in GenerationConfig().to_dict() if name[0] != "_"]}


def takes_text(owner, name):
    return owner is GenerationConfig or "str" in str(list_types(owner)[name])


def takes_mapping(name):
    return "dict" in str(list_types(SFTConfig)[name])


SECRET_OPTIONS = {
    owner: [
        name
        for name in names
        if re.search("token|key|secret|password", name) and takes_text(owner, name)
        if name not in HARMLESS and not re.search("tokens|token_id|token_ind", name)
    ]
    for owner, names in OPTIONS.items()
}


def find_marker(folder, marker=MARKER):
    """List the files below a folder that hold the marker, as text or in a pickle's archive."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if marker.encode() in path.read_bytes()]


def test_the_options_that_hold_secrets_are_known():
    assert SECRET_OPTIONS[SFTConfig]
    assert all(is_secret(name, MARKER) for name in SECRET_OPTIONS[SFTConfig])
    # A judge's key stays in its variable, and nothing else takes one.
    assert SECRET_OPTIONS[JudgeSpec] == ["key_variable"]
    assert not SECRET_OPTIONS[MoDEConfig] + SECRET_OPTIONS[MTBenchSpec]
    assert all(not is_secret(name, MARKER) for name in OPTIONS[MoDEConfig])


@pytest.mark.parametrize(
    "name",
    ["hub_token", "push_to_hub_token", "token", "api-key", "wandb_api_key", "clientSecret",
     "password", "aws_secret_access_key", "auth_token", "HF_TOKEN", "apikey", "credentials"],
)  # fmt: skip
def test_secrets_are_known_by_their_names(name):
    assert is_secret(name, MARKER)
    assert not is_secret(name, 3)
    assert not is_secret(name, None)


@pytest.mark.parametrize(
    "name",
    ["eos_token", "pad_token", "bos_token", "max_new_tokens", "trainable_token_indices",
     "eos_token_id", "key_variable", "include_num_input_tokens_seen", "keys_to_ignore",
     "tokenizer", "monkey"],
)  # fmt: skip
def test_pieces_of_text_are_no_secrets(name):
    assert not is_secret(name, "</s>")


@pytest.mark.parametrize("wrap", [dict, lambda d: [d], json.dumps, lambda d: {"deeper": (d, 1)}])
def test_secrets_are_found_however_deep_they_lie(wrap):
    kept = {"eos_token": "</s>", "top": 3}
    assert without_secrets(wrap({**kept, "token": MARKER})) == without_secrets(wrap(kept))
    assert MARKER not in str(without_secrets(wrap({"a": {"api_key": MARKER}})))
    assert without_secrets("{not json") == "{not json"
    assert without_secrets('{"a":1}') == '{"a":1}'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train with a marker in every option that may hold a secret, and with TensorBoard's log."""
    folder = tmp_path_factory.mktemp("secrets")
    records = [{"prompt": f"{n} =", "completion": f" {n}"} for n in range(4)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    items = [{"prompt": f"{n} =", "choices": [f" {n}", " no"], "answer": 0} for n in range(2)]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, items)))
    training = {name: MARKER for name in SECRET_OPTIONS[SFTConfig]}
    training |= {"model_init_kwargs": {"token": MARKER, "deeper": {"api_key": MARKER}}}
    training |= {
        "output_dir": str(folder / "out"),
        "logging_dir" if "logging_dir" in OPTIONS[SFTConfig] else "run_name": str(folder / "out"),
        "report_to": "tensorboard",
        "max_steps": 2,
        "save_steps": 1,
        "eos_token": "</s>",
    }
    sections = {
        "model": {"name": str(save_checkpoint(folder / "base"))},
        "data": {"train": str(folder / "train.jsonl")},
        "mode": {"late_layers": 2, "target_modules": ["q_proj"]},
        "training": training,
    }
    train(load_run_config(None, sections))
    return folder, sections


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_file_of_a_run_holds_a_secret(run):
    folder, _ = run
    names = {path.name for path in (folder / "out").rglob("*")}
    assert {"training_args.bin", "README.md", "results.json", "checkpoint-1"} <= names
    assert any("tfevents" in name for name in names)
    assert find_marker(folder) == []
    arguments = torch.load(folder / "out" / "training_args.bin", weights_only=False)
    assert type(arguments) is SFTConfig
    assert arguments.hub_token is None
    assert arguments.model_init_kwargs == {"deeper": {}}
    assert arguments.eos_token == "</s>"
    assert arguments.to_dict()["max_steps"] == 2
    pickle.dumps(arguments)


def test_such_a_run_goes_on_with_the_secrets_given_again(run):
    folder, sections = run
    training = {**sections["training"], "hub_token": "another"}
    train(load_run_config(None, {**sections, "training": training}), resume=True)
    assert find_marker(folder) == []


def test_no_file_of_an_evaluation_holds_a_secret(run, tmp_path, monkeypatch):
    folder, _ = run
    monkeypatch.setenv("OPENAI_API_KEY", MARKER)
    plan = EvaluationPlan(records=str(folder / "own.jsonl"), metric="choices")
    evaluate(ModelSpec(name=str(folder / "out")), plan, output_dir=tmp_path / "e")
    assert find_marker(tmp_path) == []


@pytest.mark.parametrize("name", SECRET_OPTIONS[JudgeSpec])
def test_a_key_in_place_of_its_variable_is_refused_and_not_shown(name):
    with pytest.raises(ValueError, match=f"`judge.{name}` must be the name of") as error:
        JudgeSpec(model="m", **{name: "sk-" + MARKER})
    assert MARKER not in str(error.value)


def test_an_option_for_a_key_is_refused_and_not_shown(capsys):
    command = ["evaluate", "m", "--tasks", "mt_bench", "--judge.model", "j"]
    assert depthmix_cli.main([*command, f"--judge.api-key={MARKER}"]) == 1
    shown = capsys.readouterr()
    assert "`judge.api_key` is not an option" in shown.err
    assert MARKER not in shown.err + shown.out
