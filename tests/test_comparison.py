"""Comparing evaluations on disk: reading, alignment, grouping, numbers and tables."""

import csv
import io
import json
import re
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

import depthmix_cli
from depthmix.comparison.comparison import compare
from depthmix.comparison.folders import find_evaluation
from depthmix.comparison.notes import notes
from depthmix.comparison.tables import (
    to_csv,
    to_json,
    to_latex,
    to_markdown,
    to_text,
    write_tables,
)
from depthmix.evaluation.reading import load_evaluation
from depthmix.statistics.intervals import (
    Interval,
    PairedDifference,
    holm,
    mean_interval,
    paired_difference,
    wilson_interval,
)
from depthmix.statistics.overlaps import count_overlaps, measure_disagreements
from evaluation_folder import write_evaluation

HOSTILE = "LoRA_¬K & 50 % | $x^2$ {a}\\b~#\n<b>[red]`*"


def draw(share, *, num_items=80, seed=0):
    return (np.random.default_rng(seed).random(num_items) < share).astype(int)


@pytest.fixture
def runs(tmp_path):
    """Write one run of a baseline, and three seeds of another method, on two tasks."""
    folders = [
        write_evaluation(
            tmp_path / "lora",
            {"arc": draw(0.4), "gsm8k": draw(0.2, num_items=50)},
            method="LoRA_¬K",
        )
    ]
    for seed in range(3):
        tasks = {
            "arc": draw(0.4) | draw(0.2, seed=seed + 1),
            "gsm8k": draw(0.2, num_items=50) | draw(0.1, num_items=50, seed=seed + 4),
        }
        folder = tmp_path / f"mode-{seed}" / "evaluation" / "default"
        write_evaluation(folder, tasks, seed=seed, method="LoRA_¬K + MoDE")
        folders.append(tmp_path / f"mode-{seed}")
    return folders


def test_single_runs_give_the_numbers_of_the_statistics(tmp_path):
    first, second = draw(0.4), draw(0.6, seed=1)
    runs = [
        write_evaluation(tmp_path / "a", {"arc": first}),
        write_evaluation(tmp_path / "b", {"arc": second}),
    ]
    comparison = compare(runs)
    assert [method.label for method in comparison.methods] == ["a", "b"]
    assert comparison.average is None
    assert comparison.num_tests == 1
    (task,) = comparison.tasks
    assert (task.task, task.metric, task.num_items) == ("arc", "acc,none", 80)
    baseline, other = task.scores
    assert (baseline.mean, baseline.difference) == (first.mean(), None)
    assert baseline.interval == wilson_interval(int(first.sum()), 80)
    expected = paired_difference(first, second)
    assert other.difference.test == "mcnemar"
    assert other.difference.estimate == expected.estimate
    assert other.difference.p_value == other.adjusted_p_value == expected.p_value
    ends = (other.difference.interval.low, other.difference.interval.high)
    assert ends == pytest.approx((expected.interval.low, expected.interval.high), abs=0.013)
    assert comparison == compare(runs)


def test_several_seeds_tasks_and_the_average(runs):
    comparison = compare(runs)
    assert [m.seeds for m in comparison.methods] == [(0,), (0, 1, 2)]
    assert [row.task for row in comparison.rows] == ["arc", "gsm8k", "average"]
    outcomes = [load_evaluation(find_evaluation(run)) for run in runs]
    for row in comparison.tasks:
        table = np.array([list(o.tasks[row.task].scores.values()) for o in outcomes])
        ours, expected = row.scores[1], paired_difference(table[0], table[1:])
        assert ours.mean == pytest.approx(table[1:].mean())
        assert ours.seed_means == pytest.approx(tuple(table[1:].mean(axis=1)))
        assert (ours.num_seeds, ours.difference.test) == (3, "bootstrap")
        assert ours.difference.estimate == pytest.approx(expected.estimate)
        assert ours.difference.p_value == pytest.approx(expected.p_value, abs=0.01)
        for interval, other in (
            (ours.difference.interval, expected.interval),
            (ours.interval, mean_interval(table[1:])),
        ):
            assert (interval.low, interval.high) == pytest.approx(
                (other.low, other.high), abs=0.013
            )
    average = comparison.average.scores[1]
    parts = [row.scores[1] for row in comparison.tasks]
    assert average.mean == pytest.approx(np.mean([part.mean for part in parts]))
    assert average.seed_means == pytest.approx(np.mean([part.seed_means for part in parts], axis=0))
    change = np.mean([part.difference.estimate for part in parts])
    assert average.difference.estimate == pytest.approx(change)
    assert average.difference.interval.low < change < average.difference.interval.high
    widths = [p.difference.interval.high - p.difference.interval.low for p in parts]
    width = average.difference.interval.high - average.difference.interval.low
    assert width < np.mean(widths)
    assert comparison.num_tests == 3
    scores = [row.scores[1] for row in comparison.rows]
    expected = holm([score.difference.p_value for score in scores])
    assert tuple(score.adjusted_p_value for score in scores) == expected


