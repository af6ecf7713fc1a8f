"""Evaluation of models on named benchmarks and own records: results, resumption, depth."""

from __future__ import annotations

import errno
import json
import sqlite3
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

pytest.importorskip("lm_eval")

import depthmix.evaluation.harness
from adapters import OPTIONS, redrawn
from checkpoints import make_model, make_tokenizer, save_checkpoint
from data_folder import small_data  # noqa: F401  (a fixture)
from depthmix import MoDEConfig, attach
from depthmix.comparison.comparison import compare
from depthmix.evaluation import mt_bench
from depthmix.evaluation.conversations import MTBenchSpec
from depthmix.evaluation.harness import evaluate, evaluate_all
from depthmix.evaluation.harness_model import HarnessModel
from depthmix.evaluation.judge import JudgeSpec
from depthmix.evaluation.plan import EvaluationPlan, read_plan
from depthmix.evaluation.tasks import TASKS
from depthmix.models.sources import find_models
from depthmix.models.spec import ModelSpec
from judge_server import Reply, serve
from models import randomise, tiny_model

JUDGE = JudgeSpec(model="judge")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_checkpoint(tmp_path_factory.mktemp("model"))
    tokenizer = make_tokenizer()
    options = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    tiny_model("llama", max_position_embeddings=1024, **options).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """Two seeds of MoDE and a plain adapter, as training leaves them."""
    folder = tmp_path_factory.mktemp("runs")
    adapters = {"mode-0": (MoDEConfig(**OPTIONS), 0), "mode-1": (MoDEConfig(**OPTIONS), 1)}
    adapters["lora"] = (LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), 0)
    for name, (config, seed) in adapters.items():
        base = make_model(make_tokenizer())
        base.name_or_path = str(model)
        redrawn(get_peft_model(base, config), seed=seed + 5).save_pretrained(folder / name)
        run = {"model": {"name": str(model)}, "mode": {"adapt": "below"}}
        run["training"] = {"seed": seed, "output_dir": str(folder / name)}
        (folder / name / "run_config.json").write_text(json.dumps(run), "utf-8")
    return folder


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [
        {"prompt": f"{n} + 1 =", "choices": [f" {n + 1}", " no"], "answer": n % 2} for n in range(9)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def section(folder):
    return ModelSpec(name=str(folder), dtype="float32")


def read_samples(folder):
    return {
        path.name: [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for path in sorted(Path(folder).glob("samples_*.jsonl"))
    }


def without_times(results):
    kept = {"results", "configs", "versions", "n-samples", "group_subtasks", "depthmix"}
    kept = {key: results[key] for key in kept}
    return {**kept, "depthmix": {k: v for k, v in results["depthmix"].items() if k != "seconds"}}


@pytest.fixture
def short_answers(monkeypatch):
    """End answers after a few tokens."""
    generate = HarnessModel._model_generate

    def shortened(self, context, max_length, stop, **options):
        return generate(self, context, context.shape[1] + 4, stop, **options)

    monkeypatch.setattr(HarnessModel, "_model_generate", shortened)


@pytest.mark.parametrize("protocol", ["default", "llm-adapters"])
@pytest.mark.usefixtures("short_answers")
def test_every_named_set_is_evaluated(model, small_data, tmp_path, protocol):  # noqa: F811
    plan = EvaluationPlan(
        tasks=("all",),
        protocol=protocol,
        data_dir=str(small_data),
        num_fewshot=0 if protocol == "default" else None,
    )
    results = evaluate(section(model), plan, output_dir=tmp_path / "out")
    assert set(results["depthmix"]["data"]) == set(TASKS[protocol])
    for task, metric in results["depthmix"]["main_metric"].items():
        assert 0 <= results["results"][task][metric] <= 1
        assert (tmp_path / "out" / f"samples_{task}.jsonl").is_file()
    assert json.loads((tmp_path / "out" / "results.json").read_text("utf-8")).keys() >= {
        "results",
        "configs",
        "versions",
        "n-samples",
        "higher_is_better",
        "depthmix",
    }
    compared = {row.task for row in compare([tmp_path / "out"]).tasks}
    assert "mmlu_algebra" not in compared
    assert ("mmlu_stem" in compared) == (protocol == "default")


def test_what_was_measured_is_told(runs, small_data, tmp_path):  # noqa: F811
    plan = EvaluationPlan(tasks=("arc_easy",), data_dir=str(small_data), limit=1, layer=3)
    ours = evaluate(section(runs / "mode-1"), plan, output_dir=tmp_path / "out")["depthmix"]
    assert ours["method"] == "LoRA_¬K + MoDE"
    assert (ours["run"], ours["seed"], ours["layer"], ours["limit"]) == ("mode-1", 1, 3, 1)
    assert len(ours["adapter_sha256"]) == 64
    assert ours["data"]["arc_easy"]["num_records"] == 2
    assert ours["data"]["arc_easy"]["source"].startswith("arc-easy/test.json (sha256 ")


def test_an_interrupted_evaluation_goes_on_where_it_stopped(
    model,
    records,
    small_data,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    plan = EvaluationPlan(
        tasks=("arc_easy",),
        records=records,
        metric="choices",
        data_dir=str(small_data),
        batch_size=2,
    )
    whole = evaluate(section(model), plan, output_dir=tmp_path / "whole")
    seen, limit = [], 7
    run = HarnessModel._model_call

    def counted(self, inputs, *args, **kwargs):
        if len(seen) == limit:
            raise KeyboardInterrupt
        seen.append(len(inputs))
        return run(self, inputs, *args, **kwargs)

    monkeypatch.setattr(HarnessModel, "_model_call", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(section(model), plan, output_dir=tmp_path / "broken")
    limit = 100
    again = evaluate(section(model), plan, output_dir=tmp_path / "broken")
    assert sum(seen) == 8 + 2 * 9  # the choices of two questions of ARC, of nine own records
    assert without_times(again) == without_times(whole)
    assert read_samples(tmp_path / "broken") == read_samples(tmp_path / "whole")
    monkeypatch.setattr(depthmix.evaluation.harness, "load_model", None)  # nothing is left to run
    assert evaluate(section(model), plan, output_dir=tmp_path / "broken") == again


def test_tasks_can_be_added_to_an_evaluation(model, small_data, tmp_path):  # noqa: F811
    for tasks in (("arc_easy",), ("arc_easy", "openbookqa")):
        plan = EvaluationPlan(tasks=tasks, data_dir=str(small_data))
        results = evaluate(section(model), plan, output_dir=tmp_path / "out")
        assert tuple(results["results"]) == tasks


def test_another_evaluation_is_not_mixed_in(model, runs, small_data, tmp_path):  # noqa: F811
    common = {"tasks": ("arc_easy",), "data_dir": str(small_data)}
    first = evaluate(section(model), EvaluationPlan(**common), output_dir=tmp_path / "out")
    limited = EvaluationPlan(**common, limit=1)
    with pytest.raises(FileExistsError, match=r"another `limit` \(None, now 1\)"):
        evaluate(section(model), limited, output_dir=tmp_path / "out")
    with pytest.raises(FileExistsError, match="another `adapter_sha256`"):
        evaluate(section(runs / "lora"), EvaluationPlan(**common), output_dir=tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert stored["depthmix"] == first["depthmix"]
    evaluate(section(model), limited, output_dir=tmp_path / "out", overwrite=True)
    assert len(read_samples(tmp_path / "out")["samples_arc_easy.jsonl"]) == 1
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "evaluation.tmp").write_text("{")  # what an interruption may leave
    evaluate(section(model), limited, output_dir=tmp_path / "half")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="holds other files"):
            evaluate(section(model), limited, output_dir=tmp_path / "mine", overwrite=overwrite)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_the_same_adapter_under_another_name_goes_on(runs, records, tmp_path, monkeypatch):
    plan = EvaluationPlan(records=records, metric="choices", limit=2)
    first = evaluate(section(runs / "mode-0"), plan, output_dir=tmp_path / "out")
    monkeypatch.chdir(runs)
    monkeypatch.setattr(depthmix.evaluation.harness, "load_model", None)  # nothing is left to run
    assert evaluate(section("mode-0"), plan, output_dir=tmp_path / "out") == first


def test_a_model_that_changed_is_evaluated_anew(tmp_path, records):
    folder, scores = save_checkpoint(tmp_path / "model"), []
    plan = EvaluationPlan(records=records, metric="choices")
    for seed, overwrite in ((0, False), (1, True)):
        weights = make_model(make_tokenizer())
        randomise(weights, seed=seed)
        weights.save_pretrained(folder)
        if overwrite:
            with pytest.raises(FileExistsError, match="another `weights`"):
                evaluate(section(folder), plan, output_dir=tmp_path / "out")
        evaluate(section(folder), plan, output_dir=tmp_path / "out", overwrite=overwrite)
        samples = read_samples(tmp_path / "out")["samples_records.jsonl"]
        scores.append([float(r[0]) for s in samples for r in s["filtered_resps"]])
    assert scores[0] != scores[1]


def test_overwriting_removes_nothing_else(model, records, tmp_path):
    out = tmp_path / "out"
    plan = EvaluationPlan(records=records, metric="choices")
    evaluate(section(model), plan, output_dir=out)
    (out / "inner").mkdir()
    (out / "inner" / "results.json").write_text("{}")
    (out / "judge_cache").mkdir()
    evaluate(section(model), replace(plan, limit=1), output_dir=out, overwrite=True)
    assert len(read_samples(out)["samples_records.jsonl"]) == 1
    assert (out / "inner" / "results.json").read_text() == "{}"
    assert (out / "judge_cache").is_dir()


def test_a_saved_mixture_is_evaluated_with_it(records, tmp_path):
    base = make_model(make_tokenizer())
    norm = attach(base, late_layers=3, router_init="gaussian")
    randomise(norm.mixture, only_trainable=True)
    base.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    plan = EvaluationPlan(records=records, metric="choices")
    scores = []
    for layer in ("ensemble", "final"):
        one = replace(plan, layer=layer)
        results = evaluate(section(tmp_path / "model"), one, output_dir=tmp_path / layer)
        assert results["depthmix"]["method"] == "MoDE"
        samples = read_samples(tmp_path / layer)["samples_records.jsonl"]
        scores.append([float(r[0]) for s in samples for r in s["filtered_resps"]])
    assert scores[0] != scores[1]


def test_every_metric_has_an_interval(model, records, tmp_path):
    plan = EvaluationPlan(records=records, metric="choices")
    results = evaluate(section(model), plan, output_dir=tmp_path / "out")
    intervals = results["depthmix"]["intervals"]["records"]
    assert set(intervals) == {"acc,none", "acc_norm,none", "acc_bytes,none", "nll,none"}
    low, high = intervals.pop("nll,none")
    assert low < results["results"]["records"]["nll,none"] < high
    for metric, (low, high) in intervals.items():
        assert 0 <= low <= results["results"]["records"][metric] <= high <= 1
        assert high - low > 0.3  # of nine items


def test_a_layer_answers_alone(runs, records, tmp_path):
    scores = {}
    for layer in ("ensemble", "final", 2, 3, 4):
        plan = EvaluationPlan(records=records, metric="choices", layer=layer)
        folder = tmp_path / str(layer)
        evaluate(section(runs / "mode-0"), plan, output_dir=folder)
        samples = read_samples(folder)["samples_records.jsonl"]
        scores[layer] = torch.tensor([[float(r[0]) for r in s["filtered_resps"]] for s in samples])
    assert torch.equal(scores["final"], scores[4])
    for layer in ("ensemble", 2, 3):
        assert not torch.allclose(scores[layer], scores["final"])


def test_top_k_may_be_set_for_an_evaluation(runs, records):
    plan = EvaluationPlan(records=records, metric="choices")
    scores = []
    for top_k in (2, 1):
        one = ModelSpec(name=str(runs / "mode-1"), dtype="float32", top_k=top_k)
        assert evaluate(one, plan)["depthmix"]["top_k"] == top_k
        folder = runs / "mode-1" / "evaluation" / f"default-top-{top_k}"
        samples = read_samples(folder)["samples_records.jsonl"]
        scores.append([float(r[0]) for s in samples for r in s["filtered_resps"]])
    assert scores[0] != scores[1]
    with pytest.raises(ValueError, match="`top_k` must be between 1 and the 3 routes"):
        evaluate(ModelSpec(name=str(runs / "mode-1"), top_k=4), plan)
    with pytest.raises(ValueError, match="needs an active mixture"):
        evaluate(ModelSpec(name=str(runs / "lora"), top_k=1), plan)


def test_own_records_by_generated_answers(model, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"prompt": "2 + 1 =", "answer": "3"}) + "\n", "utf-8")
    plan = EvaluationPlan(records=str(path))
    results = evaluate(section(model), plan, output_dir=tmp_path / "out")
    assert results["depthmix"]["main_metric"] == {"records": "exact_match,stated"}
    (sample,) = read_samples(tmp_path / "out")["samples_records.jsonl"]
    assert sample["target"] == "3"


@pytest.mark.parametrize(
    ("task", "reply", "value"),
    [("mt_bench", "Rating: [[7]]", 7), ("truthfulqa_judged", "[[yes]]", 1)],
)
def test_judged_benchmarks_are_evaluations_like_others(
    model,
    small_data,  # noqa: F811
    tmp_path,
    monkeypatch,
    task,
    reply,
    value,
):
    pytest.importorskip("openai")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(mt_bench, "MTBenchSpec", partial(MTBenchSpec, max_new_tokens=8))
    with serve(lambda _body, _number: Reply(content=reply)) as server:
        plan = EvaluationPlan(tasks=(task,), data_dir=str(small_data), judge=server.section())
        results = evaluate(section(model), plan, output_dir=tmp_path / "out")
        num_requests = len(server.bodies)
        assert evaluate(section(model), plan, output_dir=tmp_path / "out") == results
        assert len(server.bodies) == num_requests > 0
        other = replace(plan, judge=server.section(model="another"))
        evaluate(section(model), other, output_dir=tmp_path / "out")
        assert len(server.bodies) == 2 * num_requests
    metric = results["depthmix"]["main_metric"][task]
    assert results["results"][task][metric] == value
    (row,) = compare([tmp_path / "out"]).tasks
    assert (row.task, row.scores[0].mean) == (task, value / (10 if task == "mt_bench" else 1))


def test_own_records_may_be_instructions_and_may_change(model, tmp_path):
    path, prompts = tmp_path / "own.jsonl", []
    for question in ("Add 2 and 1.", "Add 2 and 2."):
        path.write_text(json.dumps({"instruction": question, "answer": "3"}) + "\n", "utf-8")
        evaluate(section(model), EvaluationPlan(records=str(path)), output_dir=tmp_path / "out")
    for name in ("records", "records_own"):
        (sample,) = read_samples(tmp_path / "out")[f"samples_{name}.jsonl"]
        prompts.append(sample["arguments"][0][0])
    for prompt, question in zip(prompts, ("Add 2 and 1.", "Add 2 and 2."), strict=True):
        assert prompt.startswith("Below is an instruction")
        assert question in prompt


def test_a_folder_of_runs_stands_for_its_runs(runs, records):
    assert [Path(found.name).name for found in find_models(section(runs))] == [
        "lora",
        "mode-0",
        "mode-1",
    ]
    plan = EvaluationPlan(records=records, metric="choices", limit=4)
    folders = list(evaluate_all([str(runs)], plan, dtype="float32"))
    assert folders == [
        runs / name / "evaluation" / "default" for name in ("lora", "mode-0", "mode-1")
    ]
    comparison = compare(folders)
    assert [(method.label, method.seeds) for method in comparison.methods] == [
        ("LoRA_¬K", (0,)),
        ("LoRA_¬K + MoDE", (0, 1)),
    ]


def test_models_of_the_same_name_are_refused(model, records, tmp_path):
    plan = EvaluationPlan(records=records, metric="choices")
    with pytest.raises(ValueError, match="`models` must have different names"):
        list(evaluate_all([str(model), str(model)], plan, output=tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "`tasks` must name at least one data set"),
        ({"tasks": ("arc_easy",), "limit": 0}, "`limit` must be at least 1"),
        ({"tasks": ("mt_bench",)}, "names mt_bench, whose answers a judge must rate"),
        ({"tasks": ("arc_easy",), "judge": JUDGE}, "`judge` is for mt_bench and"),
        ({"tasks": ("arc_easy",), "mt_bench": MTBenchSpec()}, "`tasks` does not name it"),
        ({"tasks": ("arc_easy",), "metric": "choices"}, "are for own `records`"),
        ({"records": "own.jsonl", "num_fewshot": 2}, "have no effect on records"),
        ({"tasks": ("mt_bench",), "judge": JUDGE, "protocol": "llm-adapters"}, "on mt_bench"),
        ({"tasks": ("gsm8k",), "num_fewshot": -1}, "`num_fewshot` must be at least 0"),
    ],
)
def test_plans_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        EvaluationPlan(**options)


