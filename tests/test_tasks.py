"""Tasks: every named set under every protocol, against lm-eval's own tasks and fixed outputs."""

import tomllib
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from checkpoints import make_tokenizer
from models import tiny_model

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from depthmix.data.catalog import describe
from depthmix.data.forms import ALPACA_PROMPT
from depthmix.evaluation.answers import is_correct
from depthmix.evaluation.harness_model import HarnessModel
from depthmix.evaluation.tasks import PROTOCOLS, TASKS, main_metric, records_config, task_config
from depthmix.evaluation.tasks.configs import BUILTIN, OURS, THEIRS

CHOICES = {"text": ["ice", "a hot fire", "rain"], "label": ["A", "B", "C"]}
TARGETS = {"choices": ["Yes, it is", "No", "Never"], "labels": [1, 0, 0]}


def number(question, answer, **fields):
    return {"question": question, "answer": answer, "instruction": f"{question} ", **fields}


NUMBERS = [number(" 3 + 4?", "7.0"), number("3 / 4?", "0.75"), number("1 - 4?", "-3.0")]
ARC = [{"question": q, "choices": CHOICES, "answerKey": "B", "instruction": q} for q in "abc"]
RECORDS = {
    **dict.fromkeys(["addsub", "mawps", "multiarith", "singleeq", "svamp"], NUMBERS),
    "gsm8k": [number("3 + 4?", "#### 7"), number("3 * 4?", "3 * 4 = 12\n#### 12")] * 3,
    "aqua": [number("1 + 1?", "B", options=[str(n) for n in range(1, 6)])] * 3,
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "openbookqa": [
        {"question_stem": q, "choices": CHOICES, "answerKey": "C", "instruction": q} for q in "abc"
    ],
    "boolq": [
        {"question": q, "passage": "", "label": 1, "instruction": f"true or false: {q}?"}
        for q in ("is ice cold", "is fire cold", "is rain wet")
    ],
    "hellaswag": [
        {
            "ind": n,
            "activity_label": "Cooking",
            "ctx_a": "A cook stirs.",
            "ctx_b": "the cook",
            "ctx": "A cook stirs. the cook",
            "endings": ["eats [title] it.", "flies  off.", "sings.", "stirs on."],
            "label": n,
        }
        for n in range(3)
    ],
    "truthfulqa": [
        {"question": q, "mc1_targets": TARGETS, "mc2_targets": TARGETS} for q in ("Is it?", "So?")
    ],
    "mmlu_stem": [
        {"question": f"{subject} {n}?", "subject": subject, "choices": list("wxyz"), "answer": n}
        for subject in describe("mmlu_stem").hub.configs
        for n in range(3)
    ],
}


@pytest.fixture(autouse=True)
def records(monkeypatch):
    def load_split(name, split="test", *, data_dir=None):
        assert split in ("test", "train", "dev")
        return [dict(record) for record in RECORDS[name]]

    for module in ("hooks", "configs"):
        monkeypatch.setattr(f"depthmix.evaluation.tasks.{module}.load_split", load_split)
    return RECORDS