def test_shared_seeds_stay_together_over_tasks(tmp_path):
    """Seeds that are good or bad on every task leave the average as unsure as one task."""

    def write(name, together):
        for seed, share in enumerate((0.2, 0.5, 0.8)):
            tasks = {
                task: np.arange(400) < 400 * share for task in ("arc", "boolq", "svamp", "aqua")
            }
            if together:
                write_evaluation(tmp_path / f"{name}-{seed}", tasks, method=name, seed=seed)
                continue
            for task, scores in tasks.items():
                folder = tmp_path / f"{name}-{task}-{seed}"
                write_evaluation(folder, {task: scores}, method=name, seed=seed)
        score = compare(sorted(tmp_path.glob(f"{name}-*"))).average.scores[0]
        return score.interval.high - score.interval.low, score.seed_means

    joint, seed_means = write("joint", together=True)
    apart, none = write("apart", together=False)
    assert seed_means == pytest.approx((0.2, 0.5, 0.8))
    assert none == ()
    assert apart < 0.7 * joint


def test_items_are_matched_whatever_their_order(tmp_path):
    first, second = draw(0.4), draw(0.6, seed=1)
    a = write_evaluation(tmp_path / "a", {"arc": first})
    b = write_evaluation(tmp_path / "b", {"arc": second})
    c = write_evaluation(tmp_path / "c", {"arc": second}, order=lambda n: range(n)[::-1])
    assert load_evaluation(b).tasks == load_evaluation(c).tasks
    ours, shuffled = (compare([a, run]).tasks[0].scores[1] for run in (b, c))
    assert ours == replace(shuffled, method="b")


def test_equal_documents_are_told_apart(tmp_path):
    folder = write_evaluation(tmp_path / "a", {"arc": [1, 0, 1]})
    path = folder / "samples_arc.jsonl"
    path.write_text(path.read_text().replace("arc-2", "arc-0"))
    scores = load_evaluation(folder).tasks["arc"].scores
    assert scores == {("arc", "arc-0", 0): 1, ("arc", "arc-1", 0): 0, ("arc", "arc-0", 1): 1}


def test_metrics_and_filters(tmp_path):
    metrics = {"gsm8k": "exact_match,flexible", "truthfulqa": "mc2,none"}
    tasks = {"gsm8k": [1, 0, 0, 1], "truthfulqa": [0.25, 0.5, 0.75, 0.125]}
    runs = [write_evaluation(tmp_path / name, tasks, main_metric=metrics) for name in ("a", "b")]
    comparison = compare(runs)
    assert [row.scores[0].mean for row in comparison.tasks] == [0.5, 0.40625]
    assert comparison.tasks[0].overlaps
    assert comparison.tasks[1].overlaps == ()
    assert comparison.tasks[1].scores[1].difference.test == "bootstrap"
    assert comparison.tasks[1].scores[1].difference.p_value == 1
    strict = compare(runs, tasks=["gsm8k"], metric="exact_match,none")
    assert strict.tasks[0].scores[0].mean == 1
    with pytest.raises(ValueError, match="exact_match names 2 in gsm8k"):
        compare(runs, tasks=["gsm8k"], metric="exact_match")
    with pytest.raises(ValueError, match="acc names none in gsm8k"):
        compare(runs, metric="acc")


def test_a_group_of_tasks_with_one_metric_is_one_task(tmp_path):
    tasks = {"mmlu_physics": [1, 0], "mmlu_biology": [1, 1, 1, 0, 0, 0], "arc": [1]}
    groups = {"mmlu": ["stem"], "stem": ["mmlu_physics", "mmlu_biology"]}
    folder = write_evaluation(tmp_path / "a", tasks, groups=groups)
    comparison = compare([folder])
    assert [(r.task, r.num_items) for r in comparison.tasks] == [("mmlu", 8), ("arc", 1)]
    assert comparison.tasks[0].scores[0].mean == 0.5
    assert comparison.average.scores[0].mean == 0.75
    alone = compare([folder], tasks=["mmlu_physics"])
    assert alone.tasks[0].num_items == 2


