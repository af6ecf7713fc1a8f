"""Did it help? Sentences about tuning as a whole and about the mixture, and what they rest on."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import depthmix_cli
from depthmix.comparison.answers import did_it_help, say_answers
from depthmix.comparison.comparison import compare
from depthmix.comparison.costs import read_cost, say_costs
from evaluation_folder import write_evaluation

PRETRAINED = np.repeat([1, 0], [10, 90])
LORA = np.repeat([1, 0], [50, 50])


def write(tmp_path, name, scores, method, **facts):
    return write_evaluation(tmp_path / name, {"own": scores}, method=method, **facts)


@pytest.fixture
def three(tmp_path):
    """Write the pretrained model, LoRA alone, and a function for what the mixture answers."""
    base = write(tmp_path, "base", PRETRAINED, "pretrained")
    lora = write(tmp_path, "lora", LORA, "LoRA_¬K")

    def add(scores, **facts):
        return [base, lora, write(tmp_path, "mode", scores, "LoRA_¬K + MoDE", **facts)]

    return add


def test_tuning_and_the_mixture_are_told_apart(three):
    tuning, mixture = did_it_help(three(np.repeat([1, 0], [51, 49])))
    assert (tuning.question, tuning.rival, tuning.verdict) == ("tuning", "pretrained", "better")
    assert (mixture.question, mixture.rival, mixture.verdict) == ("mixture", "LoRA_¬K", "open")
    assert str(tuning).startswith(
        "Tuning as a whole helped: LoRA_¬K + MoDE has 51.0 % of 100 items, pretrained 10.0 %; "
        "+41.0 points (+"
    )
    assert "p < 0.001." in str(tuning)
    assert str(mixture).startswith("Whether the mixture adds anything to LoRA alone is open: ")


@pytest.mark.parametrize(
    ("scores", "verdict", "words"),
    [
        (np.repeat([1, 0], [80, 20]), "better", "The mixture helped beside LoRA alone: "),
        (np.repeat([1, 0], [20, 80]), "worse", "The mixture did harm beside LoRA alone: "),
    ],
)
def test_the_mixture_has_a_verdict_of_its_own(three, scores, verdict, words):
    _, mixture = did_it_help(three(scores))
    assert mixture.verdict == verdict
    assert str(mixture).startswith(words)


def test_the_numbers_are_those_of_the_table(three):
    runs = three(np.repeat([1, 0], [80, 20]))
    _, mixture = did_it_help(runs)
    row = compare(runs[1:]).rows[-1]
    difference = row.scores[1].difference
    assert mixture.lead == difference.estimate
    assert mixture.p_value == difference.p_value
    assert mixture.interval.low == pytest.approx(difference.interval.low, abs=0.03)
    assert mixture.adjusted_p_value >= mixture.p_value


def test_less_of_a_loss_is_better(tmp_path):
    rng = np.random.default_rng(0)
    before = 2 + rng.random(80)
    facts = {"main_metric": {"own": "nll,none"}}
    runs = [
        write(tmp_path, "base", before, "pretrained", **facts),
        write(tmp_path, "mode", before - 0.5 - 0.1 * rng.random(80), "MoDE", **facts),
    ]
    (tuning,) = did_it_help(runs)
    assert tuning.verdict == "better"
    assert tuning.lead == pytest.approx(0.55, abs=0.02)
    assert "nats per token" in str(tuning)
    assert "less (+0.5" in str(tuning)


def test_overlapping_intervals_of_scores_are_explained(three):
    scores = LORA.copy()
    scores[50:60] = 1  # ten more, and none less: the difference is certain
    _, mixture = did_it_help(three(scores))
    assert mixture.verdict == "better"
    assert "overlap all the same" in str(mixture)


@pytest.mark.parametrize(
    ("low", "p_value", "adjusted", "verdict", "words"),
    [
        (0.01, 0.03, 0.06, "open", "after Holm's correction is 0.06"),
        (-0.01, 0.03, 0.03, "open", "at the border they part"),
        (-0.01, 0.3, 0.6, "open", ""),
        (0.01, 0.01, 0.02, "better", "overlap all the same"),
    ],
)
def test_numbers_that_seem_to_disagree(three, low, p_value, adjusted, verdict, words):
    _, answer = did_it_help(three(np.repeat([1, 0], [51, 49])))
    interval = replace(answer.interval, low=low, high=0.2)
    answer = replace(
        answer, lead=0.1, interval=interval, p_value=p_value, adjusted_p_value=adjusted
    )
    assert answer.verdict == verdict
    assert bool(answer.remark) == bool(words)
    assert words in str(answer)


def test_what_is_not_there_is_said(three):
    base, lora, mode = three(np.repeat([1, 0], [51, 49]))
    assert "train the same run with `--method lora`" in say_answers(did_it_help([base, mode]))[-1]
    assert "the pretrained model is not among" in say_answers(did_it_help([lora, mode]))[-1]
    assert [a.question for a in did_it_help([base, lora])] == ["tuning"]
    assert say_answers(did_it_help([base])) == ()


def test_names_and_single_layers(three, tmp_path):
    base, lora, mode = three(np.repeat([1, 0], [51, 49]))
    layer = write(tmp_path, "layer", LORA, "LoRA_¬K + MoDE", layer=29)
    tuning, mixture = did_it_help([f"before={base}", f"plain={lora}", f"ours={mode}", layer])
    assert (tuning.method, tuning.rival) == ("ours", "before")
    assert (mixture.method, mixture.rival) == ("ours", "plain")


def test_a_run_says_what_it_cost(three, tmp_path):
    runs = three(LORA)
    run = tmp_path / "run"
    evaluation = run / "evaluation" / "default"
    write_evaluation(evaluation, {"own": LORA}, method="LoRA_¬K + MoDE", seed=1)
    assert read_cost(run) is None
    (run / "run_config.json").write_text("{}")
    results = {
        "metrics": {"train_runtime": 90.0},
        "log_history": [{"memory_gib": 1.0}, {"memory_gib": 2.5}, {"loss": 1.0}],
        "ledger": {"total": 2880},
    }
    (run / "results.json").write_text(json.dumps(results))
    assert str(read_cost(run)) == "1.5 min of training, 2.5 GiB, 2,880 trained parameters"
    (run / "exits").mkdir()
    calibration = {"measured": {"speed_up": 1.5}}
    (run / "exits" / "calibration.json").write_text(json.dumps(calibration))
    (line,) = say_costs(compare([*runs[:2], run]))
    assert line.startswith("Cost: LoRA_¬K + MoDE 1.5 min of training")
    assert line.endswith("generates 1.50 times as fast by `--fast`.")
    assert say_costs(compare(runs)) == ()
    (run / "results.json").write_text("[")
    with pytest.raises(ValueError, match="copy the run again"):
        read_cost(run)


def test_compare_says_it_first(three, capsys):
    runs = three(np.repeat([1, 0], [51, 49]))
    assert depthmix_cli.main(["compare", *map(str, runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Tuning as a whole helped: LoRA_¬K + MoDE")
    assert lines[1].startswith("Whether the mixture adds anything")
