"""Times of a model's parts: what is measured, and what is read between measurements."""

from __future__ import annotations

import numpy as np
import pytest

from cascades import make_costs
from depthmix.depth.costs import Costs, measure_costs
from depthmix.method.parts import find_parts, new_exits
from models import tiny_model


def test_times_lie_on_the_line_through_measured_ones():
    costs = make_costs()
    assert costs.layer_seconds(np.array([1, 2, 3, 4])).tolist() == [1.0, 1.5, 1.75, 2.0]
    assert costs.layer_seconds(6) == 2.5  # on the last line
    assert costs.exit_seconds(55) == pytest.approx(0.25 + 0.75 * 0.5)
    assert costs.row_costs == (1.0, 1.5, 2.0, 3.0)
    assert costs.dense_seconds(10, 8) == pytest.approx(10 * (8 + 7 + 0.5))


def test_beyond_the_last_no_time_falls():
    assert make_costs(head=(7.0, 9.0, 8.0)).head_seconds(40) == 8.0
    assert make_costs(rows=(1,), layer=(2.0,), head=(3.0,)).layer_seconds(9) == 2.0


def test_costs_come_back_from_json():
    costs = make_costs()
    assert Costs.from_dict(costs.to_dict()) == costs
    assert isinstance(costs.to_dict()["rows"], list)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"layer": (1.0, 2.0)}, "`layer` must hold a time for each"),
        ({"rows": (1, 4, 2)}, "`layer` must hold a time for each"),
        ({"vocabulary_sizes": (), "exit": ()}, "`exit` must hold a time for each"),
        ({"head": (0.0, 1.0, 2.0)}, "`head` must be times above 0 seconds, got 0.0"),
    ],
)
def test_costs_without_sense_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        make_costs(**options)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "opt"])
def test_every_part_of_a_model_is_measured(architecture):
    model = tiny_model(architecture)
    backbone, norm = find_parts(model)
    exits = new_exits(backbone, norm, (1, 3), rank=2)
    vocabularies = [tuple(range(5)), None, tuple(range(20))]
    costs = measure_costs(
        backbone, exits, [5, 6, 7, 8], vocabularies=vocabularies, rows=(1, 3), num_repetitions=2
    )
    assert costs.rows == (1, 3)
    assert costs.vocabulary_sizes == (5, 20, 61)
    assert (costs.num_prompt_tokens, costs.dtype) == (4, "float32")
    assert costs.device.startswith("cpu, ")
    assert costs.prompt > 0
    # What hooked in is gone.
    stages = [backbone.layers[0], backbone.final_norm]
    assert not any(stage._forward_pre_hooks for stage in stages)


def test_an_interrupted_measurement_leaves_no_hooks():
    model = tiny_model("llama")
    backbone, norm = find_parts(model)
    exits = new_exits(backbone, norm, (1, 3), rank=2)

    def fail(*_args):
        raise KeyboardInterrupt

    handle = backbone.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        measure_costs(backbone, exits, [5, 6], vocabularies=[None])
    handle.remove()
    assert not backbone.layers[0]._forward_pre_hooks
    assert not backbone.final_norm._forward_pre_hooks
    assert "forward" not in vars(backbone.head)


def test_a_head_that_is_wrapped_stays_so():
    model = tiny_model("llama")
    backbone, norm = find_parts(model)
    exits = new_exits(backbone, norm, (1,), rank=0)
    own, calls = backbone.head.forward, []

    def wrapped(states):
        calls.append(states.shape)
        return own(states)

    backbone.head.forward = wrapped
    measure_costs(backbone, exits, [5, 6], vocabularies=[None], rows=(1, 20), num_repetitions=1)
    assert backbone.head.forward is wrapped
    assert calls
