"""Settings by name: the mixture's, with those of the adapters below it."""

from __future__ import annotations

from typing import Any

PAPER_MODE: dict[str, Any] = {
    "r": 32,
    "lora_alpha": 64,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    "adapt": "below",
    "late_layers": 3,
    "router_init": "gaussian",
    "router_input": "raw",
    "distillation_weight": 1e-4,
    "divergence": "reverse_kl",
    "reduction": "mean",
}
"""The paper's settings (section 4.1), with LLM-Adapters' LoRA underneath."""

FAST_MODE: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 32,
    "target_modules": "all-linear",
    "adapt": "all",
    "late_layers": 1,
}
"""The adapters of the fastest recipe that costs no quality: plain LoRA everywhere, and exits put on
the finished model (docs/speed.md)."""

PRESETS = {"paper": PAPER_MODE, "fast": FAST_MODE}
"""Settings by name."""
