import functools
import json
import re
import warnings

import datasets
import pooch
import pytest

import depthmix_cli
from checkpoints import make_tokenizer, save_checkpoint
from data_folder import REAL, WORD_PROBLEM, needs_data
from depthmix.data.audit import (
    audit,
    list_leaks,
    named_test_sets,
    read_source,
    warn_of_leaks,
    write_rest,
)
from depthmix.data.catalog import load_split
from depthmix.data.forms import ALPACA_PROMPT_WITH_INPUT
from depthmix.data.leaks import compare_questions, read_questions
from depthmix.data.questions import question_stems, same_letters, same_words
from depthmix.data.records import load_records
from depthmix.data.templates import to_training_dataset
from depthmix.training.config import load_run_config
from depthmix.training.train import train

IN_PARTS = [{"type": "text", "text": "Why?"}, {"type": "image"}, {"text": "How?"}]
ANSWER = {"role": "assistant", "content": "No."}
CHAT = [
    {"role": "user", "content": text}
    for text in ("How far is it?", "Go on, please.", "为什么是一里?", "继续。")
]
"""Two questions, each with a short turn behind it."""

TRAINING_FILES = {
    "gsm8k/train.jsonl": "gsm8k",
    "aqua/train.tsv": "aqua",
    "aqua/validation.jsonl": "aqua:validation",
    "mawps/train.json": "mawps",
    "math_10k_partial/train.json": "math_10k_partial",
    "boolq/train.json": "boolq",
    "arc-easy/train.json": "arc_easy",
    "arc-challenge/train.json": "arc_challenge",
    "openbookqa/train.json": "openbookqa",
    "hellaswag/train.json": "hellaswag",
    "alpaca/train.json": "alpaca",
    "alpaca/train_demo.json": "alpaca:demo",
    "alpaca/validation.json": "alpaca:validation",
}
"""Names of all training files that `leakage.json` lists."""

PUBLISHED = {
    ("mawps", "addsub"): (403, 412, 327),
    ("mawps", "mawps"): (27, 27, 28),
    ("mawps", "multiarith"): (0, 484, 490),
    ("mawps", "singleeq"): (0, 543, 436),
    ("math_10k_partial", "addsub"): (29, 30, 24),
    ("math_10k_partial", "mawps"): (2, 11, 10),
    ("math_10k_partial", "multiarith"): (22, 45, 39),
    ("math_10k_partial", "singleeq"): (17, 47, 40),
    ("boolq", "boolq"): (0, 6, 6),
    ("boolq", "truthfulqa"): (1, 1, 1),
    ("arc_easy", "arc_easy"): (8, 8, 7),
    ("arc_easy", "arc_challenge"): (2, 2, 2),
    ("arc_challenge", "arc_challenge"): (6, 6, 7),
    ("openbookqa", "arc_easy"): (1, 1, 1),
    ("openbookqa", "openbookqa"): (23, 23, 23),
    ("openbookqa", "mmlu_stem"): (6, 7, 7),
    ("alpaca", "mt_bench"): (1, 1, 1),
}
"""Records by words, by letters, and test questions covered; all other pairs share nothing."""


def leaks_of(train, test, name="test"):
    return compare_questions(read_questions(train), read_questions(test), name=name)


@pytest.mark.parametrize(
    ("text", "words", "letters"),
    [
        ("How  many\ntickets . ", "how many tickets .", "howmanytickets"),
        ("X = 2.5?", "x = 2.5?", "x25"),
        ("为什么?", "为什么?", "为什么"),
        (" — ?", "— ?", ""),
    ],
)
def test_normalising(text, words, letters):
    assert same_words(text) == words
    assert same_letters(text) == letters