@pytest.fixture(autouse=True)
def no_survey(monkeypatch):
    """Keep lm-eval from describing the machine, which lists every installed package."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
    )


class Parrot(LM):
    """A model that answers each prompt with the next of some fixed texts."""

    def __init__(self, texts):
        super().__init__()
        self.texts = iter(texts)

    def generate_until(self, requests):
        return [next(self.texts) for _ in requests]

    def loglikelihood(self, requests):
        raise AssertionError("these tasks ask for generated text alone")

    loglikelihood_rolling = loglikelihood


def run(model, configs, **options):
    return simple_evaluate(
        model=model,
        tasks=configs,
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        **options,
    )


def answer(name, texts, protocol="default"):
    """Evaluate fixed texts; give the aggregates and the extracted answers."""
    results = run(Parrot(texts), task_config(name, protocol=protocol))
    ((task, metrics),) = results["results"].items()
    by_filter = [s for s in results["samples"][task] if s["filter"] in ("strict", "llm-adapters")]
    return metrics, [sample["filtered_resps"][0] for sample in by_filter]


def load(config):
    """Build a task and its requests."""
    (task,) = TaskManager(include_defaults=False).load([config])["tasks"].values()
    task.set_fewshot_seed(1234)
    task.build_all_requests(rank=0, world_size=1)
    return [(instance.doc_id, instance.args) for instance in task.instances]


@pytest.mark.parametrize(
    ("protocol", "name"), [(protocol, name) for protocol in PROTOCOLS for name in TASKS[protocol]]
)
def test_every_task_runs(model, tokenizer, protocol, name):
    configs = task_config(name, protocol=protocol)
    lm = HarnessModel(pretrained=model, tokenizer=tokenizer, batch_size=8)
    results = run(lm, configs, gen_kwargs={"max_gen_toks": 3})
    names = [config["task"] for config in configs]
    assert list(results["results"]) == names
    for task in names:
        kind, filter_name = main_metric(results["configs"][task]).split(",")
        assert 0 <= results["results"][task][f"{kind},{filter_name}"] <= 1
        samples = [s for s in results["samples"][task] if s["filter"] == filter_name]
        per_task = 3 if name == "mmlu_stem" else len(RECORDS[name])
        assert [sample["doc_id"] for sample in samples] == list(range(per_task))
        assert results["configs"][task]["dataset_kwargs"]["name"] == name
        assert results["configs"][task].get("dataset_path") is None
    if protocol == "llm-adapters":
        assert names == [f"{name}_llm_adapters"]
    elif name not in ("truthfulqa", "mmlu_stem"):
        assert names == [name]


@pytest.mark.parametrize("name", sorted(set(BUILTIN)))
@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_requests_are_those_of_lm_evals_own_task(monkeypatch, name, num_fewshot):
    if name == "boolq":
        told = [{**record, "passage": "Ice is cold."} for record in RECORDS["boolq"]]
        monkeypatch.setitem(RECORDS, "boolq", told)
    if name == "truthfulqa" and num_fewshot:
        pytest.skip("its prompt brings its own examples")
    ours = task_config(name, num_fewshot=num_fewshot)
    assert len(ours) == len(BUILTIN[name])
    for config, path in list(zip(ours, BUILTIN[name], strict=True))[:3]:
        theirs = load_yaml(THEIRS / path)
        docs = RECORDS[name]
        if name == "mmlu_stem":
            docs = [doc for doc in docs if doc["subject"] == theirs["dataset_name"]]
        splits = dict.fromkeys(["train", "validation", "test", "dev"], Dataset.from_list(docs))
        theirs |= {"custom_dataset": lambda splits=splits, **_: splits, "num_fewshot": num_fewshot}
        if name == "gsm8k":
            theirs["generation_kwargs"] |= {"num_beams": 1, "repetition_penalty": 1.0}
        requests = load(theirs)
        assert load(config) == requests
        assert len(requests) >= len(docs)


def test_boolq_without_passages_is_closed_book():
    (config,) = task_config("boolq")
    assert config["task"] == "boolq"
    assert config["metadata"]["closed_book"]
    assert load(config)[0][1] == ("Question: is ice cold?\nAnswer:", " no")


def test_numbers_are_judged_strictly():
    metrics, answers = answer("svamp", [" The answer is $7.00.", "It is 3/4", "#### -3"])
    assert answers == ["7", "[invalid]", "-3"]
    assert metrics["exact_match,strict"] == pytest.approx(2 / 3)
    assert metrics["answered,strict"] == pytest.approx(2 / 3)
    metrics, _ = answer("svamp", ["8", "3/4", "none"])
    assert metrics["exact_match,strict"] == pytest.approx(1 / 3)


def test_aqua_lists_its_options_and_wants_a_letter():
    (config,) = task_config("aqua")
    (context, _) = load(config)[0][1]
    assert context.endswith("\nAnswer Choices: (A) 1 (B) 2 (C) 3 (D) 4 (E) 5\nAnswer:")
    metrics, answers = answer("aqua", ["The answer is (B).", "By D", " (C) 3"])
    assert answers == ["B", "[invalid]", "C"]
    assert metrics["exact_match,strict"] == pytest.approx(1 / 3)
    assert metrics["answered,strict"] == pytest.approx(2 / 3)


def test_gsm8k_has_the_strict_extraction_beside_lm_evals_own():
    texts = ["The answer is 7.", "#### 12", "7", "I think 5", "", "12."]
    results = run(Parrot(texts), task_config("gsm8k"))["results"]["gsm8k"]
    assert results["exact_match,strict"] == pytest.approx(4 / 6)
    assert results["exact_match,strict-match"] == pytest.approx(1 / 6)
    assert results["exact_match,flexible-extract"] == pytest.approx(4 / 6)
    assert results["answered,strict"] == pytest.approx(4 / 6)
    assert results["answered,strict-match"] == pytest.approx(1 / 6)
    assert results["answered,flexible-extract"] == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("name", "texts", "answers", "accuracy"),
    [
        ("svamp", ["so 1,0 or 7", "0.7505", "2-3"], ["7", "0.7505", "-3"], 1),
        ("gsm8k", ["7.0009", "12.1", "", "12", "so 7", "no"], None, 1 / 2),
        ("aqua", ["By All means C", "So E", "b"], ["B", "E", "[invalid]"], 1 / 3),
        ("arc_easy", ["answer2", "not answer1 but answer2", ""], None, 1 / 3),
        ("openbookqa", ["answer3"] * 3, None, 1),
        (
            "boolq",
            ["untrue", "it is false, not true", "yes"],
            ["true", "false", "[invalid]"],
            1 / 3,
        ),
        ("hellaswag", ["ending1", "ending2", "ending4"], None, 2 / 3),
    ],
)
def test_llm_adapters_judgement(name, texts, answers, accuracy):
    metrics, extracted = answer(name, texts, "llm-adapters")
    assert metrics["exact_match,llm-adapters"] == pytest.approx(accuracy)
    assert answers in (None, extracted)


def test_llm_adapters_prompts_and_searches_as_the_original():
    (config,) = task_config("addsub", protocol="llm-adapters")
    context, options = load(config)[0][1]
    assert context == ALPACA_PROMPT.format(instruction=" 3 + 4? ")
    assert (options["num_beams"], options["do_sample"], options["max_gen_toks"]) == (4, False, 256)
    (config,) = task_config("boolq", protocol="llm-adapters")
    assert load(config)[0][1][1] == {**options, "max_gen_toks": 32}


def search(lm, prompts):
    """Let lm-eval search for continuations with two beams, without stop strings of its own."""
    rows = [{"prompt": prompt, "answer": "?"} for prompt in prompts]
    (config,) = records_config(rows, metric="exact_match", max_new_tokens=12)
    config["generation_kwargs"]["num_beams"] = 2
    samples = run(lm, [config])["samples"]["records"]
    return [sample["resps"][0][0] for sample in samples]


def test_beam_search_does_not_depend_on_the_batch(tokenizer):
    # The end is likely, so that beams end at different times. Here lm-eval's own model gives the
    # last prompt of four no text at all.
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=4096, seed=3)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 3
    prompts = [f"Prompt {n}: {'x' * n}" for n in range(8)]
    options = {"pretrained": model, "tokenizer": tokenizer}
    batched = search(HarnessModel(**options, batch_size=4), prompts)
    assert batched == search(HarnessModel(**options, batch_size=1), prompts)
    assert len(set(batched)) > 1


def test_the_yaml_files_serve_lm_evals_own_command_line():
    manager = TaskManager(include_defaults=False, include_path=OURS)
    own = {name for name in TASKS["default"] if (OURS / "default" / f"{name}.yaml").is_file()}
    adapters = {f"{name}_llm_adapters" for name in TASKS["llm-adapters"]}
    assert own | adapters <= set(manager.all_tasks)
    for name in sorted(own | adapters):
        (task,) = manager.load([name])["tasks"].values()
        assert len(task.eval_docs) == len(RECORDS[name.removesuffix("_llm_adapters")])


def test_own_records_are_judged_by_the_rule(model, tokenizer):
    rows = [{"prompt": f"Say {n}:", "answer": str(n)} for n in range(4)]
    lm = HarnessModel(pretrained=model, tokenizer=tokenizer, batch_size=2)
    config = {"metric": "exact_match", "name": "mine", "max_new_tokens": 5}
    samples = run(lm, records_config(rows, **config))["samples"]["mine"]
    responses = [sample["resps"][0][0] for sample in samples]
    rows[2]["answer"] = responses[2]
    results = run(lm, records_config(rows, **config))
    judged = [bool(sample["exact_match"]) for sample in results["samples"]["mine"]]
    assert judged == [
        is_correct(response, row["answer"]) for response, row in zip(responses, rows, strict=True)
    ]
    assert judged[2]
    assert main_metric(results["configs"]["mine"]) == "exact_match,stated"


def test_own_choices_are_headed_by_their_accuracy_per_byte(model, tokenizer, tmp_path):
    rows = [{"prompt": f"Is {n} odd?", "choices": [" no", " yes!!"], "answer": 1} for n in range(6)]
    path = tmp_path / "odd.json"
    Dataset.from_list(rows).to_json(path, lines=False)
    lm = HarnessModel(pretrained=model, tokenizer=tokenizer, softmax_dtype="float32")
    results = run(lm, records_config(path, metric="choices"))
    expected = []
    for sample in results["samples"]["records"]:
        no, yes = (answer[0] for answer in sample["filtered_resps"])
        expected.append(float(yes / len(" yes!!") > no / len(" no")))
    assert [sample["acc_bytes"] for sample in results["samples"]["records"]] == expected
    assert main_metric(results["configs"]["records"]) == "acc_bytes,none"
    assert results["configs"]["records"]["metadata"]["source"] == "odd.json"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("svamp", {"protocol": "greedy"}, "`protocol` must be one of default, llm-adapters"),
        ("svmp", {}, "`svmp` is not a task of the protocol default; did you mean `svamp`"),
        ("mmlu_stem", {"protocol": "llm-adapters"}, "not a task of the protocol llm-adapters"),
        ("svamp", {"num_fewshot": 2}, "`num_fewshot` must be 0 for svamp, which has no worked"),
        ("truthfulqa", {"num_fewshot": 2}, "`num_fewshot` must be 0 for truthfulqa_mc1"),
        ("mawps", {"num_fewshot": 2, "protocol": "llm-adapters"}, "must be 0 for the protocol llm"),
    ],
)
def test_what_there_is_not(name, options, message):
    with pytest.raises(ValueError, match=message):
        task_config(name, **options)


@pytest.mark.parametrize(
    ("rows", "metric", "message"),
    [
        ([], "exact_match", "must hold at least one record"),
        ([{"prompt": "a"}], "exact_match", "`answer` for the metric exact_match, and record 1 has"),
        ([{"prompt": ["a"], "answer": "b"}], "exact_match", "`load_evaluation_records` makes"),
        ([{"prompt": "a", "choices": [" b"], "answer": 1}], "choices", "and `answer` \\(its index"),
    ],
)
def test_own_records_are_checked(rows, metric, message):
    with pytest.raises(ValueError, match=message):
        records_config(rows, metric=metric)


def test_worked_examples_of_word_problems():
    (config,) = task_config("mawps", num_fewshot=2)
    context, _ = load(config)[0][1]
    assert context.count("Question: ") == 3
    assert context.endswith("Question: 3 + 4?\nAnswer:")


def test_the_yaml_files_are_shipped():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["depthmix"]
    package = OURS.parents[1]
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    files = set(OURS.rglob("*.yaml"))
    assert len(files) > 20
    assert files <= shipped
