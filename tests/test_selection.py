"""Which records a run trains on: test questions left out, a random order, a limit."""

import json
import random
import warnings

import datasets
import pytest

import depthmix_cli
from checkpoints import make_tokenizer, save_checkpoint
from data_folder import REAL, needs_data
from depthmix.data.audit import audit, warn_of_leaks, write_rest
from depthmix.data.records import load_published, load_records, to_instructions
from depthmix.data.selection import select_records
from depthmix.data.spec import DataSpec
from depthmix.data.templates import to_training_dataset
from depthmix.training.config import load_run_config

SUMS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(20)]


@pytest.fixture
def sums(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(map(json.dumps, SUMS)))
    return str(path)


@pytest.fixture
def known_sums(tmp_path):
    path = tmp_path / "test.json"
    path.write_text(json.dumps([{"question": f"{n}+1="} for n in (3, 4, 30)]))
    return str(path)


def test_records_stay_in_order_unless_shuffled(sums):
    plain = select_records(DataSpec(train=sums))
    assert plain.records == SUMS
    assert plain.numbers == tuple(range(1, 21))
    assert plain.counts == {"given": 20, "dropped": 0, "used": 20}
    first = select_records(DataSpec(train=sums, limit=3))
    assert first.records == SUMS[:3]
    shuffled = select_records(DataSpec(train=sums, shuffle=5))
    order = list(range(20))
    random.Random(5).shuffle(order)
    assert shuffled.records == [SUMS[number] for number in order]
    assert shuffled.numbers == tuple(number + 1 for number in order)
    assert select_records(DataSpec(train=sums, shuffle=5)) == shuffled
    assert select_records(DataSpec(train=sums, shuffle=6)).records != shuffled.records
    assert sorted(shuffled.numbers) == list(plain.numbers)
    first = select_records(DataSpec(train=sums, shuffle=5, limit=3))
    assert first.records == shuffled.records[:3]
    assert first.counts == {"given": 20, "dropped": 0, "used": 3}


def test_test_questions_are_left_out_before_the_limit(sums, known_sums):
    section = DataSpec(train=sums, without=(known_sums,), limit=4)
    selection = select_records(section)
    assert selection.records == [*SUMS[:3], SUMS[5]]
    assert selection.numbers == (1, 2, 3, 6)
    assert selection.counts == {"given": 20, "dropped": 2, "used": 4}
    # What is dropped does not change the order of the others.
    whole = select_records(DataSpec(train=sums, shuffle=5)).numbers
    rest = select_records(DataSpec(train=sums, shuffle=5, without=(known_sums,))).numbers
    assert rest == tuple(number for number in whole if number not in (4, 5))


@pytest.mark.parametrize(
    ("name", "tests"), [("mawps", ("addsub",)), ("mawps", ("all",)), ("math7k", ("all",))]
)
def test_those_are_left_that_the_audit_writes(small_data, tmp_path, monkeypatch, name, tests):
    monkeypatch.setenv("DEPTHMIX_DATA", str(small_data))
    selection = select_records(DataSpec(train=name, without=tests))
    result = audit(name, tests)
    write_rest(result, tmp_path / "rest.jsonl")
    assert to_instructions(selection.records, name) == load_records(str(tmp_path / "rest.jsonl"))
    assert selection.num_dropped == len(result.leaking)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if "all" in tests:
            warn_of_leaks(selection.records, name)


@needs_data
@pytest.mark.parametrize("name", ["mawps", "arc_easy", "hellaswag"])
def test_real_questions_are_left_out(tmp_path, monkeypatch, name):
    monkeypatch.setenv("DEPTHMIX_DATA", str(REAL))
    selection = select_records(DataSpec(train=name, without=("all",), shuffle=0))
    result = audit(name, ["all"])
    assert selection.num_dropped == len(result.leaking)
    assert {number - 1 for number in selection.numbers}.isdisjoint(result.leaking)
    assert len(selection.records) + selection.num_dropped == len(load_published(name))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_leaks(selection.records, name)


