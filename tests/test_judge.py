"""The judge's client against a real server: repetitions, bounds, cache, cost, and its secret."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest

pytest.importorskip("openai")

from depthmix.evaluation.judge import Judge, JudgeError, JudgeSpec
from judge_server import Reply, serve

KEY = "sk-recognisable-0123456789"


def read(text):
    found = re.search(r"\[\[(\d+)\]\]", text)
    return float(found[1]) if found else None


def conversations(num):
    return [[{"role": "user", "content": f"Question {number}"}] for number in range(num)]


def said(body):
    return int(body["messages"][0]["content"].split()[-1])


def echo_number(body, number):
    return Reply(f"I see. Rating: [[{said(body)}]]")


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_verdicts_come_in_the_order_of_the_conversations(tmp_path):
    fourth_is_here = threading.Event()

    def answer_the_fourth_first(body, number):
        if number == 3:
            fourth_is_here.set()
        return Reply(f"[[{said(body)}]]", after=fourth_is_here if number < 3 else None)

    with serve(answer_the_fourth_first) as server:
        judge = Judge(server.section(concurrency=4), tmp_path)
        verdicts = judge.ask(conversations(8), read)
    assert [verdict.value for verdict in verdicts] == list(range(8))
    assert verdicts[3].text == "[[3]]"
    assert server.most_under_way == 4
    assert set(server.paths) == {"/v1/chat/completions"}
    body = min(server.bodies, key=said)
    messages = [{"role": "user", "content": "Question 0"}]
    assert body == {"model": "judge", "messages": messages, "temperature": 0, "max_tokens": 2048}


def test_options_that_are_none_are_left_to_the_server(tmp_path):
    with serve() as server:
        Judge(server.section(temperature=None, max_tokens=None), tmp_path).ask(
            conversations(1), read
        )
    assert server.bodies[0].keys() == {"model", "messages"}


def test_the_key_is_in_the_header_only_if_there_is_one(tmp_path, monkeypatch):
    with serve() as server:
        Judge(server.section(), tmp_path / "without").ask(conversations(1), read)
        monkeypatch.setenv("OTHER_KEY", f" {KEY}\n")
        section = server.section(key_variable="OTHER_KEY")
        Judge(section, tmp_path / "with").ask(conversations(1), read)
    assert "authorization" not in server.headers[0]
    assert server.headers[1]["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_faults_are_repeated(tmp_path, status):
    with serve(lambda body, number: Reply(status=200 if number > 1 else status)) as server:
        (verdict,) = Judge(server.section(), tmp_path).ask(conversations(1), read)
    assert verdict.value == 5
    assert len(server.bodies) == 3


def test_lasting_faults_end_in_one_sentence(tmp_path):
    with serve(
        lambda body, number: Reply(status=500, raw='{"error": {"message": "broken"}}')
    ) as server:
        judge = Judge(server.section(max_retries=2), tmp_path)
        with pytest.raises(JudgeError, match=r"cannot be asked \(InternalServerError.*broken"):
            judge.ask(conversations(1), read)
    assert len(server.bodies) == 3


def test_slow_answers_are_asked_for_again(tmp_path):
    asked_again = threading.Event()

    def keep_the_first_waiting(body, number):
        if number > 0:
            asked_again.set()
        return Reply(after=asked_again)

    with serve(keep_the_first_waiting) as server:
        section = server.section(timeout=0.2, max_retries=100)
        (verdict,) = Judge(section, tmp_path).ask(conversations(1), read)
    assert verdict.value == 5
    assert len(server.bodies) >= 2


def test_nobody_there(tmp_path):
    with serve() as server:
        section = server.section(max_retries=0)
    with pytest.raises(JudgeError, match=r"APIConnectionError.*judge.base_url"):
        Judge(section, tmp_path).ask(conversations(1), read)


@pytest.mark.parametrize("raw", ["<html>Hello</html>", "{}", '{"choices": []}', "[1]"])
def test_a_page_that_is_no_completion_is_an_error(tmp_path, raw):
    with serve(lambda body, number: Reply(raw=raw)) as server:
        judge = Judge(server.section(max_retries=0), tmp_path)
        with pytest.raises(JudgeError, match=r"cannot be asked"):
            judge.ask(conversations(1), read)
    assert not list(tmp_path.iterdir())


def test_an_answer_without_a_verdict_is_asked_for_again(tmp_path):
    with serve(lambda body, number: Reply("Rating: [[7]]" if number == 2 else "Hm.")) as server:
        (verdict,) = Judge(server.section(), tmp_path).ask(conversations(1), read)
    assert (verdict.value, verdict.text) == (7, "Rating: [[7]]")
    assert len(server.bodies) == 3


@pytest.mark.parametrize("content", ["Rating: eight", "", None])
def test_what_stays_without_a_verdict_is_unrated_and_not_asked_again(tmp_path, content):
    with serve(lambda body, number: Reply(content)) as server:
        section = server.section(max_attempts=2)
        (verdict,) = Judge(section, tmp_path).ask(conversations(1), read)
        assert (verdict.value, verdict.text) == (None, content or "")
        assert Judge(section, tmp_path).ask(conversations(1), read) == [verdict]
        assert len(server.bodies) == 2
        Judge(server.section(max_attempts=3), tmp_path).ask(conversations(1), read)
    assert len(server.bodies) == 3


def test_equal_requests_are_asked_once(tmp_path):
    with serve() as server:
        verdicts = Judge(server.section(concurrency=4), tmp_path).ask(conversations(1) * 3, read)
    assert [verdict.value for verdict in verdicts] == [5, 5, 5]
    assert len(server.bodies) == 1


def test_another_model_or_another_text_is_another_request(tmp_path):
    with serve() as server:
        for model in ("judge", "other", "judge"):
            Judge(server.section(model=model), tmp_path).ask(conversations(2), read)
    assert [body["model"] for body in server.bodies] == ["judge"] * 2 + ["other"] * 2


def test_a_refusal_stops_and_a_second_call_goes_on(tmp_path):
    def refuse_after_four(body, number):
        return echo_number(body, number) if number < 4 else Reply(status=403, raw="{}")

    with serve(refuse_after_four) as server, pytest.raises(JudgeError, match="are kept in"):
        Judge(server.section(), tmp_path).ask(conversations(9), read)
    assert len(server.bodies) < 9  # it gave up, and did not try them all
    with serve(echo_number) as server:
        verdicts = Judge(server.section(), tmp_path).ask(conversations(9), read)
    assert [verdict.value for verdict in verdicts] == list(range(9))
    assert sorted(map(said, server.bodies)) == [4, 5, 6, 7, 8]


@pytest.fixture
def interruptible():
    """Let SIGINT interrupt, also in a process that was started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_keeps_every_answer(tmp_path, monkeypatch):
    interrupted = threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            interrupted.set()
            super().shutdown(wait)

    def interrupt_at_the_fourth(body, number):
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return Reply(f"[[{said(body)}]]", after=interrupted if number == 3 else None)

    monkeypatch.setattr("depthmix.evaluation.judge.ThreadPoolExecutor", Pool)
    with serve(interrupt_at_the_fourth) as server:
        with pytest.raises(KeyboardInterrupt):
            Judge(server.section(), tmp_path).ask(conversations(9), read)
        assert len(server.bodies) == 4
        server.reply = echo_number
        verdicts = Judge(server.section(), tmp_path).ask(conversations(9), read)
    assert [verdict.value for verdict in verdicts] == list(range(9))
    assert sorted(map(said, server.bodies)) == list(range(9))