@pytest.mark.parametrize(
    ("record", "stems"),
    [
        ({"original_text": "Why ?", "ans": 2.0}, ["Why ?"]),
        ({"Question": "Why?", "Type": "x"}, ["Why?"]),
        ({"question_stem": "Fish", "choices": {}}, ["Fish"]),
        ({"turns": ["Write.", "Again."]}, ["Write.", "Again."]),
        ({"prompt": "Question: Why?\nAnswer:", "completion": " No."}, ["Why?"]),
        ({"prompt": [{"role": "user", "content": "Why?"}], "completion": []}, ["Why?"]),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            ["a"],
        ),
        ({"instruction": "How far? Answer Choices: (A) 1 (B) 2"}, ["How far?"]),
        (["Why?\\nNow?\\nOptions:\\n(A) 1\\n(B) 2", "(A)", "Add."], ["Why?\nNow?"]),
        ({"ctx": "Birds", "activity_label": "Flying"}, ["Birds", "Flying: Birds"]),
        ({"ctx": "Birds", "activity_label": ""}, ["Birds"]),
        ({"instruction": "Why?", "question": "why", "label": 1}, ["Why?"]),
        ({"instruction": "Translate.", "input": "Ja.", "output": "Yes."}, ["Translate.\nJa."]),
        ({"instruction": "Translate.", "input": "", "output": "Yes."}, ["Translate."]),
        ({"instruction": "Translate.", "input": None, "output": "Yes."}, ["Translate."]),
        (
            {"prompt": ALPACA_PROMPT_WITH_INPUT.format(instruction="Translate.", input="Ja.")},
            ["Translate.\nJa."],
        ),
        ({"instruction": "a", "input": "b", "output": "c", "prompt": "Why?"}, ["Why?"]),
        ({"prompt": "Why?", "completion": " No.", "turns": 2}, ["Why?"]),
        ({"prompt": "Why?", "completion": " No.", "turns": ["a", "b"]}, ["Why?"]),
        (
            {"messages": None, "prompt": [{"role": "user", "content": "Why?"}], "completion": []},
            ["Why?"],
        ),
        ({"messages": [{"role": "user", "content": IN_PARTS}]}, ["Why?\nHow?"]),
        ({"messages": [{"role": "user", "content": None}]}, [""]),
        ({"prompt": CHAT, "completion": "Yes."}, ["How far is it?", "为什么是一里?"]),
    ],
)
def test_stems(record, stems):
    assert question_stems(record) == stems


def test_a_prompt_within_a_prompt_is_removed(small_data):
    record = load_records("arc_easy", data_dir=small_data)[0]
    assert question_stems(record) == ["What do fish breathe with?"]
    wrapped = {
        "prompt": f"Below is …\n\n### Instruction:\n{record['instruction']}\n\n### Response:\n"
    }
    assert question_stems(wrapped) == ["What do fish breathe with?"]


@pytest.mark.parametrize(
    "record", [{"text": "x", "label": 1}, {"turns": 2, "label": 1}, {"prompt": ["Why?"], None: []}]
)
def test_a_record_without_a_question(record):
    names = ", ".join(map(str, record))
    with pytest.raises(ValueError, match=rf"must have one of prompt, .* only {names}\."):
        question_stems(record)


def test_an_instruction_leaks_only_with_its_input():
    train_records = [{"instruction": "Translate.", "input": text} for text in ("Ja.", "Nein.")]
    assert leaks_of(train_records, train_records[1:]).same_letters == (1,)


def test_short_turns_of_a_conversation_do_not_leak():
    def conversation(*turns):
        return {"messages": [{"role": "user", "content": turn} for turn in turns]}

    train_records = [
        conversation("How far is it to Bern?", "Continue."),
        conversation("Continue."),
        conversation("Go on.", "Why do fish not drown?"),
    ]
    test_records = [{"turns": ["Continue.", "Go on.", "Why do fish not drown?"]}]
    assert leaks_of(train_records, test_records).same_letters == (1, 2)


def test_shared_questions_are_found_either_way():
    train_records = [{"question": q} for q in ("A b?", "A  B?", "a.b", "c", "?!", "d")]
    test_records = [{"question": q} for q in ("a b?", "!?", "e", "D")]
    leak = leaks_of(train_records, test_records, name="letters")
    assert leak.same_words == (0, 1, 5)
    assert leak.same_letters == (0, 1, 2, 5)
    assert leak.covered == (0, 3)
    assert (leak.test, leak.num_questions) == ("letters", 4)


def test_the_audit_agrees_with_comparing_every_pair():
    train_records = [{"question": f"{n % 7} and {n % 3} ?"} for n in range(40)]
    test_records = [{"turns": [f"{n % 5}and {n % 2}?", f"no {n}"]} for n in range(9)]
    leak = leaks_of(train_records, test_records)
    pairs = [
        (i, j)
        for i, ours in enumerate(train_records)
        for j, theirs in enumerate(test_records)
        for turn in theirs["turns"]
        if re.sub(r"\W", "", ours["question"]) == re.sub(r"\W", "", turn)
    ]
    assert pairs
    assert leak.same_letters == tuple(sorted({i for i, _ in pairs}))
    assert leak.covered == tuple(sorted({j for _, j in pairs}))


