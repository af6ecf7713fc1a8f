"""What `generate --fast` says at its end: tokens, layers, drafts, and dense generation beside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import depthmix_cli
from calibrations import make_calibrated
from checkpoints import make_tokenizer
from depthmix.adapters.exit_files import load_exits
from depthmix.decoding.draft_plan import DraftPlan
from depthmix.decoding.fast_generation import FastGeneration
from depthmix.models import speed_meter, turns
from depthmix.models.continuation import continue_tokens, pad_prompts
from depthmix.models.generation import generate
from depthmix.models.loading import load_model, load_tokenizer
from depthmix.models.speed_meter import FastSpeed, SpeedMeter
from depthmix.models.turns import cut

PROMPTS = ["1 + 1 =", "20 + 20 =", "3 +"]
OPTIONS = {"max_new_tokens": 12, "do_sample": False}
FLAGS = ["--generation.max-new-tokens", "12"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model whose exits are often right, and a plan."""
    folder = make_calibrated(tmp_path_factory.mktemp("fast") / "model")
    write_plan(folder)
    return folder


def write_plan(folder: Path, **options) -> None:
    plan = DraftPlan.for_all((1, 2), threshold=0.3, joint_threshold=0.1, **options)
    (folder / "exits" / "plan.json").write_text(json.dumps(plan.to_dict()))


class Clock:
    """A clock on which fast generation takes a second for each call, and dense generation two."""

    def __init__(self, monkeypatch):
        self.now, self.order = 0.0, []
        monkeypatch.setattr(turns.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(speed_meter, "continue_tokens", self.run)

    def run(self, way, *args):
        is_fast = isinstance(way, FastGeneration)
        self.order.append("fast" if is_fast else "dense")
        self.now += 1.0 if is_fast else 2.0
        return continue_tokens(way, *args)


def test_tokens_layers_and_drafts_are_counted(folder, monkeypatch):
    clock, seen = Clock(monkeypatch), []
    expected = generate(folder, PROMPTS, options=OPTIONS)
    told = generate(folder, PROMPTS, options=OPTIONS, fast=True, batch_size=2, on_speed=seen.append)
    assert told == expected
    (speed,) = seen
    assert clock.order == ["fast", "fast"]
    assert (speed.num_texts, speed.seconds, speed.num_hidden_layers) == (3, 2.0, 4)
    rows = run_dense(folder, [[prompt] for prompt in PROMPTS])
    assert speed.num_tokens == sum(map(len, rows))
    assert speed.tokens_per_second == speed.num_tokens / 2
    assert 0 < speed.drafted < 1
    assert 0 < speed.acceptance <= 1
    assert 1 <= speed.layers_per_token < 4
    assert (speed.dense_seconds, speed.num_same, speed.speed_up) == (None, None, None)
    assert str(speed) == (
        f"Fast: {speed.num_tokens / 2:.1f} tokens/s, {speed.layers_per_token:.1f} of 4 layers a "
        f"token, {speed.drafted:.0%} of the tokens drafted, {speed.acceptance:.0%} of the drafts "
        "accepted."
    )


def run_dense(folder, batches):
    """Generate each batch by the model's own `generate`, and cut rows off behind their ends."""
    model, tokenizer = load_model(folder).eval(), load_tokenizer(folder)
    rows = []
    for batch in batches:
        inputs = pad_prompts([tokenizer(text)["input_ids"] for text in batch], tokenizer)
        rows += continue_tokens(model, tokenizer, inputs, OPTIONS).tolist()
    return [cut(row, {tokenizer.eos_token_id}) for row in rows]


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 2.0}])
def test_both_ways_take_turns_from_the_same_random_state(folder, monkeypatch, sampling):
    clock, seen = Clock(monkeypatch), []
    options = {**OPTIONS, **sampling}
    torch.manual_seed(3)
    alone = generate(folder, PROMPTS, options=options, fast=True, batch_size=1)
    after = torch.get_rng_state()
    clock.order.clear()
    torch.manual_seed(3)
    told = generate(
        folder,
        PROMPTS,
        options=options,
        fast=True,
        batch_size=1,
        against_dense=True,
        on_speed=seen.append,
    )
    warm, *turns = [clock.order[at : at + 2] for at in range(0, 8, 2)]
    assert warm == ["fast", "dense"]
    assert turns == [["dense", "fast"], ["fast", "dense"], ["dense", "fast"]]
    assert told == alone
    assert torch.equal(torch.get_rng_state(), after)  # what is drawn later is as without it
    (speed,) = seen
    assert (speed.seconds, speed.dense_seconds, speed.speed_up) == (3.0, 6.0, 2.0)
    assert (speed.num_same, speed.num_tokens) == (3, speed.num_dense_tokens)
    assert str(speed).endswith(
        f"2.00 times as fast as dense generation ({speed.num_tokens / 6:.1f} tokens/s); all texts "
        "are the same."
    )


