import functools
import http.server
import re
import threading
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from checkpoints import make_tokenizer
from data_folder import CONTENTS, REAL, needs_data
from depthmix.data.catalog import (
    CATALOG,
    catalog_table,
    describe,
    is_at_hand,
    load_split,
    name_source,
)
from depthmix.data.instructions import from_arithmetic
from depthmix.data.records import load_records
from depthmix.data.templates import to_training_dataset

DOCS = Path(__file__).parents[1] / "docs"

FIELDS = {
    "addsub": {"question", "answer", "instruction"},
    "aqua": {"question", "options", "answer", "instruction"},
    "gsm8k": {"question", "answer", "instruction"},
    "mawps": {"question", "answer", "instruction"},
    "multiarith": {"question", "answer", "instruction"},
    "singleeq": {"question", "answer", "instruction"},
    "svamp": {"question", "answer", "instruction"},
    "arc_easy": {"question", "choices", "answerKey", "instruction"},
    "arc_challenge": {"question", "choices", "answerKey", "instruction"},
    "boolq": {"question", "passage", "label", "instruction"},
    "openbookqa": {"question_stem", "choices", "answerKey", "instruction"},
    "hellaswag": {"ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings", "label"},
    "truthfulqa": {
        "question",
        "mc1_targets",
        "mc2_targets",
        "category",
        "best_answer",
        "correct_answers",
        "incorrect_answers",
    },
    "mmlu_stem": {"question", "subject", "choices", "answer"},
    "mt_bench": {"question_id", "category", "turns", "reference"},
}
"""Fields that a test record of each data set has at least."""

TEST_COUNTS = {
    "addsub": 395,
    "aqua": 254,
    "gsm8k": 1319,
    "mawps": 238,
    "multiarith": 600,
    "singleeq": 508,
    "svamp": 1000,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "boolq": 3270,
    "openbookqa": 500,
    "hellaswag": 1000,
    "truthfulqa": 817,
    "mmlu_stem": 3018,
    "mt_bench": 80,
}
TRAIN_COUNTS = {
    "gsm8k": 7473,
    "aqua": 2728,
    "mawps": 1898,
    "arc_easy": 2251,
    "arc_challenge": 1119,
    "boolq": 9427,
    "openbookqa": 4957,
    "hellaswag": 1000,
    "alpaca": 4900,
    "math_10k_partial": 2120,
    "math7k": 8473,
}


def first(name, split="test", **options):
    return load_split(name, split, **options)[0]


@pytest.mark.parametrize("name", FIELDS)
def test_records_have_their_schema(small_data, name):
    for record in load_split(name, data_dir=small_data):
        assert FIELDS[name] <= record.keys()


def test_every_layout_is_read(small_data, monkeypatch):
    monkeypatch.setenv("DEPTHMIX_DATA", str(small_data))
    assert first("gsm8k")["answer"] == "#### 500"
    assert first("gsm8k", "train")["answer"].endswith("#### 1,024")
    assert first("mawps", "train")["equation"] == "X=(3.0+4.0)"
    assert first("mawps", "train")["answer"] == "7.0"
    options = ["1", "2 km", "3", "4", "5"]
    assert first("aqua")["question"] == "How far is it?"
    assert first("aqua")["options"] == options
    assert first("aqua", "validation")["options"] == ["1", "2", "3 (a)", "4", "5"]
    assert first("aqua", "train") == {
        "question": "1 + 1?\nWell?",
        "options": options,
        "answer": "C",
        "rationale": "Add.\nDone.",
    }
    fish, sky = load_split("arc_easy")
    assert fish["choices"] == {"text": ["gills", "lungs", "skin"], "label": ["A", "B", "C"]}
    assert (sky["question"], sky["choices"]["label"][-1]) == ("Which is\nblue?", "E")
    assert first("openbookqa")["question_stem"] == "Which is\nblue?"
    assert first("boolq")["question"] == "is water wet"
    assert (first("boolq")["label"], first("boolq", "train")["label"]) == (1, 0)
    assert first("hellaswag", "test") == first("hellaswag", "validation")
    assert (first("hellaswag", "train")["label"], first("hellaswag", "further")["label"]) == (2, 1)
    truth = first("truthfulqa", "validation")
    assert truth["mc2_targets"] == {"choices": ["No", "It is not", "Yes"], "labels": [1, 1, 0]}
    assert truth["incorrect_answers"] == ["Yes", "Sure, it is"]
    assert truth["category"] == "Myths"
    assert [record["reference"] for record in load_split("mt_bench")] == [None, ["4", "5"]]
    assert first("mt_bench", "judge_prompts")["prompt_template"] == "Rate."
    record = load_split("mmlu_stem", "dev")[-1]
    assert record["subject"] == "machine_learning"
    assert (record["choices"], record["answer"]) == (["a", "b, c", "d", "e"], 1)
    assert first("math_10k_partial", "train")["output"] == "It is 2."
    names = [(name, split) for name in CATALOG for split in CATALOG[name].splits]
    assert all(is_at_hand(*name) for name in names)