def test_named_sets_and_files(small_data, tmp_path, monkeypatch):
    result = audit("mawps", ["all"], data_dir=small_data)
    assert len(result.leaks) == len(named_test_sets(data_dir=small_data)) == 16
    assert {leak.test for leak in result.leaks if leak.covered} == {"addsub", "multiarith"}
    assert {leak.test for leak in result.leaks if leak.same_words} == {"addsub"}
    assert result.leaking == (0,)
    shown = str(result)
    assert re.search(r"multiarith +1 +0 +1 +1\n", shown)
    assert "1 of 2 records leak, 1 are left; 14 of 16 test sets share no question." in shown
    assert "\n" not in str(audit("mawps", ["boolq"], data_dir=small_data))

    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"instruction": WORD_PROBLEM, "output": "7"}))
    assert audit(str(path), ["mawps:train"], data_dir=small_data).leaking == (0,)
    tsv = str(small_data / "aqua" / "train.tsv")
    assert audit(tsv, ["aqua:train"], data_dir=small_data).leaking == (0, 1, 2, 3)
    with pytest.raises(ValueError, match=r"`mwps` is not .*`mawps`"):
        audit("mwps", ["all"], data_dir=small_data)
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"`data` must .*none at gone.jsonl"):
        audit("gone.jsonl", ["mawps"])
    with pytest.raises(FileNotFoundError, match=r"`data` must .* a folder at mine\."):
        audit("mine", ["mawps"])
    with pytest.raises(FileNotFoundError, match=r"none at ./mine.json"):
        audit("./mine.json", ["all"], data_dir=small_data)


def test_all_needs_a_test_set_at_hand(small_data):
    with pytest.raises(ValueError, match=r"none is at hand; .*DEPTHMIX_DATA"):
        audit("mawps", ["all"])


@pytest.mark.parametrize("kind", ["name", "file"])
def test_what_is_left_can_be_trained_on(small_data, tmp_path, kind):
    source = "mawps"
    if kind == "file":
        source = str(tmp_path / "mine.json")
        records = load_records("mawps", data_dir=small_data)
        (tmp_path / "mine.json").write_text(json.dumps(records))
    result = audit(source, ["all"], data_dir=small_data)
    path = tmp_path / "rest.jsonl"
    assert write_rest(result, path, data_dir=small_data) == 1
    assert load_records(str(path)) == load_records("mawps", data_dir=small_data)[1:]
    assert not audit(str(path), ["all"], data_dir=small_data).leaking
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"`drop` must be a new file, .*rest.jsonl exists"):
        write_rest(result, path, data_dir=small_data)
    assert path.read_bytes() == before


def test_the_command(small_data, tmp_path, capsys):
    drop = tmp_path / "rest.jsonl"
    options = ["--data-dir", str(small_data), "--drop", str(drop), "--list"]
    assert depthmix_cli.main(["audit", "mawps", "addsub", "multiarith", *options]) == 0
    shown = capsys.readouterr().out
    assert "0 (addsub, multiarith): ann has 3 tickets . bob has 4 ." in shown
    assert re.search(r"addsub +1 +1 +1 +1\n", shown)
    assert f"1 records written to {drop}." in shown
    assert len(drop.read_text().splitlines()) == 1
    assert depthmix_cli.main(["audit", "mawps", "addsub", *options]) == 1
    assert "`drop` must be a new file" in capsys.readouterr().err


def test_a_run_is_warned(small_data, monkeypatch):
    monkeypatch.setenv("DEPTHMIX_DATA", str(small_data))
    records = load_records("mawps")
    message = (
        r"1 of 2 training records .*\(1 addsub, 1 multiarith\), .*"
        r"`depthmix audit mawps addsub multiarith --drop rest.jsonl`"
    )
    with pytest.warns(UserWarning, match=message):
        warn_of_leaks(records, "mawps")
    with pytest.warns(UserWarning, match=r"1 of 1 .*\(1 arc_easy, 1 arc_challenge\)"):
        warn_of_leaks(load_records("arc_easy"), "arc_easy")
    command = "`depthmix audit mawps:validation addsub multiarith --drop rest.jsonl`"
    with pytest.warns(UserWarning, match=command):
        warn_of_leaks(records, "mawps", split="validation")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_leaks(records[1:], "mawps")
    (small_data / "boolq" / "test.json").write_text("[]")
    with pytest.warns(UserWarning, match=r"Leaks into boolq could not be looked for: .*sha256"):
        warn_of_leaks(records[1:], "mawps")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Why?", "completion": " No.", "turns": 2},
        {"messages": [{"role": "user", "content": IN_PARTS}, ANSWER]},
        {"messages": None, "prompt": [{"role": "user", "content": "Why?"}], "completion": [ANSWER]},
        {"prompt": [{"role": "user"}], "completion": "No."},
        {"instruction": 5, "output": "No."},
    ],
)
def test_what_can_be_trained_on_can_be_looked_at(record, small_data, monkeypatch):
    monkeypatch.setenv("DEPTHMIX_DATA", str(small_data))
    assert len(to_training_dataset([record], "auto", make_tokenizer())) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_leaks([record], "mine.jsonl")


