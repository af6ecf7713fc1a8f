"""TruthfulQA's generated answers: prompt, split, verdicts, and all of it with a real server."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jinja2
import pytest
import yaml

pytest.importorskip("openai")

import depthmix.evaluation.truthfulqa
from checkpoints import make_model, make_tokenizer
from depthmix.data.catalog import load_split
from depthmix.evaluation.truthfulqa import (
    QA_PRIMER,
    choose_questions,
    evaluate_truthfulqa,
    read_yes_or_no,
    write_judge_prompt,
)
from judge_server import Reply, serve

DATA = Path(os.environ.get("DEPTHMIX_DATA", Path(__file__).parents[2] / "shared" / "data"))

RECORDS = [
    {
        "question": f"Is {number} even?",
        "correct_answers": [f"correct-{number}", "I have no comment"],
        "incorrect_answers": [f"incorrect-{number}"],
    }
    for number in range(20)
]


@pytest.fixture(autouse=True)
def data(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(
        depthmix.evaluation.truthfulqa, "load_split", lambda name, data_dir: RECORDS
    )
    monkeypatch.setattr(depthmix.evaluation.truthfulqa, "MAX_NEW_TOKENS", 20)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


def text(body):
    return body["messages"][0]["content"]


def test_end_to_end(model, tokenizer, tmp_path):
    numbers = choose_questions(20)
    assert len(numbers) == 4

    def judge(body, number):
        which = next(n for n in numbers if f"correct-{n}\n" in text(body))
        truthful, informative = [("yes", "yes"), ("yes", "no"), ("no", "yes"), ("yes", "hm")][
            numbers.index(which)
        ]
        asked = truthful if "if the answer is truthful" in text(body) else informative
        return Reply(f"So it seems. [[{asked}]]")

    with serve(judge) as server:
        section = server.section(concurrency=2, max_attempts=2)
        options = {"judge": section, "output_dir": tmp_path, "batch_size": 3}
        result = evaluate_truthfulqa(model, tokenizer, **options)
        assert len(server.bodies) == 9  # the last question's second verdict is asked for twice
        assert evaluate_truthfulqa(model, tokenizer, **options) == result
        assert len(server.bodies) == 9
    metrics = {name: (mean.value, mean.num_unrated) for name, mean in result.metrics.items()}
    assert metrics == {
        "truthful": (0.75, 0),
        "informative": (2 / 3, 1),
        "true_and_informative": (1 / 3, 1),
    }
    lines = (tmp_path / "samples_truthfulqa_judged.jsonl").read_text("utf-8").split("\n")[:-1]
    samples = [json.loads(line) for line in lines]
    assert [sample["doc_id"] for sample in samples] == numbers
    assert samples[0]["true_and_informative"] == 1
    assert samples[1]["true_and_informative"] == 0
    assert samples[3]["metrics"] == ["truthful"]
    assert samples[0]["target"] == RECORDS[numbers[0]]["correct_answers"]

    # What the judge sees is what plain greedy decoding says after the prompt.
    for sample in samples:
        ((prompt,),), ((said,),) = sample["arguments"], sample["resps"]
        assert prompt == QA_PRIMER.format(question=sample["doc"]["question"])
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=0)
        new_tokens = output[0, inputs["input_ids"].shape[1] :]
        whole = tokenizer.decode(new_tokens, skip_special_tokens=True)
        assert said == whole.split("\n\n")[0].split("\nQ:")[0].strip()
        assert sum(f"[Answer to check]\n{said}\n[End" in text(b) for b in server.bodies) >= 2


def test_harness_form(model, tokenizer, tmp_path):
    with serve(lambda body, number: Reply("[[yes]]")) as server:
        result = evaluate_truthfulqa(
            model, tokenizer, judge=server.section(), output_dir=tmp_path, limit=2, seed=1
        )
    outcome = json.loads(json.dumps(result.to_harness(), allow_nan=False))
    assert outcome["results"]["truthfulqa_judged"]["true_and_informative,none"] == 1
    assert outcome["n-samples"]["truthfulqa_judged"]["effective"] == 2
    assert outcome["configs"]["truthfulqa_judged"]["metadata"]["split_seed"] == 1


def test_the_prompt_is_lm_evals_up_to_the_answers_beginning():
    tasks = pytest.importorskip("lm_eval.tasks")
    path = Path(tasks.__file__).parent / "truthfulqa" / "truthfulqa_gen.yaml"

    class Loader(yaml.SafeLoader):
        """Reads what lm-eval writes as `!function`, too."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    template = yaml.load(path.read_text("utf-8"), Loader)["doc_to_text"]
    rendered = jinja2.Template(template).render(question="Why {x}?").strip()
    assert QA_PRIMER.format(question="Why {x}?") == rendered + "\nA:"


def test_the_split_is_a_seeded_fifth():
    numbers = choose_questions(817)
    assert len(set(numbers)) == 163
    assert numbers == sorted(numbers) == choose_questions(817, seed=0)
    assert set(numbers) <= set(range(817))
    others = choose_questions(817, seed=1)
    assert 15 < len(set(numbers) & set(others)) < 55  # 33 by chance
    assert choose_questions(10, share=0.5) != choose_questions(10, share=1.0)


@pytest.mark.parametrize(
    ("judgment", "expected"),
    [
        ("It is. [[yes]]", 1.0),
        ("It is not. [[No]]", 0.0),
        ("[[YES]] indeed, [[yes]]", 1.0),
        ("[[yes]] or [[no]]", None),
        ("yes", None),
        ("[yes]", None),
        ("[[maybe]]", None),
        ("", None),
    ],
)
def test_read_yes_or_no(judgment, expected):
    assert read_yes_or_no(judgment) == expected


def test_the_judge_sees_references_and_is_asked_one_thing():
    (truthful,) = write_judge_prompt(RECORDS[3], "It {is} odd.", "truthful")
    (informative,) = write_judge_prompt(RECORDS[3], "It {is} odd.", "informative")
    for message in (truthful, informative):
        assert message["role"] == "user"
        content = message["content"]
        assert "[Question]\nIs 3 even?\n" in content
        assert "[Correct answers]\n- correct-3\n- I have no comment\n" in content
        assert "[Incorrect answers]\n- incorrect-3\n" in content
        assert "[Answer to check]\nIt {is} odd.\n[End" in content
    assert '"[[yes]]" if the answer is truthful' in truthful["content"]
    assert '"[[yes]]" if the answer is informative' in informative["content"]


def test_every_question_of_the_real_data_can_be_judged():
    if not (DATA / "truthfulqa").is_dir():
        pytest.skip("needs the data sets in the folder that DEPTHMIX_DATA names")
    records = load_split("truthfulqa", data_dir=DATA)
    assert len(choose_questions(len(records))) == 163
    for record in records:
        (message,) = write_judge_prompt(record, "Nothing.", "truthful")
        assert f"- {record['best_answer'].rstrip('.')}" in message["content"]
        assert record["incorrect_answers"]
