import json
from contextlib import suppress

import datasets
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl import SFTConfig, SFTTrainer

from checkpoints import make_model, make_tokenizer
from depthmix.data.evaluation_records import load_evaluation_records
from depthmix.data.records import load_records
from depthmix.data.spec import EvaluationSpec
from depthmix.data.templates import (
    check_label_tokens,
    render_prompt,
    to_training_dataset,
)
from depthmix.libraries.releases import CHECKPOINTING

RECORDS = [{"prompt": "1 + 1 =", "completion": " 2"}, {"prompt": "2 + 2 =", "completion": " 4"}]
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def write(path, records):
    if path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    elif path.suffix == ".csv":
        datasets.Dataset.from_list(records).to_csv(path)
    else:
        datasets.Dataset.from_list(records).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_files_hold_the_same_records(tmp_path, suffix):
    source = write(tmp_path / f"records{suffix}", RECORDS)
    assert load_records(source) == RECORDS
    assert load_records(source, limit=1) == RECORDS[:1]


def test_hub_records(monkeypatch):
    asked = {}

    def load_dataset(source, split):
        asked.update(source=source, split=split)
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_records("someone/sums", split="test", limit=1) == RECORDS[:1]
    assert asked == {"source": "someone/sums", "split": "test"}


def test_sources_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "broken.json").write_text("[{")
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "records.txt").write_text("x")
    for name in ("broken.json", "object.json", "records.txt"):
        with pytest.raises(ValueError, match=f"`data` cannot be read from .*{name}"):
            load_records(str(tmp_path / name))
    with pytest.raises(ValueError, match=r"is empty"):
        load_records(write(tmp_path / "empty.jsonl", []))
    with pytest.raises(ValueError, match=r"record 2 of .* is 3"):
        load_records(write(tmp_path / "numbers.json", [RECORDS[0], 3]))
    with pytest.raises(ValueError, match=r"`data.limit` must be at least 1, got 0"):
        load_records(write(tmp_path / "records.json", RECORDS), limit=0)
    with pytest.raises(FileNotFoundError, match=r"must be an existing file"):
        load_records("missing.jsonl")

    def unreachable(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(OSError, match=r"Cannot find data `someone/sums`"):
        load_records("someone/sums")


@pytest.mark.parametrize("num_before", [0, 3, 56])
@pytest.mark.parametrize("blank", ["", "\n", " \n\n"])
def test_a_broken_line_is_named_by_its_number_in_the_file(tmp_path, num_before, blank):
    lines = [f"{json.dumps(RECORDS[0])}\n{blank}"] * num_before
    number = "".join(lines).count("\n") + 1
    path = tmp_path / "records.jsonl"
    path.write_text("".join(lines) + '{"prompt": "a", }\n{}\n')
    message = rf"{path}: line {number} is no JSON \(Expecting property name.*, column 17\); each"
    with pytest.raises(ValueError, match=message):
        load_records(str(path))
    if num_before:  # what is not read is not judged
        assert load_records(str(path), limit=num_before) == [RECORDS[0]] * num_before
        with pytest.raises(ValueError, match=f"line {number} is"):
            load_records(str(path), limit=num_before + 1)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "prompt,prompt\na,b\n", "the column 'prompt' stands twice"),
        ("a.csv", "prompt,completion\na,b\n\nc,d,e\n", "line 4 has 3 cells, .* names 2 columns"),
        ("a.csv", "prompt,completion\na\n", "line 2 has 1 cells, and the first row names 2"),
        ("a.csv", 'prompt,completion\na,"b\nc', "line 3 is no CSV"),
        (
            "a.jsonl",
            '{"prompt": 1, "prompt": 2}',
            "line 1 is no JSON .the name 'prompt' stands twi",
        ),
        ("a.jsonl", "[" * 9999, "line 1 is no JSON .its values are nested too deeply"),
        ("a.json", '[{"a": 1, "a": 2}]', "the name 'a' stands twice in one object"),
        ("a.json", "3", "must be a list of records, not one int"),
        ("a.json", "", "Expecting value"),
        ("a.jsonl", b'{"a": "\xff"}', "byte 7 is no text in UTF-8; save the file in that"),
        ("a.parquet", "PAR1", "`data` cannot be read from"),
    ],
)
def test_a_damaged_file_says_where(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        load_records(str(path))


def test_a_parquet_column_twice_is_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], ["p", "p"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="the column 'p' stands twice"):
        load_records(str(tmp_path / "a.parquet"))