def test_the_cost_is_printed_before_the_first_request(tmp_path, monkeypatch):
    events = []

    class Screen:
        def write(self, text):
            events.append(text)

        def flush(self):
            pass

    def note(body, number):
        events.append("request")
        return Reply()

    texts = [[{"role": "user", "content": letter * 4000}] for letter in "ab"]
    with serve(note) as server:
        section = server.section(input_price=10.0, output_price=30.0, max_tokens=100)
        monkeypatch.setattr(sys, "stdout", Screen())
        Judge(section, tmp_path).ask(texts, read)
        Judge(section, tmp_path).ask(texts, read)
    monkeypatch.undo()
    written = [text for text in events if text.strip()]
    assert [text == "request" for text in written] == [False, True, True, False]
    assert written[0] == (
        f"Judge judge at {server.base_url}: 2 requests, about 2,000 prompt tokens, "
        "up to 200 answer tokens; cost up to about 0.03."
    )
    assert "0 requests (2 more are kept from before)" in written[3]


def test_cost_lines_of_other_settings(tmp_path):
    bodies = [{"messages": [{"role": "user", "content": "x" * 400_000}]}]
    for options, ending in [
        ({}, "100,000 prompt tokens; no price is set."),
        ({"input_price": 2.5}, "up to 2,048 answer tokens; cost up to about 0.25."),
        (
            {"input_price": 2.5, "max_tokens": None},
            "cost about 0.25 for the prompts, and more for the answers.",
        ),
    ]:
        judge = Judge(JudgeSpec(model="judge", **options), tmp_path)
        assert judge.describe(bodies).endswith(ending)