def test_plans_are_read_from_text():
    plan = read_plan({"tasks": "mt_bench, svamp", "layer": 28, "judge": {"model": "m"}})
    assert (plan.tasks, plan.layer) == (("mt_bench", "svamp"), 28)
    assert plan.judge is not None
    assert plan.judge.model == "m"
    with pytest.raises(ValueError, match=r"`judge.modell`.*did you mean `model`"):
        read_plan({"tasks": "mt_bench", "layer": "final", "judge": {"modell": "m"}})


def test_an_unknown_task_is_named_before_the_model_is_loaded(tmp_path):
    plan = EvaluationPlan(tasks=("arc_esay",))
    with pytest.raises(ValueError, match="did you mean `arc_easy`"):
        evaluate(section(tmp_path / "nothing"), plan, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def write_records(path, num_rows):
    """Write records to choose an answer from; give the file's name."""
    rows = [
        {"prompt": f"{n} + 3 =", "choices": [f" {n + 3}", " no"], "answer": 0}
        for n in range(num_rows)
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def test_other_records_are_kept_beside_the_first(model, records, tmp_path):
    out, second = tmp_path / "out", write_records(tmp_path / "my second.jsonl", 3)
    third = write_records(tmp_path / "inner" / "my second.jsonl", 2)  # the same name
    plan = EvaluationPlan(records=records, metric="choices")
    first = evaluate(section(model), plan, output_dir=out)["results"]["records"]
    evaluate(section(model), replace(plan, records=second), output_dir=out)
    results = evaluate(section(model), replace(plan, records=third), output_dir=out)
    assert results["results"]["records"] == first
    numbers = {name: len(samples) for name, samples in read_samples(out).items()}
    (hashed,) = {name for name in results["results"] if "my_second_" in name}
    assert numbers == {
        "samples_records.jsonl": 9,
        "samples_records_my_second.jsonl": 3,
        f"samples_{hashed}.jsonl": 2,
    }
    sources = {name: entry["source"] for name, entry in results["depthmix"]["data"].items()}
    assert sources.pop("records") == "own.jsonl"
    assert set(sources.values()) == {"my second.jsonl"}
    stamps = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    for name in (records, second, third):  # nothing is left to do
        evaluate(section(model), replace(plan, records=name), output_dir=out)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == stamps
    compared = compare([out])
    assert {one.task for one in compared.tasks} >= {"records", "records_my_second", hashed}


def test_another_metric_of_the_same_records_is_kept_beside_the_first(model, records, tmp_path):
    rows = [{"prompt": f"{n} =", "answer": str(n), "choices": ["a", "b"]} for n in range(2)]
    answers = [{**row, "answer": 0} for row in rows]
    path = tmp_path / "both.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in answers), "utf-8")
    plan = EvaluationPlan(records=str(path), metric="choices")
    evaluate(section(model), plan, output_dir=tmp_path / "out")
    same = evaluate(section(model), replace(plan, template="plain"), output_dir=tmp_path / "out")
    assert set(same["results"]) == {"records"}  # what `auto` takes for them
    other = replace(plan, template="alpaca")
    results = evaluate(section(model), other, output_dir=tmp_path / "out")
    assert set(results["results"]) == {"records", "records_both"}


def test_an_interrupted_overwriting_goes_on(model, records, tmp_path, monkeypatch):
    out = tmp_path / "out"
    plan = EvaluationPlan(records=records, metric="choices")
    evaluate(section(model), plan, output_dir=out)
    unlink = Path.unlink

    def interrupt(self, *args, **kwargs):
        unlink(self, *args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", interrupt)
        with pytest.raises(KeyboardInterrupt):
            evaluate(section(model), replace(plan, limit=1), output_dir=out, overwrite=True)
    assert not (out / "results.json").exists()
    evaluate(section(model), replace(plan, limit=1), output_dir=out, overwrite=True)
    assert len(read_samples(out)["samples_records.jsonl"]) == 1


@pytest.mark.parametrize("moment", ["settings", "cache", "results"])
def test_a_full_disk_is_said_in_a_sentence(moment, model, records, tmp_path, monkeypatch):
    def fill(*_args, **_options):
        if moment == "cache":
            raise sqlite3.OperationalError("database or disk is full")
        raise OSError(errno.ENOSPC, "No space left on device")

    place = {
        "settings": "depthmix.evaluation.folder.write_whole",
        "cache": "sqlitedict.SqliteDict",
        "results": "depthmix.evaluation.folder.EvaluationFolder.add",
    }[moment]
    plan, out = EvaluationPlan(records=records, metric="choices"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(place, fill)
        with pytest.raises(
            OSError, match=r"`output` must be a place with room, and .* \(.+full|No"
        ):
            evaluate(section(model), plan, output_dir=out)
    results = evaluate(section(model), plan, output_dir=out)
    assert results["n-samples"]["records"]["effective"] == 9
