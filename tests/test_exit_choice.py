"""What exits predict on held-out tokens, and which of them are kept, against loops over tokens."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from adapters import tuned_model
from depthmix.depth import exit_readings
from depthmix.depth.exit_choice import (
    CATCH_UP,
    EXIT_COST,
    candidate_layers,
    choose_exits,
    cost_of_exits,
)
from depthmix.depth.exit_readings import ExitReadings, read_exits
from depthmix.depth.exit_training import train_exits
from depthmix.method.parts import find_parts
from models import random_ids, tiny_model


def draw_readings(layers=(8, 11, 15, 19, 22, 26), *, num_tokens=40, seed=0):
    """Deeper exits are surer, and right more often."""
    generator = torch.Generator().manual_seed(seed)
    shape = num_tokens, len(layers)
    lift = torch.tensor(layers) / 60
    return ExitReadings(
        layers=layers,
        confidences=(torch.rand(shape, generator=generator) * 0.8 + lift).clamp(max=1.0),
        agreements=torch.rand(shape, generator=generator) < 0.5 + lift,
    )


def cost_by_hand(readings, layers, *, n, confidence):
    """One token after the other."""
    costs = []
    for confidences, agreements in zip(
        readings.confidences.tolist(), readings.agreements.tolist(), strict=True
    ):
        cost, spent = None, 0.0
        for layer in layers:
            spent += EXIT_COST
            place = readings.layers.index(layer)
            if confidences[place] >= confidence:
                cost = layer + spent + CATCH_UP * (n - layer)
                cost += 0 if agreements[place] else n
                break
        costs.append(n + spent if cost is None else cost)
    return costs


@pytest.mark.parametrize("layers", [(8,), (26,), (11, 22), (8, 15, 19), (8, 11, 15, 19, 22, 26)])
@pytest.mark.parametrize("confidence", [0.0, 0.6, 0.8, 1.1])
def test_the_cost_of_exits_is_counted_token_by_token(layers, confidence):
    readings = draw_readings()
    found = cost_of_exits(readings, layers, num_hidden_layers=30, confidence=confidence)
    expected = cost_by_hand(readings, layers, n=30, confidence=confidence)
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("most", [1, 2, 3, 9])
def test_the_cheapest_set_is_chosen(seed, most):
    readings = draw_readings(seed=seed)
    costs = {}
    for size in range(1, min(most, 6) + 1):
        for layers in combinations(readings.layers, size):
            each = cost_by_hand(readings, layers, n=30, confidence=0.7)
            costs[layers] = sum(each) / len(each)
    choice = choose_exits(readings, num_hidden_layers=30, confidence=0.7, most=most)
    assert choice.expected_layers == pytest.approx(min(costs.values()), rel=1e-5)
    assert costs[choice.layers] == pytest.approx(min(costs.values()), rel=1e-5)


def test_exits_that_bring_nothing_cost_what_they_cost_and_the_smallest_set_is_kept():
    readings = ExitReadings(
        layers=(1, 2, 3),
        confidences=torch.zeros(5, 3),
        agreements=torch.zeros(5, 3, dtype=torch.bool),
    )
    choice = choose_exits(readings, num_hidden_layers=4)
    assert choice.layers == (1,)
    assert choice.expected_layers == pytest.approx(4 + EXIT_COST)
    with pytest.raises(ValueError, match="`most` must be at least 1"):
        choose_exits(readings, num_hidden_layers=4, most=0)


def test_candidates_lie_in_the_upper_three_quarters():
    assert candidate_layers(30) == (8, 11, 15, 19, 22, 26)
    assert candidate_layers(4) == (1, 2, 3)
    assert candidate_layers(2) == (1,)
    for number in range(2, 70):
        layers = candidate_layers(number)
        assert list(layers) == sorted(set(layers))
        assert number / 4 - 1 < layers[0] <= layers[-1] < number
    with pytest.raises(ValueError, match="`model` must have at least 2 layers"):
        candidate_layers(1)


@pytest.mark.parametrize("make", [tiny_model, lambda: tiny_model("gemma2"), tuned_model])
@pytest.mark.parametrize("chunk", [2**24, 61 * 2])
@torch.no_grad()
def test_readings_are_those_of_each_token(make, chunk, monkeypatch):
    monkeypatch.setattr(exit_readings, "CHUNK_LOGITS", chunk)
    model = make()
    rows = [{"input_ids": random_ids(length, seed=length).tolist()} for length in (7, 4, 9)]
    rows[0]["labels"] = [-100] * 5 + rows[0]["input_ids"][5:]
    rows.append({"input_ids": [5]})
    exits = train_exits(model, rows, layers=[1, 3], rank=2, num_steps=4)  # also without gradients
    backbone, _ = find_parts(model)
    expected = []
    for row in sorted(rows, key=lambda row: len(row["input_ids"])):
        output = model(torch.tensor([row["input_ids"]]), output_hidden_states=True)
        for t, label in enumerate(row.get("labels", row["input_ids"])[1:]):
            own = int(output.logits[0, t].argmax())
            entry = []
            for layer in exits.layers:
                state = exits(layer, output.hidden_states[layer][0, t])
                probs = backbone.unembed(state).softmax(-1)
                entry.append((float(probs.max()), int(probs.argmax()) == own))
            if label != -100:
                expected.append(entry)
    readings = read_exits(model, exits, rows, batch_size=2)
    assert readings.layers == (1, 3)
    found = torch.stack([readings.confidences, readings.agreements.float()], -1)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))
    with pytest.raises(ValueError, match="and the 1 held out hold none"):
        read_exits(model, exits, rows[-1:])
