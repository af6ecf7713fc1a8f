"""What a run measures is an evaluation: kept, read and compared as `depthmix evaluate` makes it."""

import json
import math
import sys

import pytest

import depthmix_cli
from checkpoints import CHAT_TEMPLATE, make_tokenizer, save_checkpoint
from depthmix import load_run_config, train
from depthmix.comparison.comparison import compare
from depthmix.comparison.recovery import Gap
from depthmix.comparison.tables import to_text
from depthmix.data.evaluation_records import choose_metric, load_evaluation_records
from depthmix.data.spec import EvaluationSpec
from depthmix.data.templates import to_training_dataset
from depthmix.evaluation.harness import evaluate
from depthmix.evaluation.reading import load_evaluation
from depthmix.evaluation.wordings import read_wordings
from depthmix.pages import collect_report, draw_report, write_report
from depthmix.pages.verdict import judge_run
from depthmix.training.folder import load_result
from evaluation_folder import write_evaluation

pytest.importorskip("lm_eval")

TEXTS = [
    {"prompt": f"Tell {n}:", "completion": f" one two three four five six {n}"} for n in "abcd"
]
SUMS = [{"prompt": f"{n} + {n} =", "answer": str(2 * n)} for n in range(4)]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    save_checkpoint(folder / "base")
    write(folder / "train.jsonl", TEXTS)
    return folder


def run(place, name, evaluation, **options):
    config = load_run_config(
        None,
        {
            "model": {"name": str(place / "base"), "dtype": "float32"},
            "data": {"train": str(place / "train.jsonl")},
            "mode": {"late_layers": 2, "r": 2, "target_modules": ["q_proj"], "lora_dropout": 0.5},
            "evaluation": evaluation,
            "training": {
                "output_dir": str(place / name),
                "max_steps": 2,
                "learning_rate": 0.1,
                "report_to": "none",
                "save_strategy": "no",
                "per_device_train_batch_size": 2,
            },
            **options,
        },
    )
    return train(config)


@pytest.fixture(scope="module")
def runs(place):
    """Two methods, measured in training by the loss of free texts."""
    evaluation = {"data": write(place / "texts.jsonl", TEXTS)}
    return [run(place, "lora", evaluation, method="lora"), run(place, "mode", evaluation)]


def test_runs_are_compared_right_after_training(runs, capsys):
    folders = [str(result.output_dir) for result in runs]
    comparison = compare(folders)
    assert [method.label for method in comparison.methods] == ["LoRA_¬K", "LoRA_¬K + MoDE"]
    (row,) = comparison.tasks
    assert row.num_items == 4
    means = [result.after.task.mean for result in runs]
    assert [score.mean for score in row.scores] == pytest.approx(means)
    assert row.scores[1].difference.test == "bootstrap"
    assert depthmix_cli.main(["compare", *folders]) == 0
    assert "Losses are in nats per token" in capsys.readouterr().out


def test_a_run_is_compared_with_its_pretrained_model(runs):
    result = runs[0]
    comparison = compare([result.output_dir / "pretrained", result.output_dir])
    assert [method.label for method in comparison.methods] == ["pretrained", "LoRA_¬K"]
    before, after = comparison.tasks[0].scores
    assert before.mean == pytest.approx(result.before.task.mean)
    assert after.mean == pytest.approx(result.after.task.mean)
    assert after.difference.estimate == pytest.approx(after.mean - before.mean)
    assert before.mean != after.mean


def test_what_is_kept_is_what_is_returned(runs):
    result = runs[1]
    assert load_result(result.output_dir) == result
    folder = result.output_dir / "evaluation" / "training"
    assert load_evaluation(folder) == result.after
    settings = json.loads((folder / "evaluation.json").read_text())
    assert settings["protocol"] == "default"
    assert settings["method"] == "LoRA_¬K + MoDE"
    facts = json.loads((folder / "results.json").read_text())["depthmix"]
    assert facts["main_metric"] == {"records": "nll,none"}
    assert facts["data"]["records"]["metric"] == "loss"
    low, high = facts["intervals"]["records"]["nll,none"]
    assert low < result.after.task.mean < high
    assert str(result.after.task).startswith(f"{result.after.task.mean:.3f} nats per token (95 %")