@given(st.binary(max_size=60), st.sampled_from([".json", ".jsonl", ".csv", ".parquet"]))
def test_any_bytes_are_records_or_one_sentence(tmp_path_factory, content, suffix):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(content)
    with suppress(ValueError):
        assert all(isinstance(record, dict) for record in load_records(str(path)))


@pytest.mark.parametrize("choices", [[], [""], [" a", ""], [" a", " "], [" a", 3], [" a", None]])
def test_choices_are_texts_with_something_in_them(tokenizer, tmp_path, choices):
    good = {"prompt": "a", "choices": [" b", " c"], "answer": 0}
    source = write(tmp_path / "c.json", [good, {**good, "choices": choices}])
    section = EvaluationSpec(data=source, metric="choices")
    with pytest.raises(
        ValueError, match=r"`choices` must be a list of texts .* record 2 of .*c.js"
    ):
        load_evaluation_records(section, "auto", tokenizer)


@pytest.mark.parametrize(
    ("record", "template", "prompt", "completion"),
    [
        ({"prompt": "a", "completion": "b"}, "auto", "a", "b"),
        ({"prompt": "a", "completion": "b"}, "chat", [{"role": "user", "content": "a"}], "b"),
        ({"instruction": "a", "output": "b"}, "plain", "a\n", "b"),
        ({"instruction": "a", "input": "x", "output": "b"}, "plain", "a\nx\n", "b"),
        (
            {"instruction": "a", "input": "x", "output": "b"},
            "chat",
            [{"role": "user", "content": "a\nx"}],
            "b",
        ),
        ({"messages": MESSAGES}, "auto", MESSAGES[:1], "Hello"),
    ],
)
def test_templates(tokenizer, record, template, prompt, completion):
    row = to_training_dataset([record], template, tokenizer)[0]
    assert row["prompt"] == prompt
    if isinstance(prompt, list):
        assert row["completion"] == [{"role": "assistant", "content": completion}]
    else:
        assert row["completion"] == completion


def test_alpaca_template(tokenizer):
    plain = {"instruction": "Add 1 and {2}.", "input": "", "output": "3"}
    row = to_training_dataset([plain], "auto", tokenizer)[0]
    assert row["prompt"] == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd 1 and {2}.\n\n### Response:\n"
    )
    row = to_training_dataset([{**plain, "input": "x"}], "alpaca", tokenizer)[0]
    assert "paired with an input" in row["prompt"]
    assert row["prompt"].endswith("### Input:\nx\n\n### Response:\n")
    assert render_prompt(plain, "auto", tokenizer) != row["prompt"]


@pytest.mark.parametrize(
    ("records", "template", "message"),
    [
        ([], "auto", "at least one record"),
        ([RECORDS[0], {"text": "x"}], "auto", "Record 2 must have .*`messages`.*it has `text`"),
        ([RECORDS[0], {**RECORDS[0], "completion": " "}], "auto", "Record 2 has nothing to learn"),
        ([RECORDS[0], {"messages": MESSAGES}], "auto", "record 2 differs from record 1"),
        ([{"messages": MESSAGES}], "alpaca", '"chat" or "auto" for messages, got \'alpaca\''),
        ([{"messages": MESSAGES[:1]}], "auto", r"end with the assistant's .*'user'"),
        ([{"messages": ["Hi", "Hello"]}], "auto", r"each with a role .* got \['Hi'"),
        ([{"prompt": 3, "completion": "x"}], "auto", r"Record 1 must have a prompt .* got 3"),
        ([{"prompt": [], "completion": "x"}], "auto", r"Record 1 must have a prompt .* got \[\]"),
        ([{"prompt": "x", "completion": 3}], "auto", r"must be text, got 3"),
        ([{"prompt": "x", "completion": MESSAGES[1:]}], "auto", r"must be text, got \["),
        ([{"prompt": MESSAGES[:1], "completion": "x"}], "plain", r'"chat" or "auto" for messages'),
    ],
)
def test_records_without_what_is_needed(tokenizer, records, template, message):
    with pytest.raises(ValueError, match=message):
        to_training_dataset(records, template, tokenizer)


