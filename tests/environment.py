"""Shared set-up: shape annotations are enforced, one thread per worker, no network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")

from jaxtyping import install_import_hook

install_import_hook(["depthmix", "depthmix_replication"], "beartype.beartype")

import torch  # noqa: E402

torch.set_num_threads(1)