def test_overlaps_equal_a_naive_count():
    rng = np.random.default_rng(0)
    seeds = {"a": 1, "b": 2, "c": 3, "d": 4}
    tables = {name: (rng.random((n, 60)) < 0.5).astype(float) for name, n in seeds.items()}
    found = {overlap.methods: overlap.num_items for overlap in count_overlaps(tables)}
    assert sum(found.values()) == 60
    for size in range(5):
        for names in combinations("abcd", size):
            count = sum(
                all(
                    (2 * table[:, item].sum() > len(table)) == (name in names)
                    for name, table in tables.items()
                )
                for item in range(60)
            )
            assert found.get(names, 0) == count
    assert list(found) == sorted(found, key=lambda names: (len(names), names))


def test_a_tie_of_seeds_solves_nothing():
    (overlap,) = count_overlaps({"a": np.array([[1.0], [0.0]]), "b": np.array([[0.0]])})
    assert overlap.methods == ()


def test_disagreements_equal_a_naive_count():
    rng = np.random.default_rng(0)
    seeds = {"a": 1, "b": 3, "c": 2}
    tables = {name: (rng.random((n, 40)) < 0.5).astype(float) for name, n in seeds.items()}
    found = {one.methods: one for one in measure_disagreements(tables)}
    assert list(found) == [("b", "b"), ("c", "c"), ("a", "b"), ("a", "c"), ("b", "c")]
    for (first, second), one in found.items():
        pairs = [
            (left, right)
            for i, left in enumerate(tables[first])
            for j, right in enumerate(tables[second])
            if first != second or i < j
        ]
        shares = [sum(x != y for x, y in zip(*pair, strict=True)) / 40 for pair in pairs]
        assert one.num_pairs == len(pairs)
        assert one.share == pytest.approx(sum(shares) / len(shares))


def test_names_on_the_command_line_group_runs(tmp_path):
    folders = [
        write_evaluation(tmp_path / name, {"arc": draw(0.5, seed=n)}, seed=n)
        for n, name in enumerate(("lr=1e-4", "b", "c"))
    ]
    comparison = compare([f"r=8={folders[0]},{folders[1]}", folders[2]])
    assert [(m.label, m.seeds) for m in comparison.methods] == [("r=8", (0, 1)), ("c", (2,))]
    assert [m.label for m in compare(folders).methods] == ["lr=1e-4", "b", "c"]


def test_layers_are_told_apart(tmp_path):
    runs = [
        write_evaluation(tmp_path / f"{layer}", {"arc": [1, 0]}, method="MoDE", layer=layer)
        for layer in ("ensemble", 28, 29, "final")
    ]
    labels = [method.label for method in compare(runs).methods]
    assert labels == ["MoDE", "MoDE, layer 28", "MoDE, layer 29", "MoDE, final layer"]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"model": "x"}, "have the model base and x"),
        ({"protocol": "llm-adapters"}, "have the protocol default and llm-adapters"),
        ({"settings": "b2"}, "of M have the training settings with the hash a1 and b2"),
        ({"dtype": "bfloat16"}, "have the dtype float32 and bfloat16"),
        ({"top_k": 3}, "have the top_k None and 3"),
        ({"layer": "final"}, "have the layer ensemble and final"),
    ],
)
def test_seeds_of_a_method_differ_in_nothing_else(named, facts, message, tmp_path):
    common = {"method": "M", "settings": "a1", "dtype": "float32", "top_k": None}
    a = write_evaluation(tmp_path / "a", {"arc": [1, 0]}, **common)
    b = write_evaluation(tmp_path / "b", {"arc": [1, 0]}, **common | {"seed": 1} | facts)
    c = write_evaluation(tmp_path / "c", {"arc": [1, 0]}, method="M", seed=2)  # an older one
    runs = [f"M={a},{b}"] if named else [a, b]
    assert len(compare([f"A={a},{c}", f"B={b}"]).methods) == 2
    if facts.get("layer") and not named:
        assert len(compare(runs).methods) == 2
        return
    with pytest.raises(ValueError, match=f"{message}, in .*as `NAME=RUN`"):
        compare(runs)


