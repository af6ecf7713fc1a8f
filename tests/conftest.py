"""Shared set-up and fixtures."""

from __future__ import annotations

import environment  # noqa: F401  # isort: skip  (before what it is for)

import pytest
from hypothesis import HealthCheck, settings
from transformers import AutoModelForCausalLM

from adapters import logits, tuned_model
from browser import browser, open_file  # noqa: F401  (fixtures)
from data_folder import small_data  # noqa: F401  (a fixture)
from models import tiny_model

# The same examples at each run; `--hypothesis-profile fresh` draws new ones. A machine may be slow.
settings.register_profile(
    "steady", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("fresh", settings.get_profile("steady"), derandomize=False)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter(base_dir, tmp_path_factory):
    """Save a tuned model's adapter; give its folder and the logits."""
    tuned = tuned_model(AutoModelForCausalLM.from_pretrained(base_dir))
    folder = tmp_path_factory.mktemp("adapter")
    tuned.save_pretrained(folder)
    return folder, logits(tuned)