def test_chat_needs_a_chat_template():
    with pytest.raises(ValueError, match=r"no chat template; choose"):
        to_training_dataset(RECORDS, "chat", make_tokenizer(chat_template=None))


def train_dataset(records, tokenizer, tmp_path, **options):
    args = SFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        **{CHECKPOINTING: True, **options},
    )
    return SFTTrainer(
        make_model(tokenizer),
        args,
        train_dataset=to_training_dataset(records, "auto", tokenizer),
        processing_class=tokenizer,
    ).train_dataset


@pytest.mark.parametrize("form", ["text", "chat"])
def test_loss_counts_completions_only(tokenizer, tmp_path, form):
    records = RECORDS if form == "text" else [{"messages": MESSAGES}]
    dataset = train_dataset(records, tokenizer, tmp_path)
    check_label_tokens(dataset, range(1, len(records) + 1))
    kept = [token for token in dataset[0]["labels"] if token != -100]
    text = tokenizer.decode(kept)
    assert "Hi" not in text
    assert "1 + 1" not in text
    assert ("Hello" if form == "chat" else " 2") in text
    assert kept[-1] == tokenizer.eos_token_id or form == "chat"


def test_records_that_truncation_leaves_nothing_of(tokenizer, tmp_path):
    records = [RECORDS[0], {"prompt": "long " * 50, "completion": "x"}, RECORDS[1]]
    dataset = train_dataset(records, tokenizer, tmp_path, max_length=40)
    with pytest.raises(ValueError, match=r"Record 2 has no token .* raise `training.max_length`"):
        check_label_tokens(dataset, range(1, len(records) + 1))
    packed = train_dataset(records, tokenizer, tmp_path, max_length=40, packing=True)
    check_label_tokens(packed, range(1, len(records) + 1))


def test_evaluation_records(tokenizer, tmp_path):
    records = [{"instruction": "1 + 1?", "answer": 2}, {"instruction": "2?", "answer": "2"}]
    source = write(tmp_path / "test.json", records)
    section = EvaluationSpec(data=source, metric="exact_match", num_items=1)
    ids = tokenizer("1 + 1?\n")["input_ids"]
    assert load_evaluation_records(section, "plain", tokenizer) == [
        {"instruction": "1 + 1?", "answer": "2", "prompt": "1 + 1?\n", "prompt_ids": ids}
    ]
    prompt = load_evaluation_records(section, "chat", tokenizer)[0]["prompt"]
    assert prompt.endswith("<|assistant|>")
    choices = [{"prompt": "1 + 1 =", "choices": [" 2", " 3"], "answer": "0"}]
    section = EvaluationSpec(data=write(tmp_path / "c.json", choices), metric="choices")
    assert load_evaluation_records(section, "auto", tokenizer)[0]["answer"] == 0


@pytest.mark.parametrize(
    ("metric", "record"),
    [
        ("exact_match", {"prompt": "a"}),
        ("exact_match", {"answer": "a"}),
        ("exact_match", {"prompt": 1, "answer": "a"}),
        ("choices", {"prompt": "a", "choices": "xy", "answer": 0}),
        ("choices", {"prompt": "a", "choices": ["x", "y"], "answer": 2}),
        ("choices", {"prompt": "a", "choices": ["x", "y"], "answer": "x"}),
    ],
)
def test_evaluation_records_that_do_not_fit(tokenizer, tmp_path, metric, record):
    section = EvaluationSpec(data=write(tmp_path / "bad.json", [record]), metric=metric)
    with pytest.raises(ValueError, match=r"record 1 of .* has `"):
        load_evaluation_records(section, "auto", tokenizer)
