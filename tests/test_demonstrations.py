"""Training records in a benchmark's text, against the requests of lm-eval's own tasks."""

import json
import sys
import warnings

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from checkpoints import make_model, make_tokenizer, save_checkpoint
from data_folder import REAL, needs_data
from depthmix.data.evaluation_records import load_evaluation_records
from depthmix.data.instructions import from_aqua
from depthmix.data.records import load_published, load_records
from depthmix.data.spec import EvaluationSpec
from depthmix.data.templates import to_training_dataset
from depthmix.libraries.releases import CHECKPOINTING
from depthmix.training.config import load_run_config
from depthmix.training.train import train

pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from depthmix.evaluation.extraction import stated_letter, stated_number
from depthmix.evaluation.harness_model import HarnessModel
from depthmix.evaluation.numbers import is_same_number
from depthmix.evaluation.tasks.configs import BUILTIN, OURS, THEIRS
from depthmix.evaluation.tasks.demonstrations import check_benchmark, to_demonstrations

CHOICES = ("arc_easy", "arc_challenge", "boolq", "openbookqa", "hellaswag")
PROBLEMS = ("gsm8k", "mawps", "aqua")
MIXTURES = ("math7k", "math_10k_partial")
NUM_REAL = 50
"""Records of each real set that are compared in every run of the tests."""


def send_requests(name, records):
    """Let lm-eval build its own task on the records; give the arguments of each one's requests."""
    ours = name in ("boolq", "mawps", "aqua")
    config = load_yaml(OURS / "default" / f"{name}.yaml" if ours else THEIRS / BUILTIN[name][0])
    splits = dict.fromkeys(["train", "validation", "test"], Dataset.from_list(records))
    config |= {"custom_dataset": lambda **_: splits, "num_fewshot": 0}
    (task,) = TaskManager(include_defaults=False).load([config])["tasks"].values()
    task.build_all_requests(rank=0, world_size=1)
    sent = [[] for _ in records]
    for instance in task.instances:
        sent[instance.doc_id].append(instance.args)
    return sent


def right_choice(record):
    if "answerKey" in record:
        return record["choices"]["label"].index(record["answerKey"])
    return record["label"]


def check_choices(name, records, data_dir):
    requests = send_requests(name, records)
    for record, made, sent in zip(
        records, to_demonstrations(records, name, data_dir=data_dir), requests, strict=True
    ):
        assert (made["prompt"], made["completion"]) == sent[right_choice(record)]
        assert len(sent) >= 2
        assert made["completion"].startswith(" ")


def check_problems(name, records, data_dir):
    requests = send_requests(name, records)
    for record, made, sent in zip(
        records, to_demonstrations(records, name, data_dir=data_dir), requests, strict=True
    ):
        assert made["prompt"] == sent[0][0]
        check_rationale(made["completion"], record)


def check_rationale(completion, record):
    """Check that a rationale is judged right, and has nothing behind its answer."""
    answer = record["answer"].rsplit("####", 1)[-1].strip()
    ending = answer.replace(",", "").removesuffix(".0")
    assert completion.startswith(" ")
    assert completion.endswith(f"The answer is {ending}.")
    if answer.isalpha():
        assert stated_letter(completion) == answer
    else:
        assert is_same_number(stated_number(completion), ending)


def check_mixture(records, made):
    for record, demonstration in zip(records, made, strict=True):
        problem = record["instruction"].replace(" Answer Choices: (A)", "\nAnswer Choices: (A)")
        assert demonstration["prompt"] == f"Question: {problem}\nAnswer:"
        assert demonstration["completion"].startswith(" " + record["output"].strip())
        check_rationale(demonstration["completion"], record)


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_the_requests_of_lm_evals_task(small_data, name):
    records = load_published(name, data_dir=small_data)
    check_choices(name, records, small_data)


def test_labelled_and_marked_endings_are_lm_evals(small_data):
    record = {
        "ind": 1,
        "activity_label": "How to fish",
        "ctx_a": "[header] How to fish [title] Begin.",
        "ctx_b": "the rod",
        "ctx": "[header] How to fish [title] Begin. the rod",
        "endings": ["[step] is  cast.", "sings.", "flies.", "rusts."],
        "label": 0,
    }
    check_choices("hellaswag", [record, {**record, "label": 3}], small_data)
    (made,) = to_demonstrations([record], "hellaswag", data_dir=small_data)
    assert made == {
        "prompt": "How to fish: How to fish. Begin. The rod",
        "completion": "  is cast.",
    }


@pytest.mark.parametrize("name", PROBLEMS)
def test_word_problems_are_asked_as_by_the_benchmark(small_data, name):
    records = load_published(name, data_dir=small_data)
    check_problems(name, records, small_data)
    outputs = [record["output"] for record in load_records(name, data_dir=small_data)]
    made = to_demonstrations(records, name, data_dir=small_data)
    assert [demonstration["completion"] for demonstration in made] == [f" {o}" for o in outputs]


