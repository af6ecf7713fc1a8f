"""Which runs count as seeds of one experiment."""

import hashlib
import json
import shutil

import pytest

from depthmix.evaluation.provenance import describe_model
from depthmix.models.spec import ModelSpec

BATCH, STEPS = "per_device_train_batch_size", "gradient_accumulation_steps"


@pytest.fixture
def settings_of(adapter, base_dir, tmp_path):
    """Give the hash of a run's settings, by its training section."""
    folder = tmp_path / "run"
    shutil.copytree(adapter[0], folder)

    def describe(num_devices=None, **training):
        run = {"model": {"name": str(base_dir)}, "training": training, "method": "mode"}
        (folder / "run_config.json").write_text(json.dumps(run))
        results = {} if num_devices is None else {"num_devices": num_devices}
        (folder / "results.json").write_text(json.dumps(results))
        return describe_model(ModelSpec(name=str(folder)))["settings"]

    return describe


def test_seed_and_place_do_not_count(settings_of):
    assert settings_of(seed=1, output_dir="a") == settings_of(seed=2, output_dir="b")
    assert settings_of(seed=1) != settings_of(seed=1, learning_rate=1e-3)


def test_a_batch_counts_as_a_whole(settings_of):
    whole = settings_of(**{BATCH: 16, STEPS: 1})
    for training in ({BATCH: 16}, {BATCH: 4, STEPS: 4}, {BATCH: 8, STEPS: 2}, {STEPS: 2}):
        assert settings_of(**training) == whole
    for training in ({BATCH: 8}, {BATCH: 2, STEPS: 4}, {BATCH: 8, STEPS: 1}, {}):
        assert settings_of(2, **training) == whole
        assert settings_of(1, **training) != whole
    for training in ({BATCH: 8}, {BATCH: 8, STEPS: 1}, {STEPS: 4}, {}):
        assert settings_of(**training) != whole


def test_damaged_results_are_named(settings_of, tmp_path):
    settings_of()
    for text, message in (("[]", "must hold named values"), ("{", "cannot be read")):
        (tmp_path / "run" / "results.json").write_text(text)
        with pytest.raises(ValueError, match=rf"results\.json.*{message}"):
            describe_model(ModelSpec(name=str(tmp_path / "run")))


@pytest.mark.parametrize("training", [{BATCH: 16, STEPS: 1}, {"learning_rate": 1e-3}])
def test_undivided_batches_keep_the_hash_of_earlier_evaluations(training, settings_of, base_dir):
    run = {"model": {"name": str(base_dir)}, "training": training, "method": "mode"}
    text = json.dumps({**run, "evaluation": None}, sort_keys=True)
    earlier = hashlib.sha256(text.encode()).hexdigest()[:12]
    assert settings_of(seed=3, **training) == earlier