def test_a_method_may_have_a_run_for_each_task(tmp_path):
    """One model per data set: the settings differ between tasks, and not between seeds."""
    folders = {
        (name, task, seed): write_evaluation(
            tmp_path / f"{name}-{task}-{seed}",
            {task: [1, 0, 1]},
            method=name,
            seed=seed,
            settings=f"{name} {task}",
        )
        for name in "AB"
        for task in ("arc", "boolq")
        for seed in (0, 1)
    }
    comparison = compare(list(folders.values()))
    assert [task.task for task in comparison.tasks] == ["arc", "boolq"]
    assert [method.seeds for method in comparison.methods] == [(0, 1, 0, 1)] * 2
    other = write_evaluation(
        tmp_path / "other", {"boolq": [1, 0, 1]}, method="A", seed=2, settings="A arc"
    )
    with pytest.raises(ValueError, match="of A have the training settings with the hash"):
        compare([*folders.values(), other])


def test_methods_are_evaluated_under_the_same_conditions(tmp_path):
    judge = {"judge": {"model": "gpt", "temperature": 0}, "num_records": 2}
    tasks = {"gsm8k": [1, 0], "truthfulqa_mc1": [0, 1]}

    def write(name, *, shots=None, data=None, **facts):
        data = {"gsm8k": {}, "truthfulqa": judge} if data is None else {"truthfulqa": data}
        return write_evaluation(tmp_path / name, tasks, shots=shots, data=data, **facts)

    base = write("base", shots={"gsm8k": 5}, num_fewshot=None, dtype="float32")
    same = write("same", shots={"gsm8k": 5}, num_fewshot=5, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"on truthfulqa_mc1 .*num_fewshot 0 and .* 5;"):
        compare([write("asked", num_fewshot=0), same], tasks=["truthfulqa_mc1"])
    said = notes(compare([base, same], tasks=["gsm8k"]))
    assert "The methods differ in dtype: float32 for base, bfloat16 for same." in said
    fewer = write("fewer", shots={"gsm8k": 0})
    with pytest.raises(ValueError, match=r"on gsm8k .*base has the num_fewshot 5 and .*fewer 0;"):
        compare([base, fewer])
    other = write("other", data=judge | {"judge": {"model": "qwen", "temperature": 0}})
    with pytest.raises(ValueError, match=r"mc1 .*base has the judge.model gpt and .*other qwen;"):
        compare([base, other])
    old = write("old", data={"num_records": 2})
    assert not [note for note in notes(compare([base, old])) if "differ in" in note]


def test_what_is_scored_without_reading_the_items(tmp_path):
    def choose(*choices, target):
        return {"target": target, "arguments": [["Why?", choice] for choice in choices]}

    yes, no = (choose(" no", " yes", target=target) for target in (1, 0))
    options = {"until": ["\n"]}
    questions = {
        "boolq": [yes, yes, yes, no],
        "arc": [choose("a", "b", "c", "d", target=2)]
        + [choose(text, "z", target=0) for text in "efg"],
        # No choice by place: the commonest answer counts as text.
        "places": [choose(*"ab", target=0), choose(*"ba", target=0), choose(*"ab", target=0)],
        "gsm8k": [{"target": text, "arguments": [["How many?", options]]} for text in "57789"],
        "mt_bench": [{}, yes],
        "winogrande": [{"target": "b", "arguments": [["a", "b"], ["c", "b"]]}],  # lm-eval's own
        "unlike": [{"target": 0, "arguments": [["How many?", options]]}],
        "rolling": [{"target": 1, "arguments": [["A text."], ["Another.", "b"]]}],
        "truthfulqa_mc2": [yes, yes],
        "strict": [{"target": "7", "arguments": [["How many?", options]]}],
    }
    scores = {task: [n % 2 for n in range(len(own))] for task, own in questions.items()}
    scores["truthfulqa_mc2"] = [0.3, 0.7]
    metrics = {"strict": "answered,none"}
    runs = [
        write_evaluation(tmp_path / name, scores, questions=questions, main_metric=metrics)
        for name in "ab"
    ]
    comparison = compare(runs)
    found = {row.task: row.blind_score for row in comparison.rows}
    assert found == {
        "boolq": 0.75,
        "arc": pytest.approx((1 / 4 + 3 / 2) / 4),
        "places": pytest.approx(2 / 3),
        "gsm8k": 2 / 5,
        "mt_bench": None,
        "winogrande": None,
        "unlike": None,
        "rolling": None,
        "truthfulqa_mc2": None,
        "strict": None,
        "average": None,
    }
    (said,) = (note for note in notes(comparison) if note.startswith("Without reading"))
    assert "75.0 % on boolq, 43.8 % on arc, 66.7 % on places, 40.0 % on gsm8k: by" in said
    assert not [n for n in notes(compare(runs, tasks=["mt_bench"])) if "Without reading" in n]


