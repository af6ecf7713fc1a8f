"""Shared set-up: shape annotations are enforced, one thread per worker, no network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")

from jaxtyping import install_import_hook

install_import_hook("depthmix", "beartype.beartype")

import torch  # noqa: E402

torch.set_num_threads(1)

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from adapters import logits, tuned_model  # noqa: E402
from browser import browser, open_file  # noqa: E402, F401  (fixtures)
from data_folder import small_data  # noqa: E402, F401  (a fixture)
from models import tiny_model  # noqa: E402

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
