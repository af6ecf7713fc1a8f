"""Exits put on models by name: of every kind, asked as they were trained, saved beside them."""

from __future__ import annotations

import json

import pytest
import torch

import depthmix
import depthmix_cli
from depthmix import ModelSpec, add_exits, load_exits, load_model, load_tokenizer
from depthmix.adapters.exit_files import read_exit_settings
from depthmix.data.spec import DataSpec
from depthmix.data.tokens import to_token_sequences
from depthmix.models.exit_records import NUM_READ_TOKENS, gather_records
from runs import make_runs

QUICK = {"rank": 2, "num_steps": 2, "batch_size": 4}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with a mixture, one of plain LoRA, one by Alpaca's template; the last one merged."""
    folder = tmp_path_factory.mktemp("runs")
    without = {"evaluation": {}}
    place = make_runs(
        folder,
        {
            "mode": without,
            "lora": {**without, "method": "lora"},
            "alpaca": {**without, "data": {"template": "alpaca"}},
        },
    )
    merged = load_model(place / "mode").merge_and_unload()
    merged.save_pretrained(folder / "merged")
    load_tokenizer(place / "mode").save_pretrained(folder / "merged")
    return folder


@pytest.fixture
def data(runs):
    return str(runs / "sums.jsonl")


@pytest.mark.parametrize("name", ["base", "merged", "runs/mode", "runs/lora"])
def test_exits_are_put_on_models_of_every_kind(runs, data, tmp_path, name):
    model, inputs = load_model(runs / name).eval(), torch.tensor([[40, 41, 42, 43]])
    with torch.no_grad():
        before = model(inputs).logits
    files = {path: path.read_bytes() for path in (runs / name).rglob("*") if path.is_file()}
    added = add_exits(runs / name, data, output=tmp_path / "exits", layers=[1, 3], **QUICK)
    assert added.layers == (1, 3)
    assert added.folder == tmp_path / "exits"
    assert added.num_hidden_layers == 4
    assert [reading.layer for reading in added.readings] == [1, 3]
    assert {path: path.read_bytes() for path in files} == files
    exits = load_exits(tmp_path / "exits", model)
    assert exits.layers == (1, 3)
    assert exits.rank == 2
    with torch.no_grad():
        assert torch.equal(model(inputs).logits, before)


def test_they_lie_beside_the_adapter_and_are_not_replaced_unasked(runs, data):
    run = runs / "runs" / "lora"
    added = add_exits(str(run), data, **QUICK)
    assert added.folder == run / "exits"
    assert set(added.layers) <= {1, 2, 3}
    assert [reading.layer for reading in added.readings] == [1, 2, 3]
    first = load_exits(run, load_model(run))
    assert first.layers == added.layers
    about = read_exit_settings(run)["about"]
    assert about["model"] == str(run)
    assert about["data"]["train"] == data
    assert about["training"] == {
        **{"num_steps": 2, "max_length": 1024, "seed": 0, "batch_size": 4},
    }
    assert [reading["layer"] for reading in about["readings"]] == [1, 2, 3]
    (run / "exits" / "plan.json").write_text("{}")
    with pytest.raises(FileExistsError, match="`output` must hold no exits yet"):
        add_exits(run, data, layers="2", **QUICK)
    assert load_exits(run, load_model(run)).layers == first.layers
    assert add_exits(run, data, layers="1,2", overwrite=True, **QUICK).layers == (1, 2)
    assert load_exits(run, load_model(run)).layers == (1, 2)
    assert not (run / "exits" / "plan.json").exists()


def test_a_report_says_what_each_exit_brings(runs, data, tmp_path):
    added = add_exits(runs / "base", data, output=tmp_path, num_steps=1)
    shown = str(added)
    assert f"Exits at {', '.join(map(str, added.layers))}: about" in shown
    assert f"of 4 layers a token, trained in {added.seconds:.0f} s." in shown
    assert shown.count("(left out)") == 3 - len(added.layers)
    assert f"on {added.num_tokens} held-out tokens" in shown
    assert added.num_tokens == 4  # of one record: " 14" and the end