def test_what_cannot_be_selected(sums, known_sums, small_data, monkeypatch):
    with pytest.raises(ValueError, match=r"`data.limit` must be at least 1, got 0"):
        select_records(DataSpec(train=sums, shuffle=0, limit=0))
    with pytest.raises(ValueError, match=r"`data.without` must leave .* all 20 of .*sums.jsonl"):
        select_records(DataSpec(train=sums, without=(sums,)))
    with pytest.raises(ValueError, match=r"`svmp` is not a data set .* did you mean `svamp`"):
        select_records(DataSpec(train=sums, without=("svmp",)))
    with pytest.raises(ValueError, match="for `all` none is at hand"):
        select_records(DataSpec(train=sums, without=("all",)))
    monkeypatch.setenv("DEPTHMIX_DATA", str(small_data))
    with pytest.raises(ValueError, match="truthfulqa is a benchmark only"):
        select_records(DataSpec(train="truthfulqa", split="test"))


def test_a_file_or_a_limited_set_of_the_hub_is_not_read_further(sums, tmp_path, monkeypatch):
    read = []

    def load_dataset(source, *, split):
        return (read.append(number) or record for number, record in enumerate(SUMS))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert select_records(DataSpec(train="owner/sums", limit=2)).records == SUMS[:2]
    assert len(read) == 2
    selection = select_records(DataSpec(train="owner/sums", limit=2, shuffle=0))
    assert (len(selection.records), selection.num_given) == (2, 20)


def test_messages_name_a_record_by_its_number_in_the_source(sums):
    selection = select_records(DataSpec(train=sums, shuffle=5))
    records = [{**record} for record in selection.records]
    records[2]["completion"] = ""
    with pytest.raises(ValueError, match=rf"Record {selection.numbers[2]} has nothing to learn"):
        to_training_dataset(records, "auto", make_tokenizer(), numbers=selection.numbers)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("arc_easy", ("arc_easy",)),
        ("arc_easy, hellaswag:further", ("arc_easy", "hellaswag:further")),
        ("data/test.jsonl", ("data/test.jsonl",)),
        (["all"], ("all",)),
        ("", ()),
    ],
)
def test_options_are_read_and_saved(tmp_path, given, names):
    data = {"train": "math7k", "without": given, "shuffle": "7", "template": "lm-eval"}
    config = load_run_config(None, {"model": {"name": "tiny"}, "data": data})
    assert config.data.without == names
    assert config.data.shuffle == 7
    (tmp_path / "run.json").write_text(json.dumps({"model": {"name": "tiny"}, "data": data}))
    assert load_run_config(tmp_path / "run.json").data == config.data


def test_test_files_are_looked_up_beside_the_configuration(tmp_path):
    (tmp_path / "own.jsonl").touch()
    for given in ('["own.jsonl", "arc_easy"]', '"own.jsonl"'):
        path = tmp_path / "run.toml"
        path.write_text(f'model.name = "tiny"\n[data]\ntrain = "mawps"\nwithout = {given}\n')
        assert load_run_config(path).data.without[0] == str(tmp_path / "own.jsonl")


def test_a_run_says_what_it_left_out(small_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DEPTHMIX_DATA", str(small_data))
    checkpoint, out = save_checkpoint(tmp_path / "base"), tmp_path / "out"
    arguments = [
        *(
            "--model.name",
            str(checkpoint),
            "--mode.late-layers=2",
            "--mode.target-modules=[q_proj]",
        ),
        *("--training.output-dir", str(out), "--training.max-steps=1", "--training.report-to=none"),
        *("--data.train=mawps", "--data.without=addsub,multiarith", "--data.shuffle=0"),
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", r".* training records ask a question of a test set")
        assert depthmix_cli.main(["train", *arguments]) == 0
    assert (
        "1 of 2 training records ask a question of addsub, multiarith and are left out; 1 are used."
        in capsys.readouterr().err
    )
    results = json.loads((out / "results.json").read_text())
    assert results["data"] == {"given": 2, "dropped": 1, "used": 1}
    saved = load_run_config(out / "run_config.json")
    assert saved.data.without == ("addsub", "multiarith")
    assert saved.data.shuffle == 0