def test_the_key_is_nowhere_but_in_the_header(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)

    def echo_key(body, number):
        if number == 0:
            return Reply(f"Your key is {KEY}. Rating: [[3]]")
        error = {"error": {"message": f"Incorrect API key provided: {KEY}"}, "key": KEY}
        return Reply(status=401, raw=json.dumps(error))

    with serve(echo_key) as server:
        section = server.section()
        judge = Judge(section, tmp_path / "cache")
        with pytest.raises(JudgeError, match="401") as caught:
            judge.ask(conversations(3), read)
        assert judge.ask(conversations(1), read)[0].text == "Your key is [key]. Rating: [[3]]"
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"

    error = caught.value
    files = "".join(path.read_text("utf-8") for path in tmp_path.rglob("*") if path.is_file())
    assert "Your key is [key]" in files
    assert "Incorrect API key provided: [key]" in str(error)
    shown = capsys.readouterr()
    places = [files, str(error), repr(error), shown.out, shown.err, caplog.text, repr(judge)]
    places += traceback.format_exception(error)
    places += [repr(section), json.dumps(asdict(section)), str(error.__context__)]
    places += [str(error.__cause__), *map(str, server.bodies)]
    assert not [place for place in places if KEY in place]


@pytest.mark.parametrize("key", ["sk-secret\nX: 1", "sk-secret word", "sk-sécret"])
def test_a_key_that_cannot_stand_in_a_header_is_refused_without_showing_it(
    tmp_path, monkeypatch, key
):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="printable ASCII") as caught:
        Judge(JudgeSpec(model="judge"), tmp_path)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "base_url", ["localhost:8000/v1", "ftp://host/v1", "http://", "user:sk-secret@host"]
)
def test_an_address_begins_with_its_scheme(base_url):
    with pytest.raises(ValueError, match=r"`judge.base_url` must be an address") as caught:
        JudgeSpec(model="judge", base_url=base_url)
    assert "sk-secret" not in str(caught.value)


@pytest.mark.parametrize("base_url", ["https://u:sk-secret@host/v1", "https://host/v1?key=secret"])
def test_an_address_holds_no_secret(base_url):
    with pytest.raises(ValueError, match="without a user or a query") as caught:
        JudgeSpec(model="judge", base_url=base_url)
    assert "secret@" not in str(caught.value)
    assert "key=" not in str(caught.value)


@pytest.mark.parametrize("name", ["concurrency", "max_attempts"])
def test_numbers_are_checked(name):
    with pytest.raises(ValueError, match=f"`judge.{name}` must be at least 1, got 0"):
        JudgeSpec(model="judge", **{name: 0})


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(
        RuntimeError, match=r"A judge needs openai, .*`pip install 'depthmix\[judge\]'`"
    ):
        Judge(JudgeSpec(model="judge"), tmp_path)