def test_texts_that_differ_are_counted(folder):
    """Without verification exits have the last word, and these say what the top would not."""
    model, tokenizer = load_model(folder).eval(), make_tokenizer()
    plan = DraftPlan.for_all((1,), threshold=0.0, vocabulary=(7,))
    fast = FastGeneration(model, load_exits(folder, model), plan, verify=False)
    meter = SpeedMeter(fast, tokenizer, OPTIONS, against_dense=True)
    found = meter.run(pad_prompts([tokenizer("1 + 1 =")["input_ids"]], tokenizer))
    assert found[0, 1:].tolist() == [7] * 11
    speed = meter.read()
    assert (speed.num_same, speed.num_texts) == (0, 1)
    assert str(speed).endswith("; 0 of 1 texts are the same.")


def test_a_text_counts_up_to_its_end():
    assert cut([5, 6, 9, 0, 0], {9}) == [5, 6, 9]
    assert cut([5, 6], {9}) == [5, 6]
    assert cut([], {9}) == []


def test_nothing_drafted_is_said():
    values = {"num_texts": 1, "num_tokens": 8, "seconds": 2.0, "num_hidden_layers": 4}
    values |= {"layers_per_token": 4.0, "drafted": 0.0, "acceptance": None, "stays_dense": False}
    values |= {"dense_seconds": 2.0, "num_dense_tokens": 8, "num_same": 1}
    assert str(FastSpeed(**values)) == (
        "Fast: 4.0 tokens/s, 4.0 of 4 layers a token, nothing was drafted. 1.00 times as fast as "
        "dense generation (4.0 tokens/s); the text is the same."
    )


class TestCommand:
    def test_the_line_stands_on_standard_error(self, folder, capsys):
        assert depthmix_cli.main(["generate", str(folder), *PROMPTS, *FLAGS]) == 0
        dense = capsys.readouterr()
        assert "tokens/s" not in dense.err
        command = ["generate", str(folder), *PROMPTS, *FLAGS, "--fast", "--against-dense"]
        assert depthmix_cli.main(command) == 0
        fast = capsys.readouterr()
        assert fast.out == dense.out
        line = fast.err.splitlines()[-1]
        assert line.startswith("Fast: ")
        assert line.endswith("tokens/s); all texts are the same.")

    def test_a_plan_that_stays_dense_is_said(self, folder, capsys):
        write_plan(folder, stay_dense=True)
        try:
            command = ["generate", str(folder), *PROMPTS, *FLAGS, "--fast", "--against-dense"]
            assert depthmix_cli.main(command) == 0
        finally:
            write_plan(folder)
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("Dense, as the plan says that drafting is not worth it here: ")
        assert line.endswith("tokens/s.")

    def test_against_dense_needs_fast(self, folder, capsys):
        assert depthmix_cli.main(["generate", str(folder), "1", "--against-dense"]) == 1
        assert "`--against-dense` needs `fast`, which it measures" in capsys.readouterr().err