def test_the_same_model_is_measured_alike_by_evaluate(runs, place, tmp_path):
    result = runs[1]
    options = {"records": str(place / "texts.jsonl"), "output_dir": tmp_path / "again"}
    evaluate(str(result.output_dir), **options)
    again = load_evaluation(tmp_path / "again")
    assert again.task.scores.keys() == result.after.task.scores.keys()
    assert list(again.task.scores.values()) == pytest.approx(
        list(result.after.task.scores.values())
    )
    assert again.task.data == result.after.task.data
    assert (again.settings, again.adapter) == (result.after.settings, result.after.adapter)


def test_a_loss_is_the_one_of_training(runs, place):
    tokenizer = make_tokenizer()
    dataset = to_training_dataset(TEXTS, "auto", tokenizer)
    section = EvaluationSpec(data=str(place / "texts.jsonl"), metric="loss")
    for row, item in zip(dataset, load_evaluation_records(section, "auto", tokenizer), strict=True):
        assert item["prompt_ids"] + item["completion_ids"] == row["input_ids"]
        assert len(item["completion_ids"]) == sum(row["completion_mask"])
    words = read_wordings(runs[0].after, list(runs[0].after.task.scores))
    assert [word.reference for word in words.values()] == [text["completion"] for text in TEXTS]


def test_a_report_shows_losses(runs, tmp_path):
    (verdict,) = judge_run(runs[1].output_dir, [runs[0].output_dir])
    assert set(verdict.methods) == {"LoRA_¬K + MoDE", "LoRA_¬K", "pretrained"}
    means = {score.method: score.mean for score in verdict.comparison.rows[-1].scores}
    assert list(verdict.rivals) == sorted(verdict.rivals, key=means.__getitem__)  # best first
    report = collect_report(runs[1].output_dir, baselines=[runs[0].output_dir])
    assert report.examples == ()
    assert "accuracies_0" not in draw_report(report)
    page = write_report(report, tmp_path / "report.html").read_text("utf-8")
    assert f"{means['pretrained']:.3f} nats" in page
    assert "lead of this run, nats:" in page
    assert "Measured on texts.jsonl: loss of the right text" in page


def test_measuring_changes_nothing_in_training(place, runs):
    unmeasured = run(place, "unmeasured", None)
    assert unmeasured.before is unmeasured.after is None
    weights = [
        (result.output_dir / "adapter_model.safetensors").read_bytes()
        for result in (runs[1], unmeasured)
    ]
    assert weights[0] == weights[1]


def test_answers_are_measured_and_the_chosen_metric_is_said(place, capsys):
    evaluation = {"data": write(place / "sums.jsonl", SUMS), "max_new_tokens": 3, "before": False}
    result = run(place, "sums", evaluation)
    assert "sums.jsonl is measured by `metric` exact_match, since no answer has more" in (
        capsys.readouterr().err
    )
    assert result.before is None
    assert result.after.task.metric == "exact_match,stated"
    assert result.after.task.data["max_new_tokens"] == 3
    assert not (result.output_dir / "pretrained").exists()
    command = ["evaluate", str(place / "base"), "--records", evaluation["data"]]
    command += ["--max-new-tokens", "3", "--output", str(place / "sums-base")]
    assert depthmix_cli.main(command) == 0
    assert compare([place / "sums-base", result.output_dir]).tasks[0].num_items == 4