def test_items_without_a_rating_are_left_out(tmp_path):
    a = write_evaluation(tmp_path / "a", {"arc": [1, 0, None, 1], "boolq": [1, 0]})
    b = write_evaluation(tmp_path / "b", {"arc": [1, None, 0, 0], "boolq": [1, 1]})
    comparison = compare([a, b])
    task = comparison.tasks[0]
    assert (task.num_items, task.num_left_out) == (2, 2)
    assert [score.mean for score in task.scores] == [1, 0.5]
    assert comparison.average.num_left_out == 2
    assert "Items left out, since at least one run has no rating of them: 2 of arc." in notes(
        comparison
    )
    assert "left out" not in to_text(compare([a, b], tasks=["boolq"]))
    none = write_evaluation(tmp_path / "none", {"arc": [None, 1, None, None]})
    with pytest.raises(ValueError, match="on arc each of the 4 items lacks one in some run"):
        compare([b, none], tasks=["arc"])


def test_items_that_tasks_share_are_drawn_once(tmp_path):
    """Two metrics of the same answers say no more than one of them."""
    scores, changed = draw(0.5), draw(0.6, seed=1)

    def average(names):
        first = write_evaluation(tmp_path / names[1] / "a", dict.fromkeys(names, scores))
        second = write_evaluation(
            tmp_path / names[1] / "b", dict.fromkeys(names, changed), order=lambda n: range(n)[::-1]
        )
        score = compare([first, second]).average.scores[1]
        ends = score.difference.interval
        return score.interval.high - score.interval.low, ends.high - ends.low

    single = paired_difference(scores, changed).interval
    shared, apart = average(["qa+mc1", "qa+mc2"]), average(["arc", "boolq"])
    assert shared[0] == pytest.approx(2**0.5 * apart[0], rel=0.1)
    assert shared[1] == pytest.approx(2**0.5 * apart[1], rel=0.1)
    assert shared[1] == pytest.approx(single.high - single.low, rel=0.07)


def test_a_training_run_is_known_by_its_weights(tmp_path):
    """Evaluations in several folders, or of several layers, share the luck of their seeds."""
    runs = []
    for seed, share in enumerate((0.2, 0.5, 0.8)):
        for task, layer in (("arc", "ensemble"), ("boolq", "ensemble"), ("arc", 3), ("boolq", 3)):
            folder = tmp_path / f"{seed}-{task}-{layer}"
            scores = {task: np.arange(400) < 400 * share}
            facts = {"method": "M", "seed": seed, "layer": layer, "adapter_sha256": f"{seed}"}
            runs.append(write_evaluation(folder, scores, **facts))
    average = compare(runs).average
    assert average.scores[0].seed_means == pytest.approx((0.2, 0.5, 0.8))
    one = compare(runs, tasks=["arc"]).tasks[0].scores[0].interval
    both = average.scores[0].interval
    assert both.high - both.low == pytest.approx(one.high - one.low, rel=0.1)
    assert average.scores[1].difference.p_value == 1
    assert average.scores[1].difference.interval.high < 0.05


def test_a_run_has_one_evaluation(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "results.json").write_text("{}")
    (run / "evaluation").mkdir()
    with pytest.raises(OSError, match="holds no finished evaluation"):
        find_evaluation(run)
    first = write_evaluation(run / "evaluation" / "default", {"arc": [1]})
    assert find_evaluation(run) == first
    second = write_evaluation(run / "evaluation" / "default-layer-28", {"arc": [1]})
    with pytest.raises(ValueError, match=r"has 2; name one of .*default, .*default-layer-28"):
        find_evaluation(run)
    assert find_evaluation(second) == second
    with pytest.raises(OSError, match=r"neither results\.json nor evaluation/"):
        find_evaluation(tmp_path)


