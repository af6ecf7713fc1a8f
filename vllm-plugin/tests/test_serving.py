"""The plug-in in vLLM itself: `make test-vllm`, which makes the exports that are served here.

The folder of exports is in the environment variable DEPTHMIX_EXPORTS (`make_exports.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

EXPORTS = Path(os.environ["DEPTHMIX_EXPORTS"])
NAMES = ("llama", "qwen3", "granite", "smollm2")
TOLERANCE = 1e-3
"""Nats by which log-probabilities may differ."""


def read(name):
    said = json.loads((EXPORTS / name / "fifty.json").read_text("utf-8"))
    assert len(said["prompts"]) == 50
    return said


@contextlib.contextmanager
def loading(name, **options):
    """Load an export, all prompts of which fit."""
    options = {"enforce_eager": True, "max_model_len": 128, "dtype": "float32", **options}
    model = LLM(str(EXPORTS / name), **options)
    try:
        yield model
    finally:
        del model
        cleanup_dist_env_and_memory()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in NAMES),
        ("llama", {"max_num_batched_tokens": 16}),  # prompts in chunks
        ("llama", {"enforce_eager": False}),
        ("qwen3", {"tensor_parallel_size": 2}),
    ],
)
def test_fifty_prompts_at_once_are_as_in_depthmix(name, options):
    said = read(name)
    num_tokens = len(said["tokens"][0])
    greedy = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    reading = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    rows = [a + b for a, b in zip(said["prompts"], said["tokens"], strict=True)]
    with loading(name, **options) as model:
        found = model.generate([{"prompt_token_ids": ids} for ids in said["prompts"]], greedy)
        seen = model.generate([{"prompt_token_ids": ids} for ids in rows], reading)
    assert [list(one.outputs[0].token_ids) for one in found] == said["tokens"]
    for one, tokens, log_probs in zip(seen, said["tokens"], said["logprobs"], strict=True):
        last = one.prompt_logprobs[-num_tokens:]
        own = [place[t].logprob for place, t in zip(last, tokens, strict=True)]
        assert own == pytest.approx(log_probs, abs=TOLERANCE)


def test_without_the_plugin_it_is_refused():
    code = "import sys, vllm; vllm.LLM(sys.argv[1])"
    for arguments in ("", ", trust_remote_code=True"):
        command = [sys.executable, "-c", code.replace("[1])", f"[1]{arguments})")]
        done = subprocess.run(
            [*command, str(EXPORTS / "llama")],
            env={**os.environ, "VLLM_PLUGINS": "none"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode != 0
        assert "depthmix" in done.stderr


@pytest.fixture(scope="module")
def client():
    """An OpenAI client of a server that serves an export."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(EXPORTS / "llama"), "--served-model-name", "mixed"]
    command += ["--port", str(port), "--dtype", "float32", "--max-model-len", "128"]
    server = subprocess.Popen([*command, "--enforce-eager"], start_new_session=True)
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        for _ in range(300):
            with contextlib.suppress(Exception):
                client.models.list()
                break
            assert server.poll() is None
            time.sleep(1)
        yield client
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def test_the_openai_client_is_served(client):
    said = read("llama")
    for prompt, tokens, log_probs in zip(*(said[n][:5] for n in said), strict=True):
        answer = client.completions.create(
            model="mixed",
            prompt=prompt,
            max_tokens=len(tokens),
            temperature=0,
            logprobs=0,
            extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
        )
        found = answer.choices[0].logprobs
        assert [int(one.removeprefix("token_id:")) for one in found.tokens] == tokens
        assert found.token_logprobs == pytest.approx(log_probs, abs=TOLERANCE)


def test_a_wrong_request_is_the_clients(client):
    with pytest.raises(NotFoundError):
        client.completions.create(model="another", prompt="w7")
    with pytest.raises(BadRequestError):
        client.completions.create(model="mixed", prompt=[7] * 200, max_tokens=1)