def test_an_evaluation_of_ones_own_stands_before_that_of_training(runs, place):
    folder = runs[0].output_dir
    made = write_evaluation(folder / "evaluation" / "default", {"arc": [1, 0]})
    try:
        assert compare([folder]).tasks[0].task == "arc"
        assert compare([folder / "evaluation" / "training"]).tasks[0].task == "records"
    finally:
        for path in made.iterdir():
            path.unlink()
        made.rmdir()


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(
    ("record", "answer", "metric"),
    [
        ({"prompt": "a", "answer": 12}, "12", "exact_match"),
        ({"prompt": "a", "answer": 0}, "0", "exact_match"),
        ({"prompt": "a", "completion": " yes"}, " yes", "exact_match"),
        ({"instruction": "a", "output": "New York City"}, "New York City", "exact_match"),
        ({"messages": CHAT}, "yes", "exact_match"),
        ({"messages": CHAT[:1], "answer": "yes"}, "yes", "exact_match"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "yes", "exact_match"),
        ({"instruction": "a", "output": "so it is 4, I think", "answer": "4"}, "4", "exact_match"),
        ({"prompt": "a", "completion": "one two three four five six"}, None, "loss"),
        ({"prompt": "a", "completion": "two\nlines"}, None, "loss"),
        ({"prompt": "a", "choices": [" b", " c"], "answer": 1}, 1, "choices"),
    ],
)
def test_every_form_of_training_records_is_measured(record, answer, metric, tmp_path):
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    assert choose_metric([record])[0] == metric
    section = EvaluationSpec(data=write(tmp_path / "r.jsonl", [record]))
    (row,) = load_evaluation_records(section, "auto", tokenizer)
    assert row["prompt_ids"] == tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
    assert row.get("answer") == answer
    section = EvaluationSpec(data=section.data, metric="loss")
    if metric != "choices":
        (row,) = load_evaluation_records(section, "auto", tokenizer)
        assert row["completion_ids"][-1] in (
            tokenizer.eos_token_id,
            tokenizer(row["completion"])["input_ids"][-1],
        )


@pytest.mark.parametrize(
    ("record", "metric"),
    [
        ({"prompt": "a"}, "exact_match"),
        ({"prompt": "a"}, "loss"),
        ({"answer": "a"}, "loss"),
        ({"messages": CHAT[:1]}, "exact_match"),
        ({"messages": [], "answer": "a"}, "exact_match"),
        ({"prompt": "a", "answer": "b"}, "choices"),
    ],
)
def test_what_a_metric_lacks_is_named(record, metric, tmp_path):
    section = EvaluationSpec(data=write(tmp_path / "r.jsonl", [record]), metric=metric)
    with pytest.raises(ValueError, match=r"records need .* for the metric|cannot|must have"):
        load_evaluation_records(section, "auto", make_tokenizer(CHAT_TEMPLATE))


def test_losses_stand_beside_scores_and_out_of_their_average(tmp_path):
    tasks = {"a": {"arc": [1, 0, 1], "svamp": [0, 0, 1], "own": [2.5, 3.0, 2.0]}}
    tasks["b"] = {"arc": [1, 1, 1], "svamp": [0, 1, 1], "own": [2.0, 2.5, 1.5]}
    metrics = {"main_metric": {"own": "nll,none"}}
    folders = [write_evaluation(tmp_path / n, tasks[n], **dict(metrics)) for n in tasks]
    comparison = compare(folders)
    own = comparison.tasks[2]
    assert own.is_loss
    assert own.overlaps == ()
    assert own.scores[1].difference.estimate == pytest.approx(-0.5)
    assert math.isinf(own.scores[1].difference.interval.low)  # all alike: any difference may be
    assert comparison.average.num_items == 6
    assert comparison.average.scores[1].mean == pytest.approx((1 + 2 / 3) / 2)
    text = to_text(comparison)
    assert "2.500 nats (2.000 to 3.000)" in text
    assert "-0.500 nats (unknown)" in text
    with pytest.raises(ValueError, match="`gaps` must be between scores from 0 to 1, and own is"):
        compare(folders, gaps=[Gap(start="a", goal="b", method="b")])


def test_training_needs_lm_eval_only_to_measure(place, monkeypatch):
    for module in [name for name in sys.modules if name.startswith("depthmix.evaluation.tasks")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run(place, "without", None).after is None
    with pytest.raises(RuntimeError, match=r"An evaluation needs lm-eval, .*depthmix\[eval\]"):
        run(place, "with", {"data": str(place / "texts.jsonl")})
    assert not (place / "with").exists()