@pytest.mark.parametrize(
    ("name", "instruction", "output"),
    [
        ("gsm8k", "Ann sold", "48/2 = 24 clips.\nIt is 1,024.\nThe answer is 1024."),
        ("math7k", "Ann sold", "48/2 = 24 clips.\nIt is 1,024.\nThe answer is 1024."),
        ("aqua", "1 + 1?\nWell? Answer Choices: (A) 1 (B) 2 km", "Add.\nDone.\nThe answer is C."),
        ("mawps", "Ann has", "(3.0+4.0) = 7.\nThe answer is 7."),
        ("arc_easy", "Please choose the correct answer", "the correct answer is answer1"),
        ("openbookqa", "Please choose the correct answer", "the correct answer is answer1"),
        ("boolq", "Please answer", "the correct answer is false"),
        (
            "hellaswag",
            "Please choose the correct ending to complete the given sentence: Birds\n\nEnding1: ",
            "the correct answer is ending3",
        ),
        ("alpaca", "Write.", "No."),
        ("math_10k_partial", "Two?", "It is 2."),
    ],
)
def test_named_data_sets_become_instructions(small_data, name, instruction, output):
    records = load_records(name, split="train", data_dir=small_data)
    assert records[0]["instruction"].startswith(instruction)
    assert records[0]["output"] == output
    dataset = to_training_dataset(records, "auto", make_tokenizer())
    assert "### Instruction:\n" in dataset[0]["prompt"]
    assert load_records(name, split="train", limit=1, data_dir=small_data) == records[:1]


@pytest.mark.parametrize(
    ("equation", "answer", "output"),
    [
        ("X=((22.0-14.0)/4.0)", "2.0", "((22.0-14.0)/4.0) = 2.\nThe answer is 2."),
        ("x=3*6", "18.0", "3*6 = 18.\nThe answer is 18."),
        ("miles=4.0/30.0*48.0", "6.4", "4.0/30.0*48.0 = 6.4.\nThe answer is 6.4."),
        ("x=-(1.5 - 2)", "0.5", "-(1.5 - 2) = 0.5.\nThe answer is 0.5."),
        ("X=1.0/6.0", "0.1666667", "1.0/6.0 = 0.1666667.\nThe answer is 0.1666667."),
        ("X=1.0/6.0", "0.1667", "The answer is 0.1667."),
        ("X=1-1", "0.0", "1-1 = 0.\nThe answer is 0."),
        ("X=34*4", "134.0", "The answer is 134."),
        ("X-6=52", "58", "The answer is 58."),
        ("7=3+x", "4.0", "The answer is 4."),
        ("X=0.32=0.21", "0.53", "The answer is 0.53."),
        ("X=1/0", "1.0", "The answer is 1."),
        ("X=2**3", "8.0", "The answer is 8."),
        ("X=True", "1.0", "The answer is 1."),
        ("X=abs(2)", "2.0", "The answer is 2."),
    ],
)
def test_an_equation_is_learnt_only_if_it_gives_the_answer(equation, answer, output):
    record = {"question": "How many ?", "answer": answer, "equation": equation}
    assert from_arithmetic(record)["output"] == output


@needs_data
def test_all_equations_of_mawps_that_are_learnt_are_true():
    records = load_records("mawps", data_dir=REAL)
    shown = [record for record in records if " = " in record["output"]]
    assert (len(records), len(shown)) == (1898, 1832)
    for record in shown:
        expression, number = re.fullmatch(
            r"([-+*/(). 0-9]+) = (.+)\.\nThe answer is \2\.", record["output"]
        ).groups()
        assert float(number) == float(record["answer"])
        assert eval(expression) == pytest.approx(float(number), rel=1.1e-6)
    for record in records:
        assert record["output"].endswith(f"The answer is {record['answer'].removesuffix('.0')}.")
        assert "=" not in record["output"] or record in shown