def test_a_mixture_asks_as_the_benchmarks_that_it_is_made_of(small_data):
    records = load_published("math7k", data_dir=small_data)
    made = to_demonstrations(records, "math7k", data_dir=small_data)
    parts = {name: load_published(name, data_dir=small_data) for name in ("gsm8k", "aqua")}
    drawn = {record["instruction"] for record in records}
    parts["aqua"] = [
        record for record in parts["aqua"][:3] if from_aqua(record)["instruction"] in drawn
    ]
    expected = [
        demonstration
        for name, part in parts.items()
        for demonstration in to_demonstrations(part, name, data_dir=small_data)
    ]
    assert sorted(map(str, made)) == sorted(map(str, expected))
    (made,) = to_demonstrations(
        load_published("math_10k_partial", data_dir=small_data), "math_10k_partial"
    )
    assert made == {
        "prompt": "Question: Two?\nAnswer:",
        "completion": " It is 2.\nThe answer is 2.",
    }


@needs_data
@pytest.mark.parametrize("num_records", [NUM_REAL, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [*CHOICES, *PROBLEMS, *MIXTURES])
def test_real_records_are_the_requests_of_the_benchmark(name, num_records, monkeypatch):
    monkeypatch.setenv("DEPTHMIX_DATA", str(REAL))
    records = load_published(name)
    records = records[:: max(1, len(records) // (num_records or len(records)))]
    if name in MIXTURES:
        check_mixture(records, to_demonstrations(records, name))
    else:
        (check_choices if name in CHOICES else check_problems)(name, records, REAL)


@pytest.mark.parametrize("name", ["arc_easy", "hellaswag", "openbookqa"])
def test_the_tokens_of_training_are_those_that_are_scored(small_data, tmp_path, name):
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    records = to_demonstrations(
        load_published(name, data_dir=small_data), name, data_dir=small_data
    )
    trainer = SFTTrainer(
        model,
        SFTConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to="none",
            **{CHECKPOINTING: True},
        ),
        train_dataset=to_training_dataset(records, "lm-eval", tokenizer),
        processing_class=tokenizer,
    )
    scorer = HarnessModel(pretrained=model, tokenizer=tokenizer)
    for record, row in zip(records, trainer.train_dataset, strict=True):
        context, scored = scorer._encode_pair(record["prompt"], record["completion"])
        assert row["input_ids"] == [*context, *scored, tokenizer.eos_token_id]
        assert row["labels"] == [-100] * len(context) + [*scored, tokenizer.eos_token_id]


@pytest.mark.parametrize("source", ["alpaca", "owner/name", "mmlu_stem", "mt_bench", "x.jsonl"])
def test_what_has_no_benchmark_is_refused(source):
    message = f"`data.train` must be a named data set with a benchmark .*arc_easy.* and {source} is"
    with pytest.raises(ValueError, match=message):
        check_benchmark(source, "data.train")


def test_a_file_is_refused_even_under_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_benchmark("arc_easy", "data.eval")
    (tmp_path / "arc_easy").write_text("")
    with pytest.raises(ValueError, match=r"`data.eval` must be a named data set"):
        check_benchmark("arc_easy", "data.eval")


def configure(checkpoint, output_dir, **data):
    return load_run_config(
        None,
        {
            "model": {"name": str(checkpoint)},
            "data": {"template": "lm-eval", **data},
            "mode": {"late_layers": 2, "target_modules": ["q_proj"]},
            "training": {"output_dir": str(output_dir), "max_steps": 1, "report_to": "none"},
        },
    )


def test_a_run_trains_and_validates_in_the_benchmarks_text(small_data, tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHMIX_DATA", str(small_data))
    written = []
    monkeypatch.setattr(
        "depthmix.training.material.to_training_dataset",
        lambda records, *args, **options: (
            written.append(records) or to_training_dataset(records, *args, **options)
        ),
    )
    checkpoint = save_checkpoint(tmp_path / "base")
    config = configure(
        checkpoint, tmp_path / "out", train="arc_easy", eval="arc_easy", eval_split="test"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".* training records ask a question of a test set")
        result = train(config)
    fish = {"prompt": "Question: What do fish breathe with?\nAnswer:", "completion": " gills"}
    sky = {"prompt": "Question: Which is\nblue?\nAnswer:", "completion": " sky"}
    assert written == [[fish], [fish, sky]]
    assert result.metrics["eval_loss"] > 0
    assert result.data == {"given": 1, "dropped": 0, "used": 1}
    for option in ("train", "eval"):
        config = configure(checkpoint, tmp_path / "no", **{"train": "mawps", option: "alpaca"})
        with pytest.raises(ValueError, match=f"`data.{option}` must be a named data set"):
            train(config)


def test_instructions_are_not_evaluated_on_in_another_text(small_data, tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHMIX_DATA", str(small_data))
    section = EvaluationSpec(data="gsm8k", metric="exact_match")
    with pytest.raises(ValueError, match=r"`data.template` must not be .lm-eval.*`depthmix eval"):
        load_evaluation_records(section, "lm-eval", make_tokenizer())
    rows = [{"prompt": "Question: 1?\nAnswer:", "choices": [" no", " yes"], "answer": 1}]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    section = EvaluationSpec(data=str(tmp_path / "own.jsonl"), metric="choices")
    (item,) = load_evaluation_records(section, "lm-eval", make_tokenizer())
    assert {name: item[name] for name in rows[0]} == rows[0]


def test_without_lm_eval_a_run_says_so(small_data, tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHMIX_DATA", str(small_data))
    for module in [name for name in sys.modules if name.startswith("depthmix.evaluation.tasks")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    config = configure(save_checkpoint(tmp_path / "base"), tmp_path / "out", train="arc_easy")
    with pytest.raises(RuntimeError, match=r"training records in its text, needs lm-eval"):
        train(config)