def test_a_missing_folder_stops_no_run(small_data, tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHMIX_DATA", str(tmp_path / "nowhere"))
    path = tmp_path / "my test.jsonl"
    records = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}", "answer": "1"} for n in (1, 2)]
    path.write_text("\n".join(map(json.dumps, records)))
    with pytest.warns(UserWarning, match=r"could not be looked for") as caught:
        warn_of_leaks(records, "mine.jsonl", evaluation=str(path))
    missing, leaking = (str(warning.message) for warning in caught)
    assert re.search(r"named test sets could not be looked for: .*DEPTHMIX_DATA", missing)
    assert leaking.startswith("2 of 2 training records")
    assert f"`depthmix audit mine.jsonl '{path}' --drop rest.jsonl`" in leaking
    with pytest.warns(UserWarning, match=r"^1 of 2 training records") as caught:
        warn_of_leaks(records, "mine.jsonl", evaluation=str(path), num_items=1)
    assert len(caught) == 2


def test_nothing_is_downloaded_for_the_warning(small_data, monkeypatch):
    def refuse(*_args, **_options):
        raise AssertionError("asked for a download")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(pooch, "retrieve", refuse)
    for evaluation in ("owner/name", "gsm8k", "mmlu_stem"):
        warn_of_leaks(
            [{"prompt": "Why?", "completion": "No."}], "mine.jsonl", evaluation=evaluation
        )


def test_a_split_of_the_hub_can_be_audited(small_data, monkeypatch):
    def load_dataset(source, *, split):
        assert (source, split) == ("owner/name", "held_out")
        return datasets.Dataset.from_list([{"question": WORD_PROBLEM}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert audit("owner/name:held_out", ["addsub"], data_dir=small_data).leaking == (0,)


def test_a_run_is_warned_of_its_own_evaluation(small_data, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "base")
    items = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(4)]
    tests = [{"prompt": "3 + 1 =", "answer": "4"}, {"prompt": "9 + 1 =", "answer": "10"}]
    for name, records in (("train", items), ("test", tests)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    config = load_run_config(
        None,
        {
            "model": {"name": str(checkpoint)},
            "data": {"train": str(tmp_path / "train.jsonl")},
            "mode": {"late_layers": 2, "target_modules": ["q_proj"]},
            "training": {
                "output_dir": str(tmp_path / "out"),
                "max_steps": 1,
                "report_to": "none",
            },
            "evaluation": {
                "data": str(tmp_path / "test.jsonl"),
                "metric": "exact_match",
                "before": False,
                "max_new_tokens": 2,
            },
        },
    )
    with pytest.warns(UserWarning, match=r"1 of 4 training records .*\(1 .*test.jsonl\)"):
        train(config)


@pytest.fixture(scope="module")
def quick_audit():
    """Read each data set once for all audits, none of which changes a record."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("depthmix.data.audit.load_split", functools.cache(load_split))
        yield audit


@needs_data
@pytest.mark.parametrize(
    "path",
    [
        # Half a minute for all, since each call is checked against its annotations.
        path if name == "mawps" else pytest.param(path, marks=pytest.mark.slow)
        for path, name in TRAINING_FILES.items()
    ],
)
def test_the_published_counts_are_reproduced(path, quick_audit):
    name = TRAINING_FILES[path]
    expected = tuple(json.loads((REAL / "leakage.json").read_text())[path])
    result = quick_audit(name, ["all"], data_dir=REAL)
    assert len(result.leaks) == 16
    for leak in result.leaks:
        counts = (len(leak.same_words), len(leak.same_letters), len(leak.covered))
        assert counts == PUBLISHED.get((name, leak.test), (0, 0, 0)), leak.test
    assert result.leaking == expected
    assert len(list_leaks(result, data_dir=REAL)) == len(expected)
    tests = [leak.test for leak in result.leaks if leak.covered] or ["mt_bench"]
    assert quick_audit(str(REAL / path), tests, data_dir=REAL).leaking == expected


@needs_data
def test_math7k_is_clean(quick_audit):
    assert not quick_audit("math7k", ["all"], data_dir=REAL).leaking
    aqua = load_split("aqua", "train", data_dir=REAL)
    assert len({same_letters(record["question"]) for record in aqua}) == 2142
    assert len(read_source("gsm8k", "train", data_dir=REAL)) == 7473