def test_a_file_wins_over_a_name(small_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "boolq").mkdir()
    assert len(load_records("boolq", data_dir=small_data)) == 1  # a folder is no file of records
    with pytest.raises(ValueError, match=r"truthfulqa is a benchmark only"):
        load_records("truthfulqa", data_dir=small_data)


def test_math7k_draws_different_questions(small_data):
    records = load_split("math7k", "train", data_dir=small_data)
    assert len({record["instruction"] for record in records}) == len(records) == 3


def test_mistakes(small_data, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"`arc_esy` is not .*; did you mean `arc_easy`\?"):
        load_split("arc_esy")
    with pytest.raises(ValueError, match=r"`tests` is not a split of boolq; did you mean `test`"):
        load_split("boolq", "tests")
    with pytest.raises(
        FileNotFoundError, match=r"`data_dir` .*DEPTHMIX_DATA.* must be an existing"
    ):
        load_split("boolq", data_dir=tmp_path / "nowhere")
    monkeypatch.setenv("DEPTHMIX_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"DEPTHMIX_DATA.* must be an existing"):
        load_split("boolq")


def test_another_content_is_refused(small_data):
    path = small_data / "boolq" / "test.json"
    expected = CATALOG["boolq"].splits["test"].files[0].sha256
    path.write_text(CONTENTS["boolq/train.json"])
    with pytest.raises(ValueError, match=rf"boolq/test.json must have the sha256 {expected}, got"):
        load_split("boolq", data_dir=small_data)


@pytest.mark.parametrize("where", ["file", "split"])
def test_another_count_is_refused(small_data, monkeypatch, where):
    data_set = CATALOG["boolq"]
    part = data_set.splits["test"]
    changed = replace(part, records=2)
    if where == "file":
        changed = replace(part, files=(replace(part.files[0], records=2),))
    monkeypatch.setitem(CATALOG, "boolq", replace(data_set, splits={"test": changed}))
    source = r"boolq/test.json" if where == "file" else r"`boolq` \(test\)"
    with pytest.raises(ValueError, match=rf"{source} must have 2 records, got 1; .*DEPTHMIX_DATA"):
        load_split("boolq", data_dir=small_data)


@pytest.fixture
def server(small_data):
    """Serve the folder, and count what is asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_args):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(small_data))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def publish(monkeypatch, name, address):
    """Let a data set's files be published at an address."""
    splits = {}
    for split, part in CATALOG[name].splits.items():
        files = tuple(replace(file, url=f"{address}/{file.path}") for file in part.files)
        splits[split] = replace(part, files=files)
    monkeypatch.setitem(CATALOG, name, replace(CATALOG[name], splits=splits))


def test_public_files_are_fetched_once_and_checked(server, small_data, monkeypatch):
    address, asked = server
    publish(monkeypatch, "mt_bench", address)
    assert not is_at_hand("mt_bench")
    assert load_split("mt_bench") == load_split("mt_bench", data_dir=small_data)
    assert len(asked) == 2
    assert is_at_hand("mt_bench")
    assert len(load_split("mt_bench")) == 2
    assert len(asked) == 2

    publish(monkeypatch, "boolq", address)
    (small_data / "boolq" / "test.json").write_text("[]")
    with pytest.raises(ValueError, match=r"boolq/test.json must have the sha256 .*DEPTHMIX_DATA"):
        load_split("boolq")
    assert not is_at_hand("boolq")


def test_data_that_cannot_be_had(small_data, monkeypatch):
    publish(monkeypatch, "boolq", "http://127.0.0.1:1")
    with pytest.raises(
        OSError, match=r"boolq/test.json .* could not be reached; .*`data_dir`.*DEPT"
    ):
        load_split("boolq")
    with pytest.raises(FileNotFoundError, match=r"hellaswag/test.json .* no address; .*`data_dir`"):
        load_split("hellaswag", "further")

    def unreachable(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(OSError, match=r"`mmlu_stem`: .* cais/mmlu .*`data_dir`.*DEPTH"):
        load_split("mmlu_stem")


def expect_on_hub(monkeypatch, name, count):
    """Let the catalogue expect so many records of a split on the hub."""
    splits = {
        split: replace(part, hub_records=part.hub_records and count)
        for split, part in CATALOG[name].splits.items()
    }
    monkeypatch.setitem(CATALOG, name, replace(CATALOG[name], splits=splits))


def test_the_hub_is_asked_for_a_pinned_commit(small_data, monkeypatch):
    asked = []

    def load_dataset(source, config, *, split, revision):
        asked.append((source, config, split, revision))
        row = {"question": "Q?", "subject": config, "choices": list("abcd"), "answer": 2}
        if source == "Rowan/hellaswag":
            row = {**load_split("hellaswag", data_dir=small_data)[0], "label": "3"}
        return datasets.Dataset.from_list([row])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    expect_on_hub(monkeypatch, "mmlu_stem", 18)
    expect_on_hub(monkeypatch, "hellaswag", 1)
    records = load_split("mmlu_stem")
    assert [record["subject"] for record in records[:2]] == ["abstract_algebra", "astronomy"]
    assert asked[1] == (
        "cais/mmlu",
        "astronomy",
        "test",
        "c30699e8356da336a370243923dbaf21066bb9fe",
    )
    assert name_source("mmlu_stem") == "cais/mmlu@c30699e8356d"
    assert first("hellaswag", "test")["label"] == 3
    assert asked[-1][1:3] == (None, "validation")
    expect_on_hub(monkeypatch, "hellaswag", 10_042)
    with pytest.raises(
        ValueError, match=r"Rowan/hellaswag \(test\) must have 10,042 records, got 1"
    ):
        load_split("hellaswag")


def test_the_source_of_a_result_names_no_folder(small_data):
    source = name_source("truthfulqa", data_dir=small_data)
    assert source.startswith("truthfulqa/test.csv (sha256 ")
    assert source.endswith(") and 1 more")
    assert str(small_data) not in source


@needs_data
@pytest.mark.parametrize("name", CATALOG)
def test_the_real_files_are_what_the_catalogue_says(name):
    assert TEST_COUNTS.keys() | TRAIN_COUNTS.keys() == CATALOG.keys()
    for split, part in describe(name).splits.items():
        records = load_split(name, split, data_dir=REAL)
        assert len(records) == part.records
    if name in TEST_COUNTS:
        records = load_split(name, data_dir=REAL)
        assert len(records) == TEST_COUNTS[name]
        assert all(FIELDS[name] <= record.keys() for record in records)
    if name in TRAIN_COUNTS:
        assert len(load_records(name, data_dir=REAL)) == TRAIN_COUNTS[name]


@needs_data
def test_real_answers_are_among_their_choices():
    for name in ("arc_easy", "arc_challenge", "openbookqa"):
        for split in ("train", "test"):
            for record in load_split(name, split, data_dir=REAL):
                texts, labels = record["choices"]["text"], record["choices"]["label"]
                assert record["answerKey"] in labels
                assert len(texts) == len(labels) >= 3
                assert all(text.strip() for text in texts)
                assert not any("Answer2:" in text for text in texts)
    for record in load_split("truthfulqa", data_dir=REAL):
        labels = record["mc1_targets"]["labels"]
        assert labels == [1] + [0] * (len(labels) - 1)  # lm-eval takes the first as the right one
        assert set(record["mc2_targets"]["labels"]) == {0, 1}


@needs_data
def test_instructions_equal_the_real_training_files():
    for name in ("arc_easy", "arc_challenge", "boolq", "openbookqa"):
        folder = name.replace("_", "-")
        published = load_records(str(REAL / folder / "train.json"))
        assert load_records(name, data_dir=REAL) == published


@needs_data
def test_math7k_holds_no_calculator_marks_and_always_concludes():
    records = load_split("math7k", "train", data_dir=REAL)
    assert records == load_split("math7k", "train", data_dir=REAL)
    assert len({record["instruction"] for record in records[7473:]}) == 1000
    for record in records:
        assert "<<" not in record["output"]
        assert record["output"].endswith(f"The answer is {record['answer']}.")


def test_every_source_has_a_pin():
    for data_set in CATALOG.values():
        for split, part in data_set.splits.items():
            assert part.files, split
            assert all(len(file.sha256) == 64 for file in part.files)
            on_hub = data_set.hub is not None and part.hub_records is not None
            urls = all(file.url for file in part.files)
            assert on_hub or urls or (data_set.name, split) == ("hellaswag", "further")
        assert data_set.hub is None or len(data_set.hub.revision) == 40


def test_the_page_on_data_has_the_catalogues_table():
    page = (DOCS / "data.md").read_text("utf-8")
    assert catalog_table() in page, (
        "write what `python -c 'from depthmix.data.catalog import *; print(catalog_table())'` "
        "prints into docs/data.md"
    )