@pytest.mark.parametrize(
    ("run", "asked", "template"),
    [
        ("runs/alpaca", "auto", "alpaca"),
        ("runs/alpaca", "plain", "plain"),
        ("runs/mode", "auto", "auto"),
        ("runs/alpaca", "lm-eval", "plain"),
        ("base", "chat", "chat"),
    ],
)
def test_records_become_tokens_as_in_the_runs_training(runs, data, run, asked, template):
    spec = ModelSpec(name=str(runs / run))
    found = gather_records(spec, DataSpec(train=data, template=asked), max_length=None, seed=0)
    records = [json.loads(line) for line in (runs / "sums.jsonl").read_text().splitlines()]
    expected = to_token_sequences(records, template, load_tokenizer(spec))
    assert found.learnt == expected[:-1]
    assert found.held_out == expected[-1:]


def test_records_that_are_held_out(runs, data, tmp_path):
    spec, other = ModelSpec(name=str(runs / "base")), tmp_path / "other.jsonl"
    records = [{"prompt": "a", "completion": " b" * 40}, {"prompt": "a", "completion": " c"}]
    other.write_text("\n".join(map(json.dumps, records)))
    section = DataSpec(train=data, eval=str(other))
    found = gather_records(spec, section, max_length=None, seed=0)
    assert len(found.learnt) == 8
    counts = [sum(label != -100 for label in row["labels"]) for row in found.held_out]
    assert counts == [NUM_READ_TOKENS, 3]
    again = gather_records(spec, section, max_length=None, seed=0)
    assert found == again
    assert found != gather_records(spec, section, max_length=None, seed=1)
    cut = gather_records(spec, section, max_length=9, seed=0)
    assert max(len(row["input_ids"]) for row in (*cut.learnt, *cut.held_out)) == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "two"}, "`layers` must be numbers with commas between them, got 'two'"),
        ({"layers": []}, "`layers` must name a layer, got none"),
        ({"layers": [2, 4]}, "`layers` must name layers below the final one"),
        ({"max_length": 2}, "`data.train` must hold records with something to predict in their"),
        ({"data": "one"}, "`data.train` must hold 2 records at least"),
        ({"distillation": 2.0}, "`distillation` must be at most 1"),
    ],
)
def test_refusals_leave_nothing(runs, data, tmp_path, options, message):
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"prompt": "a", "completion": " b"}))
    source = str(one) if options.pop("data", None) else data
    with pytest.raises(ValueError, match=message):
        add_exits(runs / "base", source, output=tmp_path / "exits", **{**QUICK, **options})
    assert not (tmp_path / "exits").exists()


def test_what_is_no_folder_needs_an_output(data):
    with pytest.raises(ValueError, match="`output` must name a folder for the exits of some/model"):
        add_exits("some/model", data)


def test_the_command(runs, data, tmp_path, capsys):
    run, output = str(runs / "runs" / "mode"), tmp_path / "exits"
    command = ["add-exits", run, "--data", data, "--output", str(output)]
    assert depthmix_cli.main([*command, "--layers", "1,3", "--rank", "2", "--num-steps", "2"]) == 0
    shown = capsys.readouterr()
    assert "Exits at 1, 3: about" in shown.out
    assert shown.out.endswith(f"Saved in {output}.\n")
    assert "step 1, loss by exit: 1: " in shown.err
    assert depthmix.load_exits(output, load_model(run)).rank == 2
    assert depthmix_cli.main(command) == 1
    assert "`--overwrite`" in capsys.readouterr().err
    assert depthmix_cli.main([*command, "--overwrite", "--num-steps", "0"]) == 1
    assert "On the command line: `--num-steps`" in capsys.readouterr().err
