"""The probe against the logit lens written out token by token, and the rule on readings by hand."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from peft import LoraConfig, get_peft_model

import references
from adapters import tuned_model
from depthmix import Probe, attach, choose_late_layers, find_backbone, probe_layers
from depthmix.depth.probe import Estimate, LayerReading
from depthmix.method.backbone import Backbone
from models import random_ids, randomise, tiny_model


def make_sequences(*, labelled):
    """Make rows of different lengths; of labelled ones, the last tokens count, or none does."""
    rows = [{"input_ids": random_ids(length, seed=length).tolist()} for length in (7, 1, 4, 9, 5)]
    for number, row in enumerate(rows if labelled else []):
        num_given = 9 if number == 4 else number + 1
        row["labels"] = [-100] * num_given + row["input_ids"][num_given:]
        row["labels"] = row["labels"][: len(row["input_ids"])]
    return rows


@torch.no_grad()
def read_by_hand(model, sequences):
    """Give each sequence's measures, token by token, from the layers' hidden states in float64."""
    backbone = find_backbone(model)
    tokens = []
    for row in sequences:
        ids = torch.tensor([row["input_ids"]])
        output = model(input_ids=ids, output_hidden_states=True)
        late = output.hidden_states[1:-1]  # the last one is normed already
        logits = [*(backbone.unembed(backbone.final_norm(state)) for state in late), output.logits]
        probs = [part[0].double().softmax(-1) for part in logits]
        tokens.append(
            [
                [
                    (
                        references.divergence(p[t], probs[-1][t], "jsd"),
                        -float(p[t, label].log()),
                        float(p[t].argmax() == probs[-1][t].argmax()),
                    )
                    for p in probs
                ]
                for t, label in enumerate(row.get("labels", row["input_ids"])[1:])
                if label != -100
            ]
        )
    return [sequence for sequence in tokens if sequence]


def summarise_by_hand(values):
    """Give the mean over tokens and its standard error, from one list of values per sequence."""
    num_tokens = sum(map(len, values))
    mean = sum(map(sum, values)) / num_tokens
    residuals = [sum(value - mean for value in sequence) for sequence in values]
    return mean, statistics.stdev(residuals) * math.sqrt(len(values)) / num_tokens


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "cohere", "granite", "opt", "gpt2"])
def test_readings_equal_the_logit_lens_by_hand(model_type, labelled, monkeypatch):
    monkeypatch.setattr("depthmix.depth.probe.CHUNK_LOGITS", 3 * 61 + 1)  # three tokens at a time
    model, sequences = tiny_model(model_type), make_sequences(labelled=labelled)
    found = probe_layers(model, sequences, batch_size=2)
    tokens = read_by_hand(model, sequences)
    assert found.num_sequences == len(tokens) == (3 if labelled else 4)
    assert found.num_tokens == sum(map(len, tokens))
    assert [reading.layer for reading in found.layers] == [1, 2, 3, 4]
    for number, reading in enumerate(found.layers):
        for place, name in enumerate(("jsd", "nll", "agreement")):
            estimate = getattr(reading, name)
            values = [[token[number][place] for token in sequence] for sequence in tokens]
            expected = summarise_by_hand(values)
            assert (estimate.mean, estimate.error) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_the_final_layer_is_the_model_itself():
    model, ids = tiny_model(), random_ids(3, 8)
    final = probe_layers(model, [{"input_ids": row} for row in ids.tolist()]).layers[-1]
    assert (final.jsd.mean, final.agreement.mean) == pytest.approx((0, 1), abs=1e-6)
    assert final.nll.mean == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)


def test_batches_and_pieces_change_nothing(monkeypatch):
    sequences = make_sequences(labelled=True)
    together = probe_layers(tiny_model(), sequences)
    alone = probe_layers(tiny_model(), sequences, batch_size=1)
    rows = []
    project = Backbone.project

    def count(self, states):
        rows.append(len(states))
        return project(self, states)

    monkeypatch.setattr(Backbone, "project", count)
    monkeypatch.setattr("depthmix.depth.probe.CHUNK_LOGITS", 2 * 61)
    model = tiny_model()
    find_backbone(model)
    rows.clear()
    monkeypatch.setattr(
        "depthmix.depth.probe.find_backbone", lambda m, **_: find_backbone(m, try_out=False)
    )
    pieces = probe_layers(model, sequences)
    assert max(rows) == 2  # never more logits than those of one layer on one piece
    for found in (alone, pieces):
        for one, other in zip(together.layers, found.layers, strict=True):
            assert one.jsd.mean == pytest.approx(other.jsd.mean, abs=1e-5)
            assert one.nll.error == pytest.approx(other.nll.error, rel=1e-4)


def test_softmax_is_float32_over_a_bfloat16_model():
    model = tiny_model(initializer_range=0.2).bfloat16()
    ids = random_ids(2, 8)
    probe = probe_layers(model, [{"input_ids": row} for row in ids.tolist()])
    logits = model(ids).logits[:, :-1].float()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert probe.layers[-1].nll.mean == pytest.approx(expected.item(), rel=1e-5)
    assert probe.layers[-1].jsd.mean == pytest.approx(0, abs=1e-6)


def test_dropout_is_off_and_the_mode_stays():
    model = tiny_model(attention_dropout=0.5)
    sequences = make_sequences(labelled=False)
    expected = probe_layers(model, sequences)
    model.train()
    model.model.norm.eval()
    assert probe_layers(model, sequences) == expected
    assert model.training
    assert not model.model.norm.training
    assert not any(m._forward_pre_hooks for m in [*model.model.layers, model.model.norm])


def test_a_plain_adapter_is_part_of_the_model():
    sequences = make_sequences(labelled=False)
    tuned = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    randomise(tuned, only_trainable=True)
    adapted = probe_layers(tuned, sequences).layers[1].nll.mean
    merged = probe_layers(tuned.merge_and_unload(), sequences).layers[1].nll.mean
    assert adapted == pytest.approx(merged, rel=1e-4)
    assert adapted != pytest.approx(
        probe_layers(tiny_model(), sequences).layers[1].nll.mean, rel=0.1
    )


def test_one_sequence_has_no_error_and_the_table_says_all():
    probe = probe_layers(tiny_model(), make_sequences(labelled=False)[:1])
    assert (probe.num_tokens, probe.num_sequences) == (6, 1)
    assert probe.layers[0].jsd.error is None
    first, *rows, last = str(probe).splitlines()
    assert first.split() == ["layer", "JSD", "to", "the", "final", "nll", "agreement,", "%"]
    assert rows[3].split() == ["4", "0.000", f"{probe.layers[3].nll.mean:.2f}", "100.0"]
    assert "6 tokens of 1 sequences" in last
    assert " ± " in str(probe_layers(tiny_model(), make_sequences(labelled=False)))


def test_what_cannot_be_probed_is_refused():
    nothing = [{"input_ids": [3]}, {"input_ids": [3, 4], "labels": [-100, -100]}]
    for sequences in ([], nothing):
        with pytest.raises(ValueError, match=f"the {len(sequences)} given hold none"):
            probe_layers(tiny_model(), sequences)
    attached = tiny_model()
    attach(attached, late_layers=2)
    for model in (attached, tuned_model()):
        with pytest.raises(ValueError, match=r"without a mixture, .*`detach\(model\)`"):
            probe_layers(model, make_sequences(labelled=False))


def make_probe(*distances):
    """Make readings of which only the divergences matter, first layer first."""
    none = Estimate(0.0, None)
    layers = tuple(
        LayerReading(layer=layer, jsd=Estimate(value, 0.01), nll=none, agreement=none)
        for layer, value in enumerate(distances, start=1)
    )
    return Probe(layers=layers, num_tokens=1, num_sequences=1)


@pytest.mark.parametrize(
    ("distances", "options", "expected"),
    [
        ((0.6, 0.5, 0.3, 0.2, 0.0), {}, [3, 4, 5]),
        ((0.1, 0.5, 0.3, 0.2, 0.0), {}, [3, 4, 5]),  # what is beyond a distant layer is left out
        ((0.6, 0.6, 0.6, 0.6, 0.0), {}, [4, 5]),
        ((0.6, 0.6, 0.6, 0.6, 0.0), {"smallest": 1}, [5]),
        ((0.6, 0.6, 0.6, 0.6, 0.0), {"smallest": 3}, [3, 4, 5]),
        ((0.1, 0.1, 0.1, 0.1, 0.0), {}, [2, 3, 4, 5]),  # the router reads below the ensemble
        ((0.1, 0.1, 0.1, 0.1, 0.0), {"largest": 3}, [3, 4, 5]),
        ((0.1, 0.1, 0.1, 0.1, 0.0), {"smallest": 5}, [1, 2, 3, 4, 5]),
        ((0.6, 0.5, 0.3, 0.2, 0.0), {"threshold": 0.25}, [4, 5]),
        ((0.6, 0.5, 0.3, 0.2, 0.0), {"threshold": 0.3}, [3, 4, 5]),
        ((0.5, 0.0), {}, [1, 2]),
        (tuple([0.1] * 9), {}, [4, 5, 6, 7, 8, 9]),
    ],
)
def test_layers_near_the_final_one_are_chosen(distances, options, expected):
    assert choose_late_layers(make_probe(*distances), **options) == expected


@pytest.mark.parametrize(
    "options", [{"smallest": 0}, {"smallest": 3, "largest": 2}, {"smallest": 6}]
)
def test_bounds_that_leave_no_choice_are_refused(options):
    with pytest.raises(ValueError, match=r"`smallest` must be between 1 and both `largest`"):
        choose_late_layers(make_probe(0.6, 0.5, 0.3, 0.2, 0.0), **options)