@pytest.mark.parametrize(
    ("tasks", "facts", "message"),
    [
        ({"arc": [1, 0, 1, 0]}, {}, "on arc .*other lacks 0 of the 3 items of .*has 1 others"),
        ({"arc": [1, 0]}, {}, "on arc .*other lacks 1 of the 3 items of .*has 0 others"),
        ({"boolq": [1, 0, 1]}, {}, "other lacks arc, which"),
        ({"arc": [1, 0, 1]}, {"main_metric": {"arc": "f1,none"}}, "has acc,none and .* f1,none"),
        ({"arc": [1, 0, 1]}, {"method": "base"}, "of base both have seed 0 on arc"),
        ({"arc": [1, 0, 1, None]}, {}, "has 1 others"),
        ({"arc": [1, 0, 9]}, {}, "acc,none is 9 for item 2 of arc"),
        ({"arc": [1, 0, "1"]}, {}, "acc,none is '1' for item 2"),
        ({"arc": [1, 0, float("nan")]}, {}, "acc,none is nan for item 2"),
    ],
)
def test_runs_that_cannot_be_compared(tasks, facts, message, tmp_path):
    base = write_evaluation(tmp_path / "base", {"arc": [1, 0, 1]})
    other = write_evaluation(tmp_path / "other", tasks, **facts)
    with pytest.raises(ValueError, match=message):
        compare([base, other])


def test_damaged_evaluations_are_named(tmp_path):
    folder = write_evaluation(tmp_path / "a", {"arc": [1, 0]})
    samples, results = folder / "samples_arc.jsonl", folder / "results.json"
    with pytest.raises(ValueError, match="none of them has boolq; they have arc"):
        compare([folder], tasks=["boolq"])
    with pytest.raises(ValueError, match="must name at least one evaluation"):
        compare([])
    with pytest.raises(ValueError, match="must have a name before the equals sign"):
        compare([f"={folder}"])
    text = samples.read_text()
    for damage, message in (
        ("", "must hold at least one item"),
        (text + text, "has item 0 twice"),
        (text + "{", "Cannot read line 5"),
        (text + "{}\n", "Line 5 of .* lacks doc_hash, doc_id, filter, metrics"),
    ):
        samples.write_text(damage)
        with pytest.raises(ValueError, match=message):
            load_evaluation(folder)
    samples.unlink()
    with pytest.raises(OSError, match=r"Cannot find .*samples_arc.jsonl"):
        load_evaluation(folder)
    results.write_text("[")
    with pytest.raises(ValueError, match=r"Cannot read .*results.json"):
        load_evaluation(folder)
    results.write_text('{"results": {}}')
    with pytest.raises(ValueError, match="does not say the method, model"):
        load_evaluation(folder)


@pytest.fixture
def hostile(tmp_path):
    """Compare two methods whose names hold every sign that some format gives a meaning."""
    runs = [
        write_evaluation(tmp_path / "a", {"arc_easy": draw(0.4)}, method=HOSTILE),
        write_evaluation(tmp_path / "b", {"arc_easy": draw(0.5, seed=1)}, method=HOSTILE + "2"),
    ]
    return compare(runs)


def test_a_rounded_zero_has_no_minus(tmp_path):
    runs = [
        write_evaluation(tmp_path / name, {"arc": np.arange(9000) % 7 == 0, "boolq": scores})
        for name, scores in (("a", [1, 1] + [0] * 8998), ("b", [0, 1] + [0] * 8998))
    ]
    text = to_text(compare(runs))
    assert re.search(r"\+0\.0 \(\+0\.0 to \+0\.0\) +1\.000 +1\.000", text)
    assert "-0.0" not in text


def test_json_and_csv_parse_back_to_the_same_numbers(hostile, runs):
    for comparison in (hostile, compare(runs)):
        saved = json.loads(to_json(comparison))
        lines = list(csv.DictReader(io.StringIO(to_csv(comparison))))
        scores = [(row, score) for row in comparison.rows for score in row.scores]
        rows = [*saved["tasks"], *([saved["average"]] if saved["average"] else [])]
        assert len(lines) == len(scores)
        parsed = [score for row in rows for score in row["scores"]]
        for line, entry, (row, score) in zip(lines, parsed, scores, strict=True):
            assert (line["task"], line["method"]) == (row.task, score.method)
            assert entry["method"] == score.method
            assert float(line["score"]) == entry["mean"] == score.mean
            assert Interval(**entry["interval"]) == score.interval
            ends = float(line["score_low"]), float(line["score_high"])
            assert Interval(*ends) == score.interval
            if score.difference is None:
                assert (line["difference"], line["p"], entry["difference"]) == ("", "", None)
                continue
            found = entry["difference"] | {"interval": Interval(**entry["difference"]["interval"])}
            assert PairedDifference(**found) == score.difference
            assert float(line["difference"]) == score.difference.estimate
            assert float(line["p"]) == score.difference.p_value
            assert float(line["p_holm"]) == score.adjusted_p_value
        assert tuple(saved["notes"]) == notes(comparison)
        assert saved["num_tests"] == comparison.num_tests


