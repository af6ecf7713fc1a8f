"""MT-Bench from the first question to the samples on disk, with a judge on a real server."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openai")

import depthmix.evaluation.mt_bench
from checkpoints import make_model, make_tokenizer
from depthmix.data.catalog import load_split
from depthmix.evaluation.answer_file import AnswerFile
from depthmix.evaluation.conversations import TEMPERATURES, MTBenchSpec, render
from depthmix.evaluation.judge import JudgeError
from depthmix.evaluation.judged import mean_rating
from depthmix.evaluation.mt_bench import evaluate_mt_bench, read_rating, write_judge_prompt
from judge_server import Reply, serve

DATA = Path(os.environ.get("DEPTHMIX_DATA", Path(__file__).parents[2] / "shared" / "data"))

PROMPTS = {
    "single-v1": ("You judge.", "Rate.\n{question}\n{answer}"),
    "single-math-v1": ("You judge.", "Rate.\n{question}\n{ref_answer_1}\n{answer}"),
    "single-v1-multi-turn": (
        "You judge turn 2.",
        "{question_1}|{answer_1}|{question_2}|{answer_2}",
    ),
    "single-math-v1-multi-turn": (
        "You judge turn 2.",
        "{question_1}|{ref_answer_1}|{question_2}|{ref_answer_2}|{answer_1}|{answer_2}",
    ),
}

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write {a}.", "Again."]},
    {"question_id": 111, "category": "math", "turns": ["1 + 1?", "Twice?"]},
    {"question_id": 82, "category": "writing", "turns": ["A tale.", "Shorter."]},
    {"question_id": 141, "category": "stem", "turns": ["Why blue?", "Sure?"]},
]

SMALL = MTBenchSpec(max_new_tokens=6, batch_size=2)


@pytest.fixture(autouse=True)
def data(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    references = {111: ["It is 2.", "It is 4."]}
    questions = [{**row, "reference": references.get(row["question_id"])} for row in QUESTIONS]
    prompts = [
        {"name": name, "system_prompt": system, "prompt_template": template}
        for name, (system, template) in PROMPTS.items()
    ]
    splits = {"test": questions, "judge_prompts": prompts}

    def load(name, split="test", *, data_dir=None):
        assert name == "mt_bench"
        return splits[split]

    monkeypatch.setattr(depthmix.evaluation.mt_bench, "load_split", load)
    return questions


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


@contextmanager
def interrupted_after(model, num_calls):
    """Let `generate` be interrupted, as by a user, after some calls."""
    generate, left = model.generate, [None] * num_calls

    def stop(*args, **kwargs):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return generate(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "generate", stop)
        yield


def is_second(body):
    return body["messages"][0]["content"] == "You judge turn 2."


def user_text(body):
    return body["messages"][1]["content"]


def rate_by_question(body, number):
    ratings = {"Write {a}.": (2, 4), "1 + 1?": (10, 8), "A tale.": (3, 6), "Why blue?": (5, 1)}
    (pair,) = [pair for question, pair in ratings.items() if question in user_text(body)]
    return Reply(f"Fair. Rating: [[{pair[is_second(body)]}]]")


def evaluate(model, tokenizer, server, folder, section=SMALL, judge=None, **options):
    return evaluate_mt_bench(
        model,
        tokenizer,
        judge=server.section(**judge or {}),
        output_dir=folder,
        section=section,
        **options,
    )


def read_lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def test_end_to_end(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-recognisable-9876543210")
    with serve(rate_by_question) as server:
        result = evaluate(model, tokenizer, server, tmp_path, judge={"concurrency": 3})
    assert len(server.bodies) == 8
    assert {name: mean.value for name, mean in result.metrics.items()} == {
        "turn_1": 5.0,
        "turn_2": 4.75,
        "score": 4.875,
        "score_writing": 3.75,
        "score_math": 9.0,
        "score_stem": 3.0,
    }
    score = result.metrics["score"]
    assert 3 <= score.interval.low < score.value < score.interval.high <= 9
    assert (score.num_rated, score.num_unrated) == (4, 0)

    samples = read_lines(tmp_path / "samples_mt_bench.jsonl")
    assert samples == [dict(sample) for sample in result.samples]
    first = samples[0]
    assert first["doc"]["question_id"] == 81
    assert first["metrics"] == ["turn_1", "turn_2", "score"]
    assert (first["turn_1"], first["turn_2"], first["score"]) == (2, 4, 3)
    assert first["judgments"]["turn_2"] == "Fair. Rating: [[4]]"
    assert samples[1]["target"] == ["It is 2.", "It is 4."]

    # The model's second turn follows its own first answer, and the judge sees what it said.
    (answer_1,), (answer_2,) = first["resps"]
    assert first["arguments"][0] == ["<|user|>Write {a}.</s><|assistant|>"]
    opening = f"<|user|>Write {{a}}.</s><|assistant|>{answer_1}</s>"
    assert first["arguments"][1] == [f"{opening}<|user|>Again.</s><|assistant|>"]
    texts = [user_text(body) for body in server.bodies]
    assert f"Rate.\nWrite {{a}}.\n{answer_1}" in texts
    assert f"Write {{a}}.|{answer_1}|Again.|{answer_2}" in texts
    (math_1,), (math_2,) = samples[1]["resps"]
    assert f"Rate.\n1 + 1?\nIt is 2.\n{math_1}" in texts
    assert f"1 + 1?|It is 2.|Twice?|It is 4.|{math_1}|{math_2}" in texts

    files = [path.read_text("utf-8") for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 10  # answers, samples, and one per request
    assert not any("sk-recognisable" in text for text in files)


def test_the_second_turn_is_what_the_model_says_after_its_first(model, tokenizer, tmp_path):
    greedy = MTBenchSpec(max_new_tokens=6, sampling="greedy")
    with serve() as server:
        result = evaluate(model, tokenizer, server, tmp_path, greedy)
    for sample in result.samples:
        for (prompt,), (said,) in zip(sample["arguments"], sample["resps"], strict=True):
            inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
            output = model.generate(
                inputs["input_ids"], max_new_tokens=6, do_sample=False, pad_token_id=0
            )
            new_tokens = output[0, inputs["input_ids"].shape[1] :]
            assert said == tokenizer.decode(new_tokens, skip_special_tokens=True).strip()


def test_harness_form(model, tokenizer, tmp_path):
    with serve(rate_by_question) as server:
        outcome = evaluate(model, tokenizer, server, tmp_path, limit=2, seed=3).to_harness()
    outcome = json.loads(json.dumps(outcome, allow_nan=False))
    assert outcome["results"]["mt_bench"]["score,none"] == 6
    assert outcome["results"]["mt_bench"]["score_stderr,none"] == pytest.approx(3)
    assert outcome["results"]["mt_bench"]["score_interval,none"] == [3, 9]
    assert outcome["results"]["mt_bench"]["score_unrated,none"] == 0
    assert outcome["n-samples"] == {"mt_bench": {"original": 2, "effective": 2}}
    assert outcome["higher_is_better"]["mt_bench"]["turn_1"] is True
    assert [sample["doc_id"] for sample in outcome["samples"]["mt_bench"]] == [0, 1]
    settings = outcome["configs"]["mt_bench"]["metadata"]
    assert settings["seed"] == 3
    assert settings["judge"]["model"] == "judge"


def test_nothing_is_done_twice(model, tokenizer, tmp_path):
    with serve(rate_by_question) as server:
        first = evaluate(model, tokenizer, server, tmp_path)
        with interrupted_after(model, 0):
            again = evaluate(model, tokenizer, server, tmp_path)
        assert len(server.bodies) == 8
    assert again == first


@pytest.mark.parametrize("num_calls", [0, 1, 2, 3])
def test_interrupted_generation_goes_on_to_the_same_answers(model, tokenizer, tmp_path, num_calls):
    with serve(rate_by_question) as server:
        with pytest.raises(KeyboardInterrupt), interrupted_after(model, num_calls):
            evaluate(model, tokenizer, server, tmp_path / "a")
        assert not server.bodies
        path = tmp_path / "a" / "mt_bench_answers.jsonl"
        assert path.is_file() == (num_calls > 1)  # a batch is two calls, one per turn
        kept = path.read_text("utf-8") if path.is_file() else ""
        result = evaluate(model, tokenizer, server, tmp_path / "a")
        assert path.read_text("utf-8").startswith(kept)
        whole = evaluate(model, tokenizer, server, tmp_path / "b")
        assert len(server.bodies) == 16
    assert result.samples == whole.samples


def test_interrupted_judging_goes_on(model, tokenizer, tmp_path):
    def refuse_after_three(body, number):
        return rate_by_question(body, number) if number < 3 else Reply(status=401, raw="{}")

    with serve(refuse_after_three) as server:
        with pytest.raises(JudgeError, match="401"):
            evaluate(model, tokenizer, server, tmp_path)
        assert not (tmp_path / "samples_mt_bench.jsonl").exists()
        num_before = len(server.bodies)
        server.reply = rate_by_question
        with interrupted_after(model, 0):
            result = evaluate(model, tokenizer, server, tmp_path)
    assert len(server.bodies) - num_before == 5
    assert result.metrics["score"].value == 4.875


def test_batches_do_not_matter_and_seeds_do(model, tokenizer, tmp_path):
    with serve() as server:
        answers = {}
        for name, size, seed in [("a", 1, 0), ("b", 4, 0), ("c", 4, 1)]:
            section = MTBenchSpec(max_new_tokens=6, batch_size=size)
            result = evaluate(model, tokenizer, server, tmp_path / name, section, seed=seed)
            answers[name] = [sample["resps"] for sample in result.samples]
    assert answers["a"] == answers["b"]
    assert answers["a"][1] == answers["c"][1]  # math is greedy
    assert answers["a"][0] != answers["c"][0]  # writing is not


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"section": MTBenchSpec(max_new_tokens=7)}, {"model": 1}]
)
def test_other_settings_and_other_models_are_refused(model, tokenizer, tmp_path, change):
    with serve() as server:
        evaluate(model, tokenizer, server, tmp_path)
        if "model" in change:
            change = {"model": make_model(make_tokenizer()).half()}
        with pytest.raises(ValueError, match="answers made under other settings"):
            evaluate(
                **{"model": model} | change, tokenizer=tokenizer, server=server, folder=tmp_path
            )


def test_what_the_judge_does_not_rate_is_counted_and_not_guessed(model, tokenizer, tmp_path):
    def dodge(body, number):
        if is_second(body) and "1 + 1?" in user_text(body):
            return Reply("I would rather not say.")
        if "Why blue?" in user_text(body):
            return Reply("Rating: [[11]]")
        return rate_by_question(body, number)

    with serve(dodge) as server:
        result = evaluate(model, tokenizer, server, tmp_path)
    assert len(server.bodies) == 5 + 3 * 3
    metrics = result.metrics
    assert [metrics[name].num_unrated for name in ("turn_1", "turn_2", "score")] == [1, 2, 1]
    assert metrics["turn_1"].value == 5
    assert metrics["turn_2"].value == 5
    assert metrics["score"].value == pytest.approx((3 + 10 + 4.5) / 3)
    assert metrics["score_stem"].value is None
    math, stem = result.samples[1], result.samples[3]
    assert math["metrics"] == ["turn_1", "score"]
    assert "turn_2" not in math
    assert stem["metrics"] == []
    assert json.dumps(result.to_harness(), allow_nan=False)


def test_a_key_that_cannot_be_used_is_told_before_generation(
    model, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "two words")
    refused = pytest.raises(ValueError, match="printable ASCII")
    with serve() as server, interrupted_after(model, 0), refused:
        evaluate(model, tokenizer, server, tmp_path)


def test_a_tokenizer_without_a_chat_template(model, tmp_path):
    with serve() as server, pytest.raises(ValueError, match="choose `alpaca`"):
        evaluate(model, make_tokenizer(chat_template=None), server, tmp_path)


def test_alpacas_template(model, tmp_path):
    tokenizer = make_tokenizer(chat_template=None)
    section = MTBenchSpec(template="alpaca", max_new_tokens=2)
    intro = (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n"
    )
    first = render(["Hello", "And?"], [], section, tokenizer)
    assert first.text == f"{intro}Hello\n\n### Response:\n"
    second = render(["Hello", "And?"], ["Hi."], section, tokenizer)
    assert second.text == f"{first.text}Hi.\n\n### Instruction:\nAnd?\n\n### Response:\n"
    with serve() as server:
        result = evaluate(model, tokenizer, server, tmp_path, section, limit=1)
    assert result.samples[0]["arguments"][0] == [first.text.replace("Hello", "Write {a}.")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Rating: [[5]]", 5),
        ("Rating: [[7.5]]", 7.5),
        ("[[10]]", 10),
        ("First [3], then Rating: [[8]]", 8),
        ("Rating: [6]", 6),
        ("[[4]] or [[9]]", 4),
        ("[[1]]", 1),
        ("Rating: 5", None),
        ("[[rating]]", None),
        ("[[5/10]]", None),
        ("[[-3]]", None),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[85]]", None),
        ("[[]]", None),
        ("", None),
    ],
)
def test_read_rating(text, expected):
    assert read_rating(text) == expected


def test_a_missing_reference_is_an_error(data):
    with pytest.raises(ValueError, match="Question 111 must have `reference` answers"):
        write_judge_prompt({**data[1], "reference": None}, ["a", "b"], 1, {})


def test_mean_rating_agrees_with_scipy_and_numpy():
    ratings = [1.0, 4.0, None, 7.0, 7.0, 2.5]
    rated = np.array([1.0, 4.0, 7.0, 7.0, 2.5])
    mean = mean_rating(ratings)
    assert mean.value == rated.mean()
    assert mean.standard_error == pytest.approx(rated.std(ddof=1) / np.sqrt(5))
    assert (mean.num_rated, mean.num_unrated) == (5, 1)
    rng = np.random.default_rng(1)
    resampled = rng.choice(rated, (20_000, 5)).mean(axis=1)
    ends = [mean.interval.low, mean.interval.high]
    assert ends == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.15)
    assert mean == mean_rating(ratings)


@pytest.mark.parametrize("ratings", [[], [None, None], [3.0], [3.0, 3.0, None]])
def test_ratings_that_are_alike_promise_no_certainty(ratings):
    mean = mean_rating(ratings)
    assert mean.interval is None
    assert mean.value == (3 if 3.0 in ratings else None)


def test_every_question_of_the_real_data_can_be_judged():
    if not (DATA / "mt_bench").is_dir():
        pytest.skip("needs the data sets in the folder that DEPTHMIX_DATA names")
    questions = load_split("mt_bench", data_dir=DATA)
    prompts = {row["name"]: row for row in load_split("mt_bench", "judge_prompts", data_dir=DATA)}
    assert len(questions) == 80
    assert {question["category"] for question in questions} == set(TEMPERATURES)
    num_with_reference = 0
    for question in questions:
        for turn in (1, 2):
            system, user = write_judge_prompt(question, ["ANSWER1", "ANSWER2"], turn, prompts)
            text = system["content"] + user["content"]
            assert '"[[rating]]"' in text
            assert question["turns"][turn - 1] in text
            assert f"ANSWER{turn}" in text
            num_with_reference += "Reference Answer" in text
    assert num_with_reference == 60


def test_answer_files_are_those_of_the_section(model, tokenizer, tmp_path):
    with serve() as server:
        result = evaluate(model, tokenizer, server, tmp_path)
    settings = {name: value for name, value in result.settings.items() if name != "judge"}
    file = AnswerFile(tmp_path / "mt_bench_answers.jsonl", settings)
    assert list(file.answers) == [81, 111, 82, 141]
