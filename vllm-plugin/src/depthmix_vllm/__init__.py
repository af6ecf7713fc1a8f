"""Mixture-of-Depths Ensembles in vLLM: a plug-in, which vLLM runs in each of its processes."""

from __future__ import annotations

MODEL_TYPE = "depthmix"
"""`model_type` of an export with its mixture."""

PREFIX = "Depthmix"
"""What stands before the name of a base model's class in `architectures` of an export."""


def register() -> None:
    """Make vLLM know exports of every model that it knows; may be called again.

    Nothing of a model is imported: vLLM does that for the one that it is to serve.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from depthmix_vllm.config import DepthmixConfig

    AutoConfig.register(MODEL_TYPE, DepthmixConfig, exist_ok=True)
    known = set(ModelRegistry.get_supported_archs())
    for architecture in sorted(known):
        name = PREFIX + architecture
        if not architecture.startswith(PREFIX) and name not in known:
            ModelRegistry.register_model(name, f"depthmix_vllm.models:{name}")