def test_latex_is_balanced_and_escaped(hostile):
    text = to_latex(hostile)
    assert "\n<" not in text
    begun = re.findall(r"\\begin\{(\w+)\}", text)
    assert begun == re.findall(r"\\end\{(\w+)\}", text) == ["tabular", "tabular"]
    bare = re.sub(r"\\[&%$#_{}\\]", "", text)  # without escaped signs
    depth = 0
    for sign in bare:
        depth += {"{": 1, "}": -1}.get(sign, 0)
        assert depth >= 0
    assert depth == 0
    assert re.findall(r"[#~^<>|_]", bare) == []
    assert bare.replace("$-$", "").count("$") == 0
    assert [line for line in bare.splitlines() if "%" in line] == [
        r"% Needs \usepackage{booktabs}."
    ]
    for table in re.findall(r"\\toprule(.*?)\\bottomrule", text, re.DOTALL):
        lines = [line for line in table.splitlines() if line.endswith("\\\\")]
        cells = {len(re.findall(r"(?<!\\)&", line)) for line in lines}
        assert len(lines) > 2
        assert len(cells) == 1
    assert "LoRA\\_¬K \\& 50 \\% \\textbar{} \\$x\\textasciicircum{}2\\$" in text


def test_markdown_keeps_its_columns(hostile):
    lines = [line for line in to_markdown(hostile).splitlines() if line.startswith("|")]
    tables = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
    assert set(tables) == {9, 5}
    assert "\\<b\\>\\[red\\]\\`\\*" in to_markdown(hostile)
    assert "80" in to_markdown(hostile)


def test_the_printed_table_says_all(runs, hostile):
    text = to_text(compare(runs))
    assert re.search(r"arc +80 +LoRA_¬K +1 +\d+\.\d \(\d+\.\d to \d+\.\d\) +- +- +-", text)
    assert re.search(r"LoRA_¬K \+ MoDE +3 .*[+]\d+\.\d \([+-]\d+\.\d to [+]\d+\.\d\)", text)
    assert re.search(r"average +130", text)
    for words in (
        "McNemar's exact test",
        "corrected for all 3 comparisons",
        "One seed means one seed: for LoRA_¬K, nothing",
        "more than half of the seeds",
        "same weight",
        "Metrics: arc acc,none; gsm8k acc,none.",
        "solved by these methods alone",
    ):
        assert words in text
    assert "[red]" in to_text(hostile)
    assert "nothing to correct for" in to_text(hostile)
    alone = to_text(compare(runs[:1]))
    assert "McNemar" not in alone
    assert "solved by" not in alone


def test_the_command_prints_and_writes(runs, tmp_path, capsys):
    output = tmp_path / "out"
    command = ["compare", *map(str, runs), "--tasks", "arc", "--output", str(output)]
    assert depthmix_cli.main(command) == 0
    shown = capsys.readouterr().out
    comparison = compare(runs, tasks=["arc"])
    assert f"\n\n{to_text(comparison)}" in shown
    names = ["comparison.csv", "comparison.json", "comparison.md", "comparison.tex"]
    assert sorted(path.name for path in output.iterdir()) == names
    assert (output / "comparison.md").read_text("utf-8") == to_markdown(comparison)
    (output / "comparison.tex").write_text("mine")
    (output / "comparison.csv").unlink()
    assert depthmix_cli.main(command) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (output / "comparison.tex").read_text() == "mine"
    assert not (output / "comparison.csv").exists()
    assert depthmix_cli.main([*command, "--overwrite"]) == 0
    assert write_tables(comparison, output, overwrite=True)[0] == output / "comparison.json"
    assert depthmix_cli.main(["compare", str(tmp_path / "none")]) == 1
    assert "run `depthmix evaluate" in capsys.readouterr().err
